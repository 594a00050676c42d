import re

import numpy as np
import pytest
import torch

from dynamics.spectra.path import path_gram, path_shape
from probes import LowRankMatrix


def low_rank(seed: int, rank: int = 3) -> LowRankMatrix:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((12, rank), (rank, 7)))
    return LowRankMatrix(left, right, scale=0.5 + seed)


def test_factored_updates_have_the_inner_products_of_the_dense_ones():
    updates = [low_rank(0), low_rank(1, rank=1), low_rank(2, rank=5)]
    dense = torch.stack([update.to_dense().flatten() for update in updates])
    np.testing.assert_allclose(path_gram(updates), (dense @ dense.T).numpy(), rtol=1e-12)
    np.testing.assert_allclose(path_gram([update.to_dense() for update in updates]), path_gram(updates), rtol=1e-12)


def test_a_gauge_change_changes_nothing():
    updates = [low_rank(seed) for seed in range(3)]
    change = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    turned = [
        LowRankMatrix(each.left_factor.double() @ change, torch.linalg.solve(change, each.right), each.scale)
        for each in updates
    ]
    np.testing.assert_allclose(path_gram(turned), path_gram(updates), rtol=1e-10)


@pytest.mark.parametrize(
    ("updates", "what"),
    [
        ([torch.ones(2, 3), torch.ones(3, 2)], "of shapes [(2, 3), (3, 2)]"),
        ([LowRankMatrix(torch.ones(2, 1), torch.ones(1, 3)), torch.ones(2, 3)], "some factored and some not"),
    ],
)
def test_updates_of_different_matrices_are_refused(updates, what):
    message = f"Expected updates of one matrix, all factored or all dense, got updates {what}."
    with pytest.raises(ValueError, match=re.escape(message)):
        path_gram(updates)


def test_the_shape_of_a_path_is_that_of_its_points():
    points = np.random.default_rng(0).standard_normal((6, 40)).cumsum(0)
    shape = path_shape(points @ points.T)
    lengths = np.linalg.norm(np.diff(points, axis=0, prepend=0), axis=1).cumsum()
    np.testing.assert_allclose(shape.length, lengths, rtol=1e-10)
    np.testing.assert_allclose(shape.distance, np.linalg.norm(points, axis=1), rtol=1e-12)
    np.testing.assert_allclose(shape.straightness, shape.distance / lengths, rtol=1e-10)
    energies = np.linalg.svd(points, compute_uv=False) ** 2
    np.testing.assert_allclose(shape.component_share, energies / energies.sum(), rtol=1e-9)
    np.testing.assert_allclose(shape.participation_ratio, energies.sum() ** 2 / (energies**2).sum(), rtol=1e-9)


def test_a_straight_line_is_one_direction():
    points = np.outer([1.0, 2.0, 5.0], [3.0, 4.0])
    shape = path_shape(points @ points.T)
    np.testing.assert_allclose(shape.straightness, 1.0, rtol=1e-9)
    assert shape.participation_ratio == pytest.approx(1.0)


def test_what_has_not_moved_has_no_shape():
    shape = path_shape(np.zeros((3, 3)))
    assert shape.length.tolist() == [0, 0, 0]
    assert np.isnan([*shape.straightness_null, *shape.component_share_null, shape.participation_ratio_null]).all()
    assert np.isnan([*shape.straightness, *shape.component_share, shape.participation_ratio]).all()


def test_a_broken_update_breaks_the_shape():
    shape = path_shape(np.array([[1.0, np.nan], [np.nan, 1.0]]))
    assert np.isnan([*shape.distance, *shape.component_share, shape.participation_ratio]).all()
    assert np.isnan([*shape.straightness_null, *shape.component_share_null, shape.participation_ratio_null]).all()


@pytest.mark.parametrize("lengths", [np.ones(12), np.geomspace(1.0, 0.01, 12)])
def test_a_simulated_walk_has_the_shape_of_its_null(lengths):
    steps = np.random.default_rng(0).standard_normal((12, 20_000))
    points = (lengths[:, None] * steps / np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0)
    shape = path_shape(points @ points.T)
    np.testing.assert_allclose(shape.straightness, shape.straightness_null, rtol=0.03)
    np.testing.assert_allclose(shape.component_share[:3], shape.component_share_null[:3], rtol=0.05)
    assert shape.participation_ratio == pytest.approx(shape.participation_ratio_null, rel=0.03)


def test_a_line_is_more_than_its_null():
    shape = path_shape(np.outer(np.arange(1.0, 9.0), np.arange(1.0, 9.0)))
    np.testing.assert_allclose(shape.straightness_null, 1 / np.sqrt(np.arange(1, 9)), rtol=1e-9)
    assert shape.component_share[0] == pytest.approx(1.0)
    assert shape.component_share_null[0] < 0.85


def test_of_2000_equal_steps_a_walk_has_81_percent_in_one_direction():
    shape = path_shape(np.minimum.outer(np.arange(1.0, 2001.0), np.arange(1.0, 2001.0)))
    assert shape.component_share[0] == pytest.approx(8 / np.pi**2, abs=1e-3)
    np.testing.assert_allclose(shape.component_share, shape.component_share_null, atol=1e-12)
    assert shape.straightness_null[-1] == pytest.approx(2000**-0.5)
