"""Parts of an update: identities, the explicit projection, and inputs that have no part."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.intervention.parts import Part, bottom_part, leading_part, random_part

Gradients = tuple[np.ndarray, np.ndarray]


def part_of(name: str, gram: np.ndarray, product: np.ndarray, k: int) -> Part:
    if name == "random":
        return random_part(gram, product, k, np.random.default_rng(3))
    return {"leading": leading_part, "bottom": bottom_part}[name](gram, product, k)


def gradients(seed: int, samples: int, directions: int) -> Gradients:
    """Gradients of a falling spectrum, and an update."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, directions)) / np.arange(1, directions + 1), rng.standard_normal(directions)


# ---- identities ----


@given(
    name=st.sampled_from(["leading", "bottom", "random"]),
    samples=st.integers(1, 12),
    directions=st.integers(1, 15),
    k=st.integers(1, 16),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_norm_and_inner_product_of_a_part_are_its_energy(
    name: str, samples: int, directions: int, k: int, scale: float
) -> None:
    """‖on‖² = wᵀKw = c‖δ‖² = ⟨on, δ⟩."""
    rows, update = gradients(k, samples, directions)
    rows = rows * scale
    gram = rows @ rows.T
    part = part_of(name, gram, rows @ update, k)
    on = part.weights @ rows
    expected = pytest.approx(part.energy, rel=1e-7)  # as exact as 1/√eig of what K resolves
    assert on @ on == expected
    assert part.weights @ gram @ part.weights == expected
    assert on @ update == expected
    assert part.energy <= update @ update * (1 + 1e-7)
    assert part.directions <= min(k, samples, directions)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_identities_hold_to_ten_digits_where_k_is_well_conditioned(k: int) -> None:
    rows, update = gradients(0, 8, 20)
    part = leading_part(rows @ rows.T, rows @ update, k)
    on = part.weights @ rows
    np.testing.assert_allclose([on @ on, on @ update], part.energy, rtol=1e-10)


@pytest.mark.parametrize(("name", "span"), [("leading", slice(0, 3)), ("bottom", slice(-3, None))])
def test_part_is_the_explicit_projection(name: str, span: slice) -> None:
    rows, update = gradients(1, 8, 20)
    part = part_of(name, rows @ rows.T, rows @ update, 3)
    directions = np.linalg.svd(rows, full_matrices=False)[2][span]
    np.testing.assert_allclose(part.weights @ rows, directions.T @ (directions @ update), atol=1e-10)


def test_part_is_the_explicit_projection_where_gradients_are_summed_in_single_precision() -> None:
    rows, update = gradients(1, 8, 20)
    single, update = rows.astype(np.float32), update.astype(np.float32)
    exact = single.astype(np.float64)
    part = leading_part(exact @ exact.T, exact @ update.astype(np.float64), 3)
    directions = np.linalg.svd(exact, full_matrices=False)[2][:3]
    on = part.weights.astype(np.float32) @ single
    np.testing.assert_allclose(on, directions.T @ (directions @ update), atol=1e-6)


def test_leading_and_bottom_parts_are_disjoint_and_fill_the_span() -> None:
    rows, update = gradients(2, 9, 20)
    gram, product = rows @ rows.T, rows @ update
    parts = leading_part(gram, product, 4), bottom_part(gram, product, 5), leading_part(gram, product, 9)
    leading, bottom, span = (part.weights @ rows for part in parts)
    assert leading @ bottom == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(leading + bottom, span, atol=1e-10)


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
def test_nothing_is_left_of_an_update_within_all_directions(name: str) -> None:
    rows, _ = gradients(3, 8, 20)
    update = np.arange(1.0, 9.0) @ rows
    part = part_of(name, rows @ rows.T, rows @ update, 8)
    np.testing.assert_allclose(part.weights @ rows, update, rtol=1e-9, atol=1e-9)


# ---- random directions ----


def test_random_directions_lie_in_the_span_of_the_gradients() -> None:
    rows, update = gradients(4, 6, 20)
    part = random_part(rows @ rows.T, rows @ update, 3, np.random.default_rng(0))
    on = part.weights @ rows
    assert np.linalg.norm(on) > 0.1
    # A projection of the update that is one onto some three directions: ‖on‖² = ⟨on, δ⟩, and not the leading part.
    assert on @ on == pytest.approx(on @ update, rel=1e-10)
    assert np.linalg.norm(on - leading_part(rows @ rows.T, rows @ update, 3).weights @ rows) > 0.1


def test_random_directions_hold_k_of_the_rank_on_average() -> None:
    rows, update = gradients(5, 10, 30)
    gram, product = rows @ rows.T, rows @ update
    generator = np.random.default_rng(1)
    whole = leading_part(gram, product, 10).energy
    shares = np.array([random_part(gram, product, 4, generator).energy for _ in range(2000)]) / whole
    # Haar-distributed: Beta(k/2, (rank − k)/2).
    assert shares.mean() == pytest.approx(0.4, abs=4 * np.sqrt(0.4 * 0.6 / 6 / 2000))
    assert shares.var() == pytest.approx(0.4 * 0.6 / 6, rel=0.1)


# ---- what has no part, or not all of it ----


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
@pytest.mark.parametrize(
    ("gram", "product"),
    [(np.zeros((3, 3)), np.zeros(3)), (np.zeros((0, 0)), np.zeros(0))],
    ids=["zero gradients", "no samples"],
)
def test_without_directions_the_part_is_zero(name: str, gram: np.ndarray, product: np.ndarray) -> None:
    part = part_of(name, gram, product, 2)
    assert (part.weights.tolist(), part.energy, part.directions) == ([0.0] * len(product), 0.0, 0)


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
def test_part_of_a_zero_update_is_zero(name: str) -> None:
    rows, _ = gradients(6, 5, 9)
    part = part_of(name, rows @ rows.T, np.zeros(5), 2)
    assert (np.abs(part.weights).max(), part.energy, part.directions) == (0.0, 0.0, 2)


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
def test_nothing_is_projected_on_directions_that_are_rounding(name: str) -> None:
    rows, update = gradients(7, 4, 9)
    repeated = np.concatenate([rows, rows])  # rank 4 of 8
    part = part_of(name, repeated @ repeated.T, repeated @ update, 8)
    assert part.directions == 4
    np.testing.assert_allclose(
        part.weights @ repeated, leading_part(rows @ rows.T, rows @ update, 4).weights @ rows, atol=1e-10
    )


def test_degenerate_eigenvalues_have_one_part_of_all_their_directions() -> None:
    part = leading_part(np.eye(4), np.array([1.0, 2.0, 3.0, 4.0]), 4)
    np.testing.assert_allclose(part.weights, [1, 2, 3, 4], rtol=1e-12)


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_gram_that_is_not_finite_is_refused(name: str, broken: float) -> None:
    message = "Expected finite numbers in K = GGᵀ, got some that are not. Leave out the samples they are of."
    with pytest.raises(ValueError, match=f"^{message}$"):
        part_of(name, np.diag([1.0, broken]), np.ones(2), 1)


@pytest.mark.parametrize("name", ["leading", "bottom", "random"])
def test_a_product_that_is_unknown_gives_no_part(name: str) -> None:
    part = part_of(name, np.eye(2), np.array([1.0, np.nan]), 2)
    assert np.isnan([*part.weights, part.energy]).any()


def test_what_counts_as_rounding_can_be_given() -> None:
    gram, product = np.diag([1.0, 1e-3]), np.ones(2)
    assert leading_part(gram, product, 2).directions == 2
    assert leading_part(gram, product, 2, resolved=1e-2).directions == 1


# ---- the reference ----


@pytest.mark.parametrize("k", [1, 4, 12])
def test_weights_are_those_of_the_reference(k: int, reference: ModuleType) -> None:
    rows, update = gradients(8, 12, 30)
    gram, product = rows @ rows.T, rows @ update
    weights, energy = reference.weights(gram, product, k)
    part = leading_part(gram, product, k)
    np.testing.assert_allclose(part.weights, weights, rtol=1e-9)
    assert part.energy == pytest.approx(energy, rel=1e-10)


def test_random_part_has_the_law_of_the_reference(reference: ModuleType) -> None:
    """The eigenvectors' order differs, so the draws do: their mean energy is the same."""
    rows, update = gradients(9, 8, 20)
    gram, product = rows @ rows.T, rows @ update
    ours, theirs = np.random.default_rng(0), np.random.default_rng(1)
    parts = [random_part(gram, product, 3, ours).energy for _ in range(1000)]
    others = [reference.span_random(gram, product, 3, theirs)[1] for _ in range(1000)]
    assert np.mean(parts) == pytest.approx(np.mean(others), rel=0.1)
