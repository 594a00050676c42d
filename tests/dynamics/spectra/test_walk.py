"""One step of a batch: dense and factored matrices, the step before, and how matrices are grouped."""

import math

import pytest
import torch
from torch import Tensor

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import rounding, walk
from dynamics.spectra.measures import spectral_entropy
from dynamics.spectra.walk import Previous, batches, solve_batch
from probes.low_rank import LowRankMatrix
from tests.matrices import moved, random_lora


def low_rank(seed: int, rank: int = 3) -> LowRankMatrix:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(8, rank, generator=generator), torch.randn(rank, 6, generator=generator)
    return LowRankMatrix(left, right, 0.5)


def dense(seed: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def svd(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


def test_factored_matrices_have_the_spectra_of_what_they_multiply_out_to():
    now, before, start = ([low_rank(seed + part) for part in range(2)] for seed in (0, 10, 20))
    results = solve_batch(now, Previous.of_factors(before, [None, None], None), start)
    for result, one, other, first in zip(results, now, before, start, strict=True):
        total, increment = svd(one.to_dense() - first.to_dense()), svd(one.to_dense() - other.to_dense())
        torch.testing.assert_close(result.spectra.total, total, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.spectra.increment, increment, rtol=0, atol=1e-12)
        assert result.spectra.ranks == (6, 6)


def test_dense_matrices_in_one_batch_are_each_solved():
    now, before, start = ([dense(seed + part) for part in range(2)] for seed in (0, 10, 20))
    for number, result in enumerate(solve_batch(now, Previous(before), start)):
        torch.testing.assert_close(result.spectra.total, svd(now[number].double() - start[number].double()))
        torch.testing.assert_close(result.spectra.increment, svd(now[number].double() - before[number].double()))
        assert result.cores is None


def test_a_dense_weight_without_its_start_has_no_total():
    (result,) = solve_batch([dense(0)], Previous([dense(1)]))
    assert (len(result.spectra.total), result.spectra.found_by[0]) == (0, "none")
    assert result.spectra.increment is not None


def test_the_first_increment_since_the_start_is_the_total_and_is_solved_once(monkeypatch):
    solved, spectrum = [], walk.dense_spectrum
    monkeypatch.setattr(walk, "dense_spectrum", lambda *ends, **wanted: solved.append(1) or spectrum(*ends, **wanted))
    start = dense(1)
    (result,) = solve_batch([dense(0)], Previous([start]), [start])
    assert len(solved) == 1
    torch.testing.assert_close(result.spectra.increment, result.spectra.total, rtol=0, atol=0)


def test_three_steps_have_the_inner_product_of_their_increments():
    steps = [low_rank(seed) for seed in range(3)]
    first = solve_batch([steps[1]], Previous.of_factors([steps[0]], [None], None))
    previous = Previous.of_factors([steps[1]], first, lambda: [steps[0]])
    (result,) = solve_batch([steps[2]], previous)
    changes = [steps[i + 1].to_dense() - steps[i].to_dense() for i in range(2)]
    assert result.spectra.inner_product == pytest.approx(float((changes[0] * changes[1]).sum()), rel=1e-10)


def test_without_the_step_before_the_last_there_is_no_inner_product():
    def read() -> list[LowRankMatrix]:
        raise AssertionError("nothing to read: the last step has no triangular factors")

    alone = solve_batch([low_rank(1)])
    previous = Previous.of_factors([low_rank(1)], alone, read)
    (result,) = solve_batch([low_rank(2)], previous)
    assert math.isnan(result.spectra.inner_product)
    assert (previous.cores, previous.earlier) == (None, None)


def test_the_rounding_of_a_step_that_was_not_solved_is_computed():
    matrix = low_rank(0)
    solved = solve_batch([matrix])
    for results in (solved, [None]):
        (noise,) = Previous.of_factors([matrix], results, None).noise
        assert noise == pytest.approx(rounding.product_noise_energy(matrix), rel=1e-12)


def test_a_rank_that_changes_keeps_no_triangular_factors():
    (result,) = solve_batch([low_rank(0, rank=4)], Previous.of_factors([low_rank(1, rank=2)], [None], None))
    assert result.cores is None
    assert result.spectra.ranks == (4, 6)


def test_weights_that_are_not_finite_are_named_so():
    broken = LowRankMatrix(torch.full((8, 3), torch.nan), torch.ones(3, 6), 1.0)
    finite = [result.is_finite for result in solve_batch([low_rank(0), broken])]
    assert finite == [True, False]


def test_a_batch_holds_one_shape_one_device_and_one_kind(monkeypatch):
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": 2 * 16 * 2 * 20})
    small, wide, weight = (MatrixShape(10, 10, 2, "F32"), MatrixShape(10, 30, 2, "F32"), MatrixShape(10, 10, 0, "F32"))
    shapes = {**dict.fromkeys("abcd", small), "e": wide, **dict.fromkeys("fg", weight)}
    devices = {"d": torch.device("meta")}
    groups = batches(shapes, lambda name: devices.get(name, torch.device("cpu")), lambda name: name == "c")
    assert sorted(groups) == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]
    assert batches(dict.fromkeys("abc", small), lambda name: torch.device("cpu"), lambda name: 0) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("relative", [1.0, 1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("from_start", [False, True])
def test_grams_give_what_qr_decompositions_give(relative, from_start):
    before = [random_lora(60, 40, 4, seed=seed, dtype=torch.float64) for seed in range(3)]
    now = [moved(matrix, relative, seed=10 + seed) for seed, matrix in enumerate(before)]
    start = [random_lora(60, 40, 4, seed=9, dtype=torch.float64)] * 3 if from_start else None
    previous = Previous.of_factors(before, [None] * 3, None)
    solved, exact = (solve_batch(now, previous, start, fast=fast) for fast in (True, False))
    for one, twin in zip(solved, exact, strict=True):
        assert (one.spectra.found_by, twin.spectra.found_by) == (("gram_core",) * 2, ("qr_core",) * 2)
        for kind in ("total", "increment"):
            values, expected = getattr(one.spectra, kind), getattr(twin.spectra, kind)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-11 * float(expected[0]))
            torch.testing.assert_close(spectral_entropy(values), spectral_entropy(expected), rtol=0, atol=1e-12)
        assert one.noise == pytest.approx(twin.noise, rel=1e-11)


def test_where_columns_are_dependent_the_route_is_a_qr_decomposition():
    dependent = LowRankMatrix(torch.ones(8, 2), torch.randn(2, 6), 0.5)
    routes = [result.spectra.found_by[0] for result in solve_batch([low_rank(0, 2), dependent], fast=True)]
    assert routes == ["gram_core", "qr_core"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_of_a_batch_is_that_of_each_matrix(dtype):
    matrices = [random_lora(30, 20, 3, seed=seed, dtype=dtype) for seed in range(2)]
    mixed = LowRankMatrix(matrices[0].left_factor, matrices[0].right_factor.double(), 0.5)
    for batch in (matrices, [*matrices, mixed]):
        predicted = [rounding.product_noise_energy(matrix) for matrix in batch]
        assert [result.noise for result in solve_batch(batch)] == pytest.approx(predicted, rel=1e-11)
