import re

import numpy as np
import pytest

from dynamics.fisher.spectrum import dominant_ratio_plug_in, fisher_eigenvalues, per_sample_gram
from tests.dynamics.fisher.simulated import gradients, grams, power_law

MEAN = np.full(40, 0.2)


def micro_batches(sizes, sets=200):
    rng = np.random.default_rng(0)
    return np.stack([gradients(rng, sets, m, power_law(40), MEAN).mean(1) for m in sizes], axis=1)


@pytest.mark.parametrize("sizes", [[4] * 48, [16] * 48, [2, 4, 8] * 16])
def test_means_look_dominated_and_are_corrected(sizes):
    single = grams(gradients(np.random.default_rng(1), 200, len(sizes), power_law(40), MEAN))
    reference = dominant_ratio_plug_in(fisher_eigenvalues(single)).mean()
    gram = grams(micro_batches(sizes))
    naive = dominant_ratio_plug_in(fisher_eigenvalues(gram)).mean()
    corrected = dominant_ratio_plug_in(fisher_eigenvalues(per_sample_gram(gram, sizes))).mean()
    assert naive > reference + 0.05
    assert corrected == pytest.approx(reference, abs=0.02)


def test_the_mean_gradient_is_kept():
    sizes = np.array([1, 2, 5])
    (rows,) = micro_batches(sizes, sets=1)
    weight = sizes / sizes.sum()
    mean, corrected = weight @ rows, per_sample_gram(grams(rows)[None], sizes)[0]
    transform = np.sqrt(sizes)[:, None] * (rows - mean) + mean
    np.testing.assert_allclose(corrected, transform @ transform.T, rtol=1e-12)


def test_sizes_that_do_not_fit_are_refused():
    for sizes in ([1], [1, 0]):
        with pytest.raises(
            ValueError, match=re.escape(f"Expected 2 micro-batch sizes of at least 1, got {[float(s) for s in sizes]}.")
        ):
            per_sample_gram(np.eye(2)[None], sizes)
