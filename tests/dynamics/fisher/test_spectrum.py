import numpy as np
import pytest

from dynamics.fisher.samples import SampleGroups
from dynamics.fisher.spectrum import (
    centred,
    centred_eigenvalues,
    eigenvalue_errors,
    fisher_eigenvalues,
    fisher_eigenvectors,
    inverse_roots,
    leading_eigenvectors,
    shares_by_group,
)
from tests.dynamics.fisher.simulated import gradients, grams, planted, power_law


def test_eigenvalues_are_those_of_the_explicit_fisher():
    rows = gradients(np.random.default_rng(0), 3, 6, power_law(9))
    for data, found in zip(rows, fisher_eigenvalues(grams(rows)), strict=True):
        explicit = np.linalg.eigvalsh(data.T @ data / len(data))[::-1][: len(data)]
        np.testing.assert_allclose(found, explicit, rtol=1e-10)


def test_centred_eigenvalues_are_those_of_the_fisher_less_the_mean():
    (data,) = gradients(np.random.default_rng(0), 1, 6, power_law(9), mean=2.0)
    mean = data.mean(0)
    explicit = np.linalg.eigvalsh(data.T @ data / len(data) - np.outer(mean, mean))[::-1][: len(data)]
    found = fisher_eigenvalues(centred(grams(data)[None]))[0]
    np.testing.assert_allclose(found, explicit, atol=1e-12)


def test_eigenvectors_give_unit_directions():
    (data,) = gradients(np.random.default_rng(1), 1, 5, power_law(8))
    values, vectors = fisher_eigenvectors(grams(data)[None])
    directions = data.T @ vectors[0] * inverse_roots(values * 5)[0]
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-10)


def test_directions_beyond_the_rank_are_left_out():
    data = planted(np.array([2.0, 1.0]), samples=5, directions=4)
    values, _ = fisher_eigenvectors(grams(data)[None])
    assert (inverse_roots(values)[0, 2:] == 0).all()
    assert (values >= 0).all()


def test_standard_errors_are_those_of_repeated_data():
    rows = gradients(np.random.default_rng(2), 600, 64, np.array([8.0, 3.0, 1.0]), per_group=2, correlation=0.5)
    labels = SampleGroups.of_one_task(np.arange(64) // 2)
    values, vectors = fisher_eigenvectors(grams(rows))
    errors = eigenvalue_errors(values, shares_by_group(vectors, labels), labels.membership.mean(0))
    spread = np.log(values[:, :2]).std(0)
    np.testing.assert_allclose(errors[:, :2].mean(0), spread, rtol=0.15)
    assert np.isnan(errors[:, 3:]).all()  # of zeros


def test_shares_of_groups_are_sums_of_squares():
    group = np.array([0, 2, 2, 5, 0])
    vectors = np.random.default_rng(3).standard_normal((2, 5, 5))
    slow = np.stack([(vectors[:, group == code] ** 2).sum(1) for code in (0, 2, 5)], axis=1)
    np.testing.assert_allclose(shares_by_group(vectors, SampleGroups.of_one_task(group)), slow, rtol=1e-14)


def centring_cases():
    """K of many kinds: means of any size, repeated eigenvalues and samples, no rank to spare, any scale."""
    rng = np.random.default_rng(4)
    mean = gradients(rng, 1, 1, power_law(80))
    rows = gradients(rng, 2, 40, power_law(80))
    without = rows - rows.mean(1, keepdims=True)
    kinds = [rows, rows + mean, rows + 100 * mean, without, rows[:, :, :7], rows[:, :, :1], np.repeat(rows, 2, axis=1)]
    kinds += [gradients(rng, 2, 40, power_law(80, 4.0)), 1e-10 * rows, 1e10 * rows, rows[:, :2], rows[:, :1]]
    kinds += [np.ones((1, 5, 1)), np.eye(5)[None], np.diag([3.0, 3.0, 1.0, 1.0, 1.0])[None], np.zeros((1, 4, 4))]
    return [grams(kind) for kind in kinds]


@pytest.mark.parametrize("gram", centring_cases())
def test_centred_eigenvalues_are_those_of_the_centred_gram(gram):
    values, vectors = fisher_eigenvectors(gram)
    found, slow = centred_eigenvalues(values, vectors), fisher_eigenvalues(centred(gram))
    np.testing.assert_allclose(found, slow, rtol=0, atol=1e-13 * values.max())


def test_centred_eigenvalues_of_a_broken_block_are_missing():
    gram = np.stack([np.full((3, 3), np.nan), np.diag([3.0, 2.0, 1.0])])
    found = centred_eigenvalues(*fisher_eigenvectors(gram))
    assert np.isnan(found[0, :2]).all()
    np.testing.assert_allclose(found[1], fisher_eigenvalues(centred(gram[1:]))[0], atol=1e-14)


def test_leading_eigenvectors_are_the_first_of_all():
    gram = grams(gradients(np.random.default_rng(5), 3, 40, power_law(60)))
    gram[1] = np.nan
    values, vectors = fisher_eigenvectors(gram)
    leading, directions = leading_eigenvectors(gram, 4)
    np.testing.assert_allclose(leading, values[:, :4], rtol=1e-12)
    aligned = directions * np.sign((directions * vectors[:, :, :4]).sum(1, keepdims=True))
    np.testing.assert_allclose(aligned, vectors[:, :, :4], atol=1e-11)


def test_one_group_has_no_standard_error():
    assert np.isnan(eigenvalue_errors(np.ones((1, 3)), np.ones((1, 1, 3)), np.ones(1))).all()


def test_nan_stays_in_its_block():
    found = fisher_eigenvalues(np.stack([np.full((2, 2), np.nan), np.eye(2)]))
    assert np.isnan(found[0]).all()
    assert found[1].tolist() == [0.5, 0.5]


def test_what_is_not_positive_semi_definite_is_refused():
    with pytest.raises(ValueError, match="Expected a positive semi-definite K = GGᵀ"):
        fisher_eigenvalues(np.array([[[1.0, 2.0], [2.0, 1.0]]]))
