"""Leading eigenpairs are those of the whole decomposition, whatever the spectrum; what is not found is not made up."""

import pytest
import torch

from dynamics.spectra import lanczos
from dynamics.spectra.lanczos import RESIDUAL, leading_eigenpairs

COUNT = 400
_INDEX = torch.arange(1, COUNT + 1, dtype=torch.float64)
SPECTRA = {
    "power": 1 / _INDEX,
    "linear": 2 - _INDEX / COUNT,
    "geometric": 0.9**_INDEX,
    "far apart": 10.0 ** -_INDEX.clamp_max(300),
    "one value": torch.ones(COUNT, dtype=torch.float64),
    "more copies than a block has columns": torch.where(_INDEX <= 45, 1.0, 0.01).double(),
    "pairs": 1 / ((_INDEX + 1) // 2),
    "rank 3": torch.where(_INDEX <= 3, 4 - _INDEX, 0.0),
}


def rotated(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    product = (basis * values) @ basis.mT
    return (product + product.mT) / 2


@pytest.mark.parametrize("k", [1, 10, 50])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_pairs_are_those_of_the_whole_decomposition(name, k):
    product = rotated(SPECTRA[name])
    expected = torch.linalg.eigvalsh(product).flip(-1)[:k]
    found = leading_eigenpairs(product, k)
    assert found is not None
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-13 * float(expected[0]))
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    residual = torch.linalg.matrix_norm(product @ found.vectors - found.vectors * found.values)
    assert float(residual) == pytest.approx(found.residual, rel=1e-3, abs=1e-13)
    assert found.residual <= RESIDUAL * float(found.values.norm()) + 1e-12 * float(expected[0])


def test_vectors_span_what_the_whole_decomposition_spans():
    product = rotated(SPECTRA["geometric"])
    found = leading_eigenpairs(product, 10)
    vectors = torch.linalg.eigh(product).eigenvectors.flip(-1)[:, :10]
    assert float((found.vectors.mT @ vectors).abs().diagonal().min()) > 1 - 1e-6


def test_the_largest_directions_need_not_be_in_the_random_block():
    product = torch.diag(torch.cat([torch.full((1,), 2.0), torch.ones(COUNT - 1)]).double())
    assert leading_eigenpairs(product, 1).values.item() == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(("count", "k"), [(400, 51), (40, 1)])
def test_where_a_decomposition_costs_no_more_there_is_nothing(count, k):
    assert leading_eigenpairs(torch.eye(count, dtype=torch.float64), k) is None


def test_what_does_not_converge_is_not_returned(monkeypatch):
    product = rotated(SPECTRA["linear"])
    assert leading_eigenpairs(product, 10) is not None
    monkeypatch.setattr(lanczos, "_PRODUCTS", (160, 0.0))
    assert leading_eigenpairs(product, 10) is None


def test_the_same_seed_gives_the_same_numbers_and_leaves_torchs_own_alone():
    product, state = rotated(SPECTRA["power"]), torch.get_rng_state()
    first, second = leading_eigenpairs(product, 8), leading_eigenpairs(product, 8)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)
