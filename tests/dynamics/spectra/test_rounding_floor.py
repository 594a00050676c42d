"""What stands above the rounding of its storage: planted directions survive, noise does not."""

import numpy as np
import pytest
import torch

from dynamics.spectra.rounding import NoiseProfile, above_rounding, noise_profile


def above(values, profile, out, in_):
    numbers = above_rounding(
        np.asarray(values)[None, None, None],
        np.full((1, 1, 1), profile.edge),
        np.full((1, 1, 1), profile.energy),
        np.array([float(min(out, in_))]),
    )
    return {name: array.item() for name, array in numbers.items()}


def even(variance, out, in_):
    """The profile of noise of one variance everywhere."""
    return NoiseProfile(torch.full((out,), variance * in_).double(), torch.full((in_,), variance * out).double())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def effective_rank(values):
    share = values**2 / (values**2).sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def test_noise_alone_lies_below_its_edge():
    noise = 0.01 * gaussian(200, 300)
    numbers = above(torch.linalg.svdvals(noise).numpy(), even(1e-4, 200, 300), 200, 300)
    assert numbers["rank_above_rounding"] <= 1  # the edge is that of infinite matrices
    assert numbers["rounding_edge"] == pytest.approx(0.01 * (200**0.5 + 300**0.5))


def weights(kind, out=384, in_=512):
    """Weights whose rows or columns differ in scale, as those of pretrained models do."""
    base = 0.02 * gaussian(out, in_, seed=1)
    if kind == "rows":
        return base * (0.3 * gaussian(out, 1, seed=2)).exp()
    if kind == "wild rows":
        return base * gaussian(out, 1, seed=2).exp()
    if kind == "outlier columns":
        base[:, :6] *= 10
    return base


@pytest.mark.parametrize("kind", ["even", "rows", "wild rows", "outlier columns"])
@pytest.mark.parametrize("relative", [1e-2, 3e-3, 1e-3])
def test_rounding_is_never_counted_as_rank(kind, relative):
    base = weights(kind).bfloat16()
    update = gaussian(384, 4, seed=3) @ gaussian(4, 512, seed=4)
    update *= relative * base.double().norm() / update.norm()
    tuned = (base.double() + update).bfloat16()
    values = torch.linalg.svdvals(tuned.double() - base.double()).numpy()
    numbers = above(values, noise_profile(base) + noise_profile(tuned), 384, 512)
    assert numbers["rank_above_rounding"] <= 4
    if relative == 1e-2:
        assert numbers["rank_above_rounding"] == 4


def test_the_effective_rank_of_an_update_between_bfloat16_weights_is_found_again():
    base = (0.02 * gaussian(256, 384, seed=1)).bfloat16()
    update = gaussian(256, 4, seed=2) @ gaussian(4, 384, seed=3)
    update *= 0.01 * base.double().norm() / update.norm()
    tuned = (base.double() + update).bfloat16()
    values = torch.linalg.svdvals(tuned.double() - base.double()).numpy()
    numbers = above(values, noise_profile(base) + noise_profile(tuned), 256, 384)
    expected = effective_rank(torch.linalg.svdvals(update)[:4].numpy())
    assert numbers["rank_above_rounding"] == 4
    assert effective_rank(values) > 1.2 * expected
    assert numbers["effective_rank_energy_above_rounding"] == pytest.approx(expected, rel=0.02)


def test_without_noise_it_is_the_spectrum_itself():
    numbers = above([4.0, 3.0], even(0.0, 2, 2), 2, 2)
    assert numbers["rank_above_rounding"] == 2
    entropy = -(0.36 * np.log(0.36) + 0.64 * np.log(0.64))
    assert numbers["entropy_energy_above_rounding"] == pytest.approx(entropy)
    assert numbers["effective_rank_energy_above_rounding"] == pytest.approx(np.exp(entropy))


def test_nothing_is_said_without_a_prediction_or_a_spectrum():
    assert all(np.isnan(value) for value in above([4.0, 3.0], even(np.nan, 2, 2), 2, 2).values())
    assert all(np.isnan(value) for value in above([np.nan, np.nan], even(1.0, 2, 2), 2, 2).values())


def test_an_update_below_the_floor_has_a_rank_of_zero_and_no_entropy():
    numbers = above([1.0, 0.5], even(25.0, 2, 2), 2, 2)
    assert numbers["rank_above_rounding"] == 0
    assert np.isnan(numbers["entropy_energy_above_rounding"])
