import pytest
import torch

from dynamics.spectra import against_base
from dynamics.spectra.against_base import base_overlap, intruders, kept_by_rounding, leading_vectors
from dynamics.spectra.base_directions import decompose_base
from probes import LowRankMatrix


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(out: int, in_: int, rank: int, seed: int = 1, scale: float = 1.0) -> LowRankMatrix:
    return LowRankMatrix(gaussian(out, rank, seed=seed), gaussian(rank, in_, seed=seed + 1), scale)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (1, 4)])
def test_a_decomposition_gives_the_weight_back(shape):
    weight = gaussian(*shape)
    found = decompose_base(weight)
    torch.testing.assert_close((found.left * found.values) @ found.right.mT, weight, rtol=0, atol=1e-10)
    for vectors in (found.left, found.right):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"Expected a finite weight, got one with NaN or infinity\."):
        decompose_base(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_factored_and_dense_updates_have_the_same_numbers(rank):
    update, weight = low_rank(12, 9, rank), gaussian(12, 9, seed=7)
    base = decompose_base(weight)
    factored, dense = base_overlap(update, base, k=rank), base_overlap(update.to_dense(), base, k=rank)
    for name in ("left", "right", "energy_left", "energy_right", "left_null", "right_null"):
        assert getattr(factored, name) == pytest.approx(getattr(dense, name), abs=1e-9)


def test_overlap_is_that_of_the_explicit_projections():
    update, weight, k = low_rank(12, 9, 5).to_dense(), gaussian(12, 9, seed=7), 3
    u, _, vh = torch.linalg.svd(update)
    u0, _, vh0 = torch.linalg.svd(weight)
    found = base_overlap(update, decompose_base(weight), k)
    assert found.left == pytest.approx(float((u[:, :k].T @ u0[:, :k]).square().sum() / k))
    assert found.right == pytest.approx(float((vh[:k] @ vh0[:k].T).square().sum() / k))
    inside = u0[:, :k] @ u0[:, :k].T @ update
    assert found.energy_left == pytest.approx(float(inside.square().sum() / update.square().sum()))


def test_chance_is_the_mean_over_random_updates():
    base = decompose_base(gaussian(30, 20, seed=3))
    found = [base_overlap(low_rank(30, 20, 4, seed=10 * seed), base, k=4) for seed in range(200)]
    for name in ("left", "right"):
        values = torch.tensor([getattr(each, name) for each in found])
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - getattr(found[0], f"{name}_null")) < 4 * error


def test_the_same_subspace_overlaps_wholly():
    weight = gaussian(10, 8)
    found = base_overlap(weight, decompose_base(weight), k=3)
    assert (found.left, found.right) == (pytest.approx(1), pytest.approx(1))


def test_leading_vectors_of_factors_are_those_of_the_product():
    update = low_rank(12, 9, 4)
    left, right = leading_vectors(update, 2)
    u, _, vh = torch.linalg.svd(update.to_dense())
    assert (left.mT @ u[:, :2]).abs().diagonal().min() > 1 - 1e-9
    assert (right.mT @ vh[:2].T).abs().diagonal().min() > 1 - 1e-9


def spiked(size: float) -> tuple[torch.Tensor, LowRankMatrix]:
    """A base with a flat spectrum and an update of one strong direction between two of its vectors."""
    base = torch.diag(torch.linspace(1.0, 0.9, 40, dtype=torch.float64))
    direction = torch.ones(40, 1, dtype=torch.float64) / 40**0.5
    return base, LowRankMatrix(direction, direction.mT, size)


def test_an_intruder_is_found_with_its_energy():
    weight, update = spiked(5.0)
    found = intruders(update, weight, decompose_base(weight), k=4, draws=2)
    assert found.count >= 1
    assert found.energy_share > 0.8


def test_a_small_update_brings_none_and_neither_does_scaling():
    weight = torch.diag(torch.linspace(5.0, 1.0, 40, dtype=torch.float64))
    base = decompose_base(weight)
    for update in (low_rank(40, 40, 2, scale=1e-4), weight * 3):
        found = intruders(update, weight, base, k=4, draws=0)
        assert (found.count, found.energy_share) == (0, 0.0)


def test_a_random_update_has_as_many_intruders_as_chance():
    weight = gaussian(40, 30, seed=5)
    found = intruders(low_rank(40, 30, 3, seed=20), weight, decompose_base(weight), k=5, draws=20)
    assert abs(found.energy_share - found.null_energy_share) < 0.15


def test_an_update_of_nothing_has_no_energy_to_share():
    weight = gaussian(6, 5)
    found = base_overlap(LowRankMatrix(torch.zeros(6, 2), torch.ones(2, 5)), decompose_base(weight), k=2)
    assert torch.tensor([found.energy_left, found.energy_right]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1])
def test_what_merging_loses_is_that_of_the_merged_weight(dtype, scale):
    weight, update = gaussian(30, 20).to(dtype), low_rank(30, 20, 3, scale=scale)
    dense = update.to_dense()
    merged = (weight.double() + dense).to(dtype).double()
    for form in (update, dense):
        found = kept_by_rounding(form, weight, is_weight=False)
        assert found["changed_share"] == pytest.approx(float((merged != weight.double()).double().mean()))
        lost = (merged - weight.double() - dense).square().sum() / dense.square().sum()
        assert found["lost_in_merge"] == pytest.approx(float(lost))
        assert 0 <= found["lost_in_merge"] <= 1


def test_an_update_below_half_a_unit_is_lost_as_a_whole():
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    found = kept_by_rounding(torch.full((4, 4), 2.0**-10), weight, is_weight=False)
    assert found == {"changed_share": 0.0, "lost_in_merge": 1.0}


@pytest.mark.parametrize(("now", "before"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_a_change_of_format_is_no_change_of_the_weight(now, before):
    weight = gaussian(9, 7).to(getattr(torch, before))
    same = weight.to(getattr(torch, now))
    assert kept_by_rounding(same, weight, is_weight=True) == {"changed_share": 0.0}
    other = same.clone()
    other[0, 0] *= 2
    assert kept_by_rounding(other, weight, is_weight=True) == {"changed_share": pytest.approx(1 / 63)}


def test_of_a_large_matrix_evenly_spaced_rows_are_rounded(monkeypatch):
    weight, update = gaussian(400, 30).bfloat16(), low_rank(400, 30, 4, scale=1e-3)
    whole = kept_by_rounding(update, weight, is_weight=False)
    monkeypatch.setattr(against_base, "_ROUNDED", 3000)
    part = kept_by_rounding(update, weight, is_weight=False)
    assert part == kept_by_rounding(update.to_dense()[2::4], weight[2::4], is_weight=False)
    assert part["lost_in_merge"] == pytest.approx(whole["lost_in_merge"], rel=0.1)


def test_what_is_not_finite_has_no_such_numbers():
    assert kept_by_rounding(torch.full((2, 2), torch.nan), torch.ones(2, 2), is_weight=False) == {}
    assert kept_by_rounding(torch.ones(2, 2), torch.full((2, 2), torch.inf), is_weight=True) == {}
