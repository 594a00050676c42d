"""Models whose Fisher is known on paper, through per-sample gradients, K and every step after it."""

import numpy as np
import pytest

from dynamics.fisher import fisher_measures
from dynamics.fisher.spectrum import eigenvalue_errors, fisher_eigenvectors
from tests.dynamics.fisher.simulated import grams, probe_gram

SIGMA = np.array([3.0, 1.0, 0.5])
NOISE = 0.7


def linear_regression(samples, distance, *, sampled, seed=0):
    """Per-sample gradients of (y − θᵀx)²/2σ² at θ = θ* − δ; with ``sampled`` labels from the model itself."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((samples, 3)) * np.sqrt(SIGMA)
    error = NOISE * rng.standard_normal(samples)
    residual = error if sampled else error + inputs @ distance
    return -(residual / NOISE**2)[:, None] * inputs


@pytest.mark.parametrize("distance", [np.zeros(3), np.array([0.5, -0.5, 1.0])])
def test_linear_regression_empirical(distance):
    """[(σ² + δᵀΣδ)Σ + 2Σδδ ᵀΣ]/σ⁴."""
    sigma = np.diag(SIGMA)
    along = sigma @ distance
    truth = ((NOISE**2 + distance @ along) * sigma + 2 * np.outer(along, along)) / NOISE**4
    values, vectors = fisher_eigenvectors(grams(linear_regression(1200, distance, sampled=False))[None])
    errors = eigenvalue_errors(values, vectors**2, np.full(1200, 1 / 1200))[0, :3]
    expected = np.linalg.eigvalsh(truth)[::-1]
    assert (np.abs(np.log(values[0, :3] / expected)) < 4 * errors).all()
    assert errors.max() < 0.1


def test_linear_regression_with_sampled_labels_is_the_true_fisher():
    """Σ/σ², wherever θ is."""
    values, vectors = fisher_eigenvectors(grams(linear_regression(1200, np.ones(3), sampled=True))[None])
    errors = eigenvalue_errors(values, vectors**2, np.full(1200, 1 / 1200))[0, :3]
    assert (np.abs(np.log(values[0, :3] / (SIGMA / NOISE**2))) < 4 * errors).all()


def test_softmax_regression_at_zero():
    """F = Cov ⊗ (I/C − 11ᵀ/C²): SE = SE(Cov) + ln(C − 1), ρ = ρ(Cov)/(C − 1), every label of every input enumerated."""
    classes, spectrum = 4, np.array([4.0, 2.0, 1.0])
    inputs = np.sqrt(3 * spectrum)[:, None] * np.eye(3)  # whose second moment is exactly diag(spectrum)
    errors = np.full((classes, classes), 1 / classes) - np.eye(classes)
    rows = np.stack([np.outer(x, e).ravel() for x in inputs for e in errors])
    found = fisher_measures(probe_gram(rows @ rows.T)).sel(block="global", task="all")
    share = spectrum / spectrum.sum()
    entropy = -(share * np.log(share)).sum()
    assert found["spectral_entropy"].item() == pytest.approx(entropy + np.log(classes - 1), rel=1e-10)
    assert found["dominant_ratio"].item() == pytest.approx(share[0] / (classes - 1), rel=1e-10)
    assert found["trace"].item() == pytest.approx(spectrum.sum() * (1 - 1 / classes), rel=1e-10)
