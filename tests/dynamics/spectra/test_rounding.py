import pytest
import torch

from dynamics.checkpoints.files import TORCH_NAMES
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import raw, rounding, walk
from dynamics.spectra.dataset import measure_update
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


def numerical_rank(matrix):
    spectra = walk.solve_batch([matrix])[0].spectra
    place = MatrixShape(*matrix.shape, matrix.rank, TORCH_NAMES[matrix.dtype])
    update = measure_update(raw.raw_update({1: (0, -1)}, {"w": place}, {(1, "w"): spectra}))["update"]
    return update["numerical_rank"].sel(kind="total").item()


@pytest.mark.parametrize("condition", [12, 30, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_factors_keep_their_numerical_rank(condition, dtype):
    """The factors are rounded, not the product: its small directions are stored as well as the large ones."""
    rank = 16
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for size in (512, 384))
    sizes = torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), rank, dtype=torch.float64)
    matrix = LowRankMatrix((left * sizes).to(dtype), right.T.to(dtype))
    assert numerical_rank(matrix) == rank


def test_directions_below_the_rounding_of_the_product_are_no_rank():
    left, right = (torch.linalg.qr(torch.randn(size, 8, dtype=torch.float64)).Q for size in (512, 384))
    sizes = torch.tensor([1.0] * 4 + [1e-5] * 4, dtype=torch.float64)
    matrix = LowRankMatrix((left @ torch.diag(sizes)).to(torch.bfloat16), right.T.to(torch.bfloat16))
    assert numerical_rank(matrix) == 4


def test_exact_factors_have_the_rank_that_float64_resolves():
    left, right = torch.randn(40, 4, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    left[:, 3] = left[:, 2]
    assert numerical_rank(LowRankMatrix(left, right)) == 3


def test_rows_that_are_looked_at_one_by_one_have_the_same_noise(monkeypatch):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = rounding.noise_profile(weight)
    monkeypatch.setattr(rounding, "_BLOCK", 1)
    parts = rounding.noise_profile(weight)
    torch.testing.assert_close(parts.rows, whole.rows, rtol=0, atol=0)
    torch.testing.assert_close(parts.columns, whole.columns, rtol=1e-15, atol=0)
