"""Leading directions, and which directions resemble none, are those of the whole decomposition."""

import pytest
import torch

from dynamics.spectra import base_directions
from dynamics.spectra.against_base import intruders
from dynamics.spectra.base_directions import (
    LeadingDecomposition,
    decompose_base,
    decompose_leading,
    leading_left,
)
from dynamics.spectra.dense import gram_matrix
from probes import LowRankMatrix
from tests.dynamics.spectra.test_dense import planted

SHAPES = [(160, 240), (200, 200), (240, 160)]
_INDEX = torch.arange(1, 161, dtype=torch.float64)
SPECTRA = {"power": _INDEX**-0.5, "linear": 2 - _INDEX / 160, "spiked": torch.where(_INDEX < 4, 10 - _INDEX, 1.0)}


def refuse():
    raise AssertionError("the leading directions suffice")


def mixed(left: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The even mixture of some singular vectors, of which each has the cosine 1/√count."""
    return left[:, first : first + count].sum(1) / count**0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_vectors_are_those_of_the_whole_decomposition(shape):
    weight = planted(SPECTRA["power"], *shape)
    whole, leading = decompose_base(weight), decompose_leading(weight, 6, refuse)
    assert isinstance(leading, LeadingDecomposition)
    torch.testing.assert_close(leading.values, whole.values[:6], rtol=1e-12, atol=0)
    for found, expected in ((leading.left, whole.left), (leading.right, whole.right)):
        assert float((found.mT @ expected[:, :6]).abs().diagonal().min()) > 1 - 1e-11
    squares, left = leading_left(weight, gram_matrix(weight), torch.zeros(shape), 6)
    torch.testing.assert_close(squares, whole.values[:6].square(), rtol=1e-12, atol=0)
    assert float((left.mT @ whole.left[:, :6]).abs().diagonal().min()) > 1 - 1e-11


@pytest.mark.parametrize("weight", [torch.eye(100), torch.eye(20), torch.diag(0.5 ** torch.arange(100.0))])
def test_clusters_small_matrices_and_steep_spectra_are_decomposed_whole(weight):
    leading = decompose_leading(weight, 10)
    whole = decompose_base(weight)
    torch.testing.assert_close(leading.values[:10], whole.values[:10])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_strange_is_what_the_whole_decomposition_calls_so(shape, name):
    weight = planted(SPECTRA[name], *shape)
    whole = decompose_base(weight)
    leading = decompose_leading(weight, 6)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(shape[0], 12, generator=generator, dtype=torch.float64)
    columns = [mixed(whole.left, first, count) for first in (0, 4, 30, 100, 150) for count in (1, 2, 3, 5, 9)]
    columns += [*noise.T, *(0.2 * noise + whole.left[:, 50:51]).T, *(whole.left[:, :12] + whole.left[:, 90:91]).T]
    directions = torch.stack(columns, 1)
    directions = directions / directions.norm(dim=0)
    expected = whole.strange(directions, 0.5)
    assert 10 < int(expected.sum()) < len(columns) - 10
    assert torch.equal(leading.strange(directions, 0.5), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_of_random_directions_no_vector_is_computed(shape):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(shape[0], 10, generator=generator, dtype=torch.float64)).Q
    leading = decompose_leading(weight, 6, refuse)
    assert bool(leading.strange(directions, 0.5).all())


@pytest.mark.parametrize("seed", range(10))
def test_no_eigenvector_holds_more_than_the_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = planted(SPECTRA["linear"], 160, 240, seed)
    whole = decompose_base(weight)
    parts = torch.randn(160, 20, generator=generator, dtype=torch.float64) ** (1 + 2 * (seed % 4))
    parts[:6] = 0
    starts = whole.left @ (parts / parts.norm(dim=0) * 0.9)
    bound = base_directions._largest_atoms(
        lambda x: weight @ (weight.mT @ x), whole.left[:, :6], starts, float(whole.values[5]) ** 2, 0.01
    )
    assert ((whole.left.mT @ starts).square().amax(0) <= bound / base_directions._MARGIN).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.3, 3.0, 30.0])
def test_intruders_are_those_of_the_whole_decomposition(shape, size):
    generator = torch.Generator().manual_seed(3)
    weight = planted(SPECTRA["power"], *shape)
    left, right = (torch.randn(side, 3, generator=generator, dtype=torch.float64) for side in shape)
    update = LowRankMatrix(left, right.mT, size / (shape[0] * shape[1]) ** 0.5)
    found, expected = (
        intruders(update, weight, base, k=6, draws=3) for base in (decompose_leading(weight, 6), decompose_base(weight))
    )
    assert found.count == expected.count
    assert found.null_count == expected.null_count
    assert found.energy_share == pytest.approx(expected.energy_share, abs=1e-9)
    assert (found.count > 0) == (size > 1)
