import pytest
import torch

from dynamics.spectra import rounding
from dynamics.spectra.increments import cores, stack
from probes import LowRankMatrix
from tests.matrices import moved, random_lora
from tests.reference import rounding_noise_energy


def predicted(matrix: LowRankMatrix) -> float:
    left, right = matrix.left_factor.double(), matrix.right_factor.double()
    return rounding.noise_energy(matrix, left.square().sum(0), right.square().sum(1))


@pytest.mark.parametrize("magnitude", [1.0, 3e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_to_the_loop_over_entries(dtype, magnitude):
    matrix = random_lora(7, 6, 2, seed=0)
    stored = LowRankMatrix((matrix.left_factor * magnitude).to(dtype), matrix.right_factor.to(dtype), matrix.scale)
    assert predicted(stored) == pytest.approx(rounding_noise_energy(stored), rel=1e-12)


def test_float64_carries_no_storage_noise():
    assert predicted(random_lora(7, 6, 2, seed=0, dtype=torch.float64)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prediction_matches_the_error_that_rounding_makes(dtype):
    exact = random_lora(300, 200, 8, seed=0, dtype=torch.float64)
    stored = LowRankMatrix(exact.left_factor.to(dtype), exact.right_factor.to(dtype), exact.scale)
    error = (stored.to_dense() - exact.to_dense()).square().sum()
    assert predicted(stored) == pytest.approx(float(error), rel=0.15)


@pytest.mark.parametrize(("relative", "limited"), [(1e-1, False), (1e-2, False), (1e-3, True), (1e-4, True)])
def test_which_bf16_increments_are_flagged(relative, limited):
    """bf16 resolves relative changes of about 4e-3; the flag stands where noise is a tenth of the energy."""
    before = random_lora(300, 200, 8, seed=0, dtype=torch.float64)
    now = moved(before, relative, seed=1)
    stored = [LowRankMatrix(m.left_factor.bfloat16(), m.right_factor.bfloat16(), m.scale) for m in (before, now)]
    change = cores(stack([stored[1]], [stored[0]])).increment().square().sum()
    share = float((predicted(stored[0]) + predicted(stored[1])) / change)
    assert (share > rounding.NOISE_LIMIT) == limited
