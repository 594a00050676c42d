import numpy as np
import pytest
import torch
from scipy import stats

from dynamics.spectra import measures, null_models
from dynamics.spectra.workers import single_threaded_workers


def purity(spectra):
    return 1 / measures.participation_ratio(spectra)


@pytest.mark.parametrize(("out", "in_", "rank"), [(12, 9, 4), (5, 30, 5), (6, 4, 8)])
def test_bartlett_draws_have_the_law_of_the_explicit_product(out, in_, rank):
    draws = 2000
    generator = np.random.default_rng(1)
    left = generator.standard_normal((draws, out, rank))
    explicit = np.linalg.svd(left @ generator.standard_normal((draws, rank, in_)), compute_uv=False)
    bartlett = null_models.random_lora_spectra(out, in_, rank, draws, seed=2).numpy()
    assert bartlett.shape == (draws, min(out, in_, rank))
    for measure in (lambda s: s[:, 0], lambda s: (s[:, : bartlett.shape[1]] ** 2).sum(1)):
        assert stats.ks_2samp(measure(explicit), measure(bartlett)).pvalue > 1e-3


@pytest.mark.parametrize(("out", "in_"), [(8, 8), (5, 20), (20, 5), (1, 7)])
def test_gaussian_draws_have_the_law_of_the_explicit_matrix(out, in_):
    draws = 2000
    explicit = np.linalg.svd(np.random.default_rng(1).standard_normal((draws, out, in_)), compute_uv=False)
    bidiagonal = null_models.gaussian_spectra(out, in_, draws, seed=2).numpy()
    for column in (0, -1):
        assert stats.ks_2samp(explicit[:, column], bidiagonal[:, column]).pvalue > 1e-3


@pytest.mark.parametrize(("out", "in_"), [(8, 8), (16, 64)])
def test_the_mean_purity_of_gaussian_draws_is_the_exact_one(out, in_):
    samples = purity(null_models.gaussian_spectra(out, in_, 4000, seed=3))
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - (out + in_ + 1) / (out * in_ + 2)) < 4 * error


@pytest.mark.parametrize(("out", "in_", "bound"), [(64, 64, 0.007), (16, 4096, 3e-4)])
def test_page_entropy_within_its_stated_error_for_real_entries(out, in_, bound):
    samples = measures.spectral_entropy(null_models.gaussian_spectra(out, in_, 2000, seed=4))
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - null_models.page_entropy(out, in_)) < bound + 3 * error


def test_marchenko_pastur_edge():
    largest = null_models.gaussian_spectra(100, 400, 200, seed=5)[:, 0].mean()
    assert largest == pytest.approx(100**0.5 + 400**0.5, rel=0.02)


def test_deficit_of_a_random_lora_is_that_of_two_wisharts():
    """ln r − SE ≈ (r−1)(r+2)/2r · (1/m + 1/n) for r ≪ m, n: half the mean squared spread of the energies."""
    model = null_models.random_lora_null(4096, 2048, 16, draws=2000)
    expected = 15 * 18 / 32 * (1 / 4096 + 1 / 2048)
    assert np.log(16) - model.mean["entropy_energy"] == pytest.approx(expected, rel=0.02)


def test_percentiles_of_null_draws_are_uniform():
    model = null_models.random_lora_null(40, 30, 6)
    fresh = measures.spectral_entropy(null_models.random_lora_spectra(40, 30, 6, draws=1000, seed=99))
    percentiles = model.percentile(fresh).numpy() / 100
    assert 0.03 < (percentiles < 0.05).mean() < 0.08
    assert 0.45 < (percentiles < 0.5).mean() < 0.55


def test_percentile_of_a_missing_entropy_is_missing():
    model = null_models.random_lora_null(10, 10, 2)
    assert model.percentile(torch.tensor([torch.nan])).isnan().all()
    assert model.percentile(torch.tensor([-1.0, 99.0])).tolist() == [0.0, 100.0]


def test_the_same_shape_has_the_same_null_and_other_seeds_another():
    first = null_models.random_lora_spectra(20, 10, 3, 16, seed=0)
    null_models.random_lora_spectra.cache_clear()
    torch.testing.assert_close(first, null_models.random_lora_spectra(20, 10, 3, 16, seed=0), rtol=0, atol=0)
    assert not torch.equal(first, null_models.random_lora_spectra(20, 10, 3, 16, seed=1))


def test_a_spike_is_an_outlier_and_noise_is_not():
    spectra = null_models.random_lora_spectra(60, 50, 8, 500, seed=7)
    edge = null_models.random_lora_null(60, 50, 8).edge
    false_alarms = (null_models.outliers(spectra, edge) > 0).double().mean()
    assert false_alarms < 0.03
    spiked = spectra.clone()
    spiked[:, 0] *= 5
    assert (null_models.outliers(spiked, edge) >= 1).all()


