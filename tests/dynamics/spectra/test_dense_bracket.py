import pytest
import torch

from dynamics.spectra import measures
from dynamics.spectra.dense import entropy_bracket, moments
from tests.dynamics.spectra.test_dense import planted

SPECTRA = {
    "power": torch.arange(1, 81, dtype=torch.float64) ** -1,
    "flat": torch.ones(80, dtype=torch.float64),
    "step": torch.cat([torch.full((5,), 10.0), torch.ones(75)]).double(),
    "geometric": torch.logspace(0, -8, 80, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_moments_are_those_of_the_whole_spectrum(name, shape):
    values, found = SPECTRA[name], moments(planted(SPECTRA[name], *shape))
    expected = measures.participation_ratio(values), values[0], measures.stable_rank(values), values.square().sum()
    numbers = found.participation_ratio, found.spectral_norm, found.stable_rank, found.energy
    torch.testing.assert_close(torch.tensor(numbers, dtype=torch.float64), torch.stack(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("matrix", [torch.zeros(4, 5), torch.full((4, 5), torch.nan)])
def test_without_a_spectrum_there_are_no_moments(matrix):
    found = moments(matrix)
    assert torch.tensor([found.participation_ratio, found.stable_rank]).isnan().all()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("directions", [1, 4, 16, 80, 200])
@pytest.mark.parametrize("iterations", [0, 4])
def test_the_entropy_lies_in_the_bracket(name, directions, iterations):
    values = SPECTRA[name]
    entropy = float(measures.spectral_entropy(values))
    for seed in range(5):
        found = entropy_bracket(planted(values, 80, 120, seed), directions, iterations=iterations, seed=seed)
        assert found.entropy_low - 1e-9 <= entropy <= found.entropy_high + 1e-9
        assert (found.values <= values[: len(found.values)] * (1 + 1e-9)).all()


def test_the_bracket_closes_as_the_rest_vanishes():
    matrix = planted(SPECTRA["geometric"], 80, 120)
    widths = [(b := entropy_bracket(matrix, k)).entropy_high - b.entropy_low for k in (2, 8, 32)]
    assert widths[0] > 5 * widths[1] > 25 * widths[2]
    assert widths[2] < 1e-4


def test_the_same_seed_gives_the_same_numbers_and_leaves_torchs_own_alone():
    matrix, state = planted(SPECTRA["power"], 80, 120), torch.get_rng_state()
    first, second = entropy_bracket(matrix, 8), entropy_bracket(matrix, 8)
    assert torch.equal(first.values, second.values)
    assert first.entropy_low == second.entropy_low
    assert torch.equal(torch.get_rng_state(), state)


def test_no_direction_is_refused():
    with pytest.raises(ValueError, match=r"Expected at least 1 direction, got 0\."):
        entropy_bracket(torch.eye(3), 0)
