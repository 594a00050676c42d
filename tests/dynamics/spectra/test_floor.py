"""What stands above the rounding of its storage: planted directions survive, noise does not."""

import numpy as np
import pytest
import torch

from dynamics.spectra.floor import above_rounding
from dynamics.spectra.rounding import dense_noise_energy


def found_of(values, noise, out, in_):
    found = above_rounding(
        np.asarray(values)[None, None, None], np.full((1, 1, 1), noise), *map(np.array, ([out], [in_]))
    )
    return {name: array.item() for name, array in found.items()}


def test_noise_alone_lies_below_its_edge():
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
    found = found_of(torch.linalg.svdvals(noise).numpy(), 0.01**2 * 200 * 300, 200.0, 300.0)
    assert found["rank_above_rounding"] <= 1  # the edge is that of infinite matrices
    assert found["rounding_edge"] == pytest.approx(0.01 * (200**0.5 + 300**0.5))


def test_the_rank_of_a_low_rank_update_between_bfloat16_weights_is_found_again():
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(256, 384, generator=generator)).bfloat16()
    update = torch.randn(256, 4, generator=generator) @ torch.randn(4, 384, generator=generator)
    update *= 0.01 * base.float().norm() / update.norm()
    tuned = (base.float() + update).bfloat16()
    change = tuned.double() - base.double()
    noise = dense_noise_energy(base) + dense_noise_energy(tuned)
    values = torch.linalg.svdvals(change)
    found = found_of(values.numpy(), noise, 256.0, 384.0)
    share = (values**2 / (values**2).sum()).numpy()
    raw = np.exp(-(share * np.log(share)).sum())
    assert found["rank_above_rounding"] == 4
    true = torch.linalg.svdvals(update.double())[:4] ** 2
    share = (true / true.sum()).numpy()
    expected = np.exp(-(share * np.log(share)).sum())
    assert raw > 1.2 * expected
    assert found["effective_rank_energy_above_rounding"] == pytest.approx(expected, rel=0.1)


def test_without_noise_it_is_the_spectrum_itself():
    found = found_of([3.0, 4.0], 0.0, 2.0, 2.0)
    assert found["rank_above_rounding"] == 2
    assert np.exp(found["entropy_energy_above_rounding"]) == pytest.approx(
        found["effective_rank_energy_above_rounding"]
    )
    assert found["entropy_energy_above_rounding"] == pytest.approx(-(0.36 * np.log(0.36) + 0.64 * np.log(0.64)))


def test_nothing_is_said_without_a_prediction_or_a_spectrum():
    assert all(np.isnan(value) for value in found_of([3.0, 4.0], np.nan, 2.0, 2.0).values())
    assert all(np.isnan(value) for value in found_of([np.nan, np.nan], 1.0, 2.0, 2.0).values())


def test_an_update_below_the_floor_has_a_rank_of_zero_and_no_entropy():
    found = found_of([1.0, 0.5], 100.0, 2.0, 2.0)
    assert found["rank_above_rounding"] == 0
    assert np.isnan(found["entropy_energy_above_rounding"])