def test_outliers_need_a_median_to_stand_out_from():
    assert null_models.outliers(torch.tensor([[3.0, 1.0]]), 2.0).isnan().all()
    assert null_models.outliers(torch.tensor([[3.0, 1.0, torch.nan, torch.nan]]), 2.0).isnan().all()
    assert null_models.outliers(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), 2.0).isnan().all()
    assert null_models.outliers(torch.tensor([[torch.nan] * 4]), 2.0).isnan().all()


def test_a_dense_gaussian_matrix_is_what_its_null_expects():
    model = null_models.gaussian_null(48, 80)
    fresh = null_models.gaussian_spectra(48, 80, 400, seed=8)
    percentiles = model.percentile(measures.spectral_entropy(fresh)).numpy() / 100
    assert 0.03 < (percentiles < 0.05).mean() < 0.09
    assert (null_models.outliers(fresh, model.edge) > 0).double().mean() < 0.04


def test_a_large_dense_null_takes_few_draws_and_no_matrix():
    model = null_models.gaussian_null(3000, 1500)
    assert len(model.entropies) == null_models.dense_draws(3000, 1500) == 43
    assert model.mean["entropy_energy"] == pytest.approx(null_models.page_entropy(3000, 1500), abs=1e-3)


def explicit_increments(left, right, left_change, right_change, draws, generator):
    """(B + ΔB)(A + ΔA) − BA multiplied out, with Gaussian changes of the given norms."""
    spectra = []
    for _ in range(draws):
        noise = [torch.randn(factor.shape, generator=generator, dtype=torch.float64) for factor in (left, right)]
        moved_left = left + noise[0] * left_change / noise[0].norm()
        moved_right = right + noise[1] * right_change / noise[1].norm()
        spectra.append(torch.linalg.svdvals(moved_left @ moved_right - left @ right))
    return torch.stack(spectra)


@pytest.mark.parametrize(
    ("out", "in_", "rank", "left_size", "changes"),
    [
        (12, 9, 3, 0.0, (1.0, 0.3)),  # from B = 0
        (12, 9, 3, 0.3, (0.2, 0.2)),
        (9, 14, 4, 2.0, (0.5, 3.0)),  # a step larger than the factors
        (5, 20, 8, 1.0, (0.1, 0.2)),  # more columns than rows
        (12, 9, 3, 1.0, (0.0, 0.5)),  # B is frozen
    ],
)
def test_increment_draws_have_the_law_of_the_explicit_difference(out, in_, rank, left_size, changes):
    generator = torch.Generator().manual_seed(0)
    left = left_size * torch.randn(out, rank, generator=generator, dtype=torch.float64)
    left[:, 0] *= 4  # of unequal columns
    right = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    draws = 1000
    explicit = explicit_increments(left, right, *changes, draws, generator)
    values = [torch.linalg.svdvals(factor) for factor in (left, right)]
    values = [torch.nn.functional.pad(value, (0, rank - len(value)))[None] for value in values]
    sizes = [torch.tensor([change], dtype=torch.float64) for change in changes]
    noise = null_models.white_changes(out, in_, rank, rank, 1, draws, np.random.default_rng(1))
    spectra = null_models.increment_spectra(*values, *sizes, out, in_, noise)[0]
    count = min(out, in_, 2 * rank)
    assert spectra.shape == (draws, count)
    smallest = rank - 1 if left_size == 0 or changes[0] == 0 else count - 1
    for measure in (measures.spectral_entropy, lambda s: s[:, 0], lambda s: s[:, smallest]):
        assert stats.ks_2samp(measure(explicit[:, :count]), measure(spectra)).pvalue > 1e-3


def test_the_null_of_an_increment_rises_from_one_rank_to_two_as_b_grows():
    values, steps = torch.ones(1, 8, dtype=torch.float64), torch.full((1,), 0.01, dtype=torch.float64)
    means = []
    with single_threaded_workers() as executor:
        for size in (0.0, 0.1, 1.0):
            factors = (size * values, values, steps, steps)
            ((_, model),) = null_models.increment_null(*factors, 512, 512, executor, count=16)
            means.append(float(model.mean["effective_rank_energy"][0]))
    assert means[0] == pytest.approx(8, rel=0.03)
    assert 8.2 < means[1] < 9
    assert means[2] == pytest.approx(16, rel=0.05)


def test_points_of_few_draws_hold_another_draw_as_often_as_they_say():
    draws = torch.randn(20_000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high, edge = null_models._points(draws[:, :8], (0.05, 0.95, 0.99))
    another = draws[:, 8]
    assert (another < low).double().mean() == pytest.approx(0.05, abs=0.006)
    assert (another > high).double().mean() == pytest.approx(0.05, abs=0.006)
    assert (another > edge).double().mean() == pytest.approx(0.01, abs=0.004)
