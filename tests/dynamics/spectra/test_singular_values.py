import re

import pytest
import torch

from dynamics import singular_values
from dynamics.spectra import increments
from dynamics.spectra import singular_values as module
from probes import LowRankMatrix
from tests import properties
from tests.matrices import SCALES, SHAPES, SPECTRA, planted, random_lora
from tests.reference import dense_singular_values

LORAS = {
    f"{shape} {dtype}": random_lora(*SHAPES[shape], rank=5, seed=3, dtype=dtype)
    for shape in SHAPES
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def values_by_gram(matrix: LowRankMatrix) -> torch.Tensor:
    return module.core_singular_values(increments.cores(increments.stack([matrix], None), fast=True).total())[0]


each_lora = pytest.mark.parametrize("matrix", LORAS.values(), ids=LORAS.keys())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_planted_spectra_come_back(spectrum, scale, shape):
    expected = scale * torch.tensor(SPECTRA[spectrum], dtype=torch.float64)
    matrix = planted(SPECTRA[spectrum], *SHAPES[shape])
    values = singular_values(LowRankMatrix(matrix.left_factor, matrix.right_factor, scale))
    assert values.dtype == torch.float64
    assert (values - expected).abs().max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_dense_matrices_agree_with_their_factors(spectrum):
    matrix = planted(SPECTRA[spectrum], 30, 20)
    properties.assert_same_spectrum(matrix, matrix.to_dense())


@each_lora
def test_equal_to_the_explicit_product(matrix):
    expected = dense_singular_values(matrix)[: matrix.rank]
    assert (singular_values(matrix) - expected).abs().max() <= 1e-12 * expected[0]


@each_lora
def test_rotation_invariant(matrix):
    properties.assert_rotation_invariant(matrix)


@each_lora
def test_transpose_invariant(matrix):
    properties.assert_transpose_invariant(matrix)


@each_lora
def test_zero_padding_invariant(matrix):
    properties.assert_zero_padding_invariant(matrix)


@each_lora
def test_gauge_invariant(matrix):
    properties.assert_gauge_invariant(matrix)


def test_small_singular_values_survive_where_a_gram_matrix_loses_them():
    spectrum = SPECTRA["twelve decades"]
    values = singular_values(planted(spectrum, 60, 50))
    torch.testing.assert_close(values, torch.tensor(spectrum, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_list_keeps_its_order_over_shapes_and_kinds():
    matrices = [random_lora(9, 7, 2, 0), torch.eye(3), random_lora(5, 6, 2, 1), random_lora(9, 7, 2, 2)]
    together = singular_values(matrices)
    assert [len(values) for values in together] == [2, 3, 2, 2]
    for matrix, values in zip(matrices, together, strict=True):
        torch.testing.assert_close(values, singular_values(matrix), rtol=1e-13, atol=0)


def test_rank_above_the_dimensions():
    matrix = random_lora(4, 6, rank=9, seed=0)
    assert singular_values(matrix).shape == (4,)
    properties.assert_same_spectrum(matrix, matrix.to_dense())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_factor_gives_nan_and_spares_its_neighbours(bad):
    broken, sound = random_lora(8, 6, 2, 0), random_lora(8, 6, 2, 1)
    broken.left_factor[3, 1] = bad
    first, second = singular_values([broken, sound])
    assert first.isnan().all()
    assert second.isfinite().all()


def test_a_core_that_does_not_converge_costs_only_itself(monkeypatch):
    original = torch.linalg.svdvals

    def stubborn(cores):
        if cores.ndim == 3 or cores[0, 0] == 7:
            raise torch.linalg.LinAlgError("did not converge")
        return original(cores)

    monkeypatch.setattr(torch.linalg, "svdvals", stubborn)
    values = module.core_singular_values(torch.diag_embed(torch.tensor([[1.0, 2.0], [7.0, 1.0]]).double()))
    assert values[0].tolist() == [2.0, 1.0]
    assert values[1].isnan().all()


def test_zero_is_zero():
    assert singular_values(LowRankMatrix(torch.zeros(5, 2), torch.ones(2, 4))).tolist() == [0.0, 0.0]


def test_gradients_are_not_recorded():
    left = torch.nn.Parameter(torch.ones(3, 1))
    assert not singular_values(LowRankMatrix(left, torch.ones(1, 2))).requires_grad


def test_a_complex_matrix_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected a real matrix, got one of dtype torch.complex64.")):
        singular_values(torch.eye(2, dtype=torch.complex64))


def test_a_tensor_that_is_not_a_matrix_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("Expected a matrix of shape (out, in), got a tensor of shape (2, 2, 2).")
    ):
        singular_values(torch.ones(2, 2, 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_grams_of_factors_give_the_spectra_of_their_qr_decompositions(spectrum, scale, shape):
    matrix = planted(SPECTRA[spectrum], *SHAPES[shape])
    matrix = LowRankMatrix(matrix.left_factor, matrix.right_factor, scale)
    values, expected = values_by_gram(matrix), singular_values(matrix)
    assert (values - expected).abs().max() <= 1e-11 * expected[0]


TALL = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COLUMNS = {
    "independent": (TALL, True),
    "of very different size": (TALL * torch.tensor([1e8, 1.0, 1e-8, 1e-20], dtype=torch.float64), True),
    "one is zero": (TALL * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64), True),
    "two are equal": (TALL[:, [0, 1, 2, 1]], False),
    "two nearly are": (torch.cat([TALL[:, :3], TALL[:, :1] + 1e-3 * TALL[:, 3:]], 1), False),
    "squares vanish": (TALL * torch.tensor([1.0, 1.0, 1e-180, 1.0], dtype=torch.float64), False),
    "squares overflow": (TALL * 1e180, False),
    "more than rows": (TALL[:3], False),
}


@pytest.mark.parametrize("shape", [(2, 30), (30, 2), (3, 2), (8, 8)])
def test_factors_wider_than_the_matrix_have_no_more_values_than_it(shape):
    matrix = random_lora(*shape, rank=12, seed=0)
    slow, fast = singular_values(matrix), values_by_gram(matrix)
    assert len(fast) == min(shape)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_gram_is_taken_only_where_it_holds_the_columns(columns):
    tall, held = COLUMNS[columns]
    triangles, by_gram = module.gram_triangle(torch.stack([TALL[: len(tall)], tall]))
    assert by_gram.tolist() == [len(tall) > 3, held]
    size = tall.abs().amax(0)
    unit, triangle = (side / torch.where(size > 0, size, 1.0) for side in (tall, triangles[1]))
    torch.testing.assert_close(triangle.mT @ triangle, unit.mT @ unit, rtol=1e-13, atol=1e-13)


def test_columns_that_are_not_finite_have_no_triangle():
    triangles, by_gram = module.gram_triangle(torch.stack([TALL, torch.full_like(TALL, torch.nan)]))
    assert by_gram.tolist() == [True, False]
    assert triangles[0].isfinite().all()
    assert not triangles[1].isfinite().all()
