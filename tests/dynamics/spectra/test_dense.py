import numpy as np
import pytest
import torch

from dynamics.spectra import dense, measures
from dynamics.spectra.dense import dense_spectrum, gram_matrix, gram_suffices


def planted(values: torch.Tensor, out: int, in_: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values between random orthonormal vectors."""
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(length, len(values), generator=generator, dtype=torch.float64) for length in (out, in_))
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return (left * values) @ right.mT


SPECTRA = {
    "flat": torch.ones(40, dtype=torch.float64),
    "linear": torch.linspace(2.0, 0.01, 40, dtype=torch.float64),
    "power": torch.arange(1, 41, dtype=torch.float64) ** -2,
    "pairs": torch.logspace(0, -2, 20, dtype=torch.float64).repeat_interleave(2),
}


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40)])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_gram_gives_planted_spectra(name, shape):
    spectrum = dense_spectrum(planted(SPECTRA[name], *shape))
    assert spectrum.method == "gram"
    torch.testing.assert_close(spectrum.values, SPECTRA[name], rtol=0, atol=1e-7 * float(SPECTRA[name][0]))


@pytest.mark.parametrize("smallest", [1e-9, 1e-12, 0.0])
def test_where_the_gram_loses_digits_the_svd_does_not(smallest):
    values = torch.cat([torch.linspace(1.0, 0.1, 39, dtype=torch.float64), torch.tensor([smallest]).double()])
    matrix = planted(values, 50, 60)
    spectrum = dense_spectrum(matrix)
    assert spectrum.method == "svd"
    torch.testing.assert_close(
        spectrum.values, torch.linalg.svdvals(matrix)[: len(spectrum.values)], rtol=0, atol=1e-11
    )


def test_a_storage_format_that_does_not_resolve_what_is_lost_is_content_with_the_gram():
    values = torch.cat([torch.linspace(1.0, 0.1, 39, dtype=torch.float64), torch.tensor([1e-9]).double()])
    matrix = planted(values, 40, 60)
    assert dense_spectrum(matrix, resolution=60 * torch.finfo(torch.float32).eps).method == "gram"
    assert dense_spectrum(matrix, resolution=60 * torch.finfo(torch.float64).eps).method == "svd"


@pytest.mark.parametrize("decay", [0.0, 0.02, 0.05, 0.1])
def test_where_the_gram_is_taken_every_measure_is_that_of_the_svd(decay):
    matrix = planted(torch.exp(-decay * torch.arange(120, dtype=torch.float64)), 120, 200)
    spectrum = dense_spectrum(matrix)
    exact = torch.linalg.svdvals(matrix)
    assert spectrum.method == "gram"
    for weights in ("energy", "amplitude"):
        found, expected = (measures.spectral_entropy(each, weights) for each in (spectrum.values, exact))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e-10, 1e10, 1e200])
def test_scale_only_scales(scale):
    matrix = planted(SPECTRA["linear"], 40, 60)
    torch.testing.assert_close(
        dense_spectrum(matrix * scale).values, dense_spectrum(matrix).values * scale, rtol=1e-9, atol=0
    )


def test_zero_is_measured_as_zero():
    spectrum = dense_spectrum(torch.zeros(3, 5))
    assert spectrum.method == "gram"
    assert spectrum.values.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_spectrum(broken):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = broken
    spectrum = dense_spectrum(matrix)
    assert spectrum.method == "failed"
    assert spectrum.values.isnan().all()
    assert len(spectrum.values) == 3


def test_no_convergence_is_flagged_and_never_made_up(monkeypatch):
    def refuse(*_):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)
    monkeypatch.setattr(torch.linalg, "svdvals", refuse)
    spectrum = dense_spectrum(torch.eye(3))
    assert (spectrum.method, spectrum.values.isnan().all().item()) == ("failed", True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (20, 30), (30, 20)])
def test_the_gram_is_the_product(shape):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = matrix if shape[0] <= shape[1] else matrix.mT
    found = gram_matrix(matrix)
    torch.testing.assert_close(found, wide @ wide.mT, rtol=1e-14, atol=1e-14)
    assert torch.equal(found, found.mT)


def test_a_matrix_that_is_a_view_is_not_misread():
    matrix = torch.randn(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for view in (matrix[::2, 1::3], matrix.mT, matrix.mT[::3]):
        torch.testing.assert_close(dense_spectrum(view).values, torch.linalg.svdvals(view), rtol=1e-12, atol=1e-12)


def test_bfloat16_is_read_exactly():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(3)).bfloat16()
    torch.testing.assert_close(
        dense_spectrum(matrix).values, torch.linalg.svdvals(matrix.double()), rtol=1e-12, atol=1e-12
    )


def test_gaussian_matrices_have_wisharts_purity():
    generator = torch.Generator().manual_seed(4)
    out, in_ = 40, 60
    draws = [dense_spectrum(torch.randn(out, in_, generator=generator)).values.numpy() for _ in range(200)]
    purity = np.array([(values**4).sum() / (values**2).sum() ** 2 for values in draws])
    expected = (out + in_ + 1) / (out * in_ + 2)
    assert abs(purity.mean() - expected) < 3 * purity.std() / np.sqrt(len(purity))


def test_sufficiency_is_a_matter_of_ratio_alone():
    values = torch.logspace(0, -4, 30, dtype=torch.float64)
    assert gram_suffices(values) == gram_suffices(values * 1e-30) == gram_suffices(values * 1e30)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_of_a_difference_give_the_spectrum_of_the_whole_and_leave_it_as_it_was(monkeypatch, shape, dtype):
    generator = torch.Generator().manual_seed(5)
    now, before = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    copies = now.clone(), before.clone()
    exact = torch.linalg.svdvals(now.double() - before.double())
    for size, tile in ((dense._BLOCK_BYTES, dense._TILE), (8 * 40 * 7, 40), (8 * 40 * 7, 9)):
        monkeypatch.setattr(dense, "_BLOCK_BYTES", size)
        monkeypatch.setattr(dense, "_TILE", tile)
        product = dense._size_and_gram(now, before)[1]
        assert torch.equal(product, product.mT)
        for method in ("gram", "svd"):
            values = dense_spectrum(now, minus=before, method=method).values
            torch.testing.assert_close(values, exact, rtol=1e-11, atol=1e-12)
    assert torch.equal(now, copies[0])
    assert torch.equal(before, copies[1])


@pytest.mark.parametrize("where", [0, 89])
def test_one_number_that_is_none_is_seen_in_any_block(monkeypatch, where):
    monkeypatch.setattr(dense, "_BLOCK_BYTES", 8 * 40 * 7)
    matrix = torch.ones(40, 90)
    matrix[3, where] = torch.nan
    assert dense_spectrum(matrix).method == "failed"
