"""Steps of an optimizer along fresh gradients: each block is a data set of its own, as for the gradient null."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from dynamics.fisher.concentration import DRAWN, LEAST_GRADIENTS, matched_gains, predictive_draws
from dynamics.fisher.samples import StackedGram, half_splits
from probes import ProbeGram
from probes.preconditioner import Orthogonalisation
from tests.dynamics.fisher.simulated import gradients, grams, power_law

SETS, SAMPLES, SPECTRUM, K = 120, 64, power_law(240), (1, 4, 16)
SHAPE = (12, 20)


def probes_and_batch(batch_size, scale, seed=0, sets=SETS, samples=SAMPLES):
    """Probe gradients, and a fresh batch's mean gradient; tr Σ is ``scale`` times ‖μ‖²."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((sets, 1, 240)) * np.sqrt(SPECTRUM)
    mean *= np.sqrt(SPECTRUM.sum() / scale / (mean**2).sum(-1, keepdims=True))
    rows = gradients(rng, sets, samples, SPECTRUM, mean)
    return rows, mean[:, 0] + rng.standard_normal((sets, 240)) * np.sqrt(SPECTRUM / batch_size), mean[:, 0]


def measured(rows, update, batch_size, **optimizer):
    """The stacked Gram of data sets, with what is known of the optimizer."""

    def by_block(values):
        return {str(number): value for number, value in enumerate(values)}

    known = {name: by_block(value) if np.ndim(value) else value for name, value in optimizer.items()}
    product, size = np.einsum("bnd,bd->bn", rows, update), (update**2).sum(1)
    return StackedGram.of(
        ProbeGram(by_block(grams(rows)), by_block(product), by_block(size), batch_size=batch_size, **known)
    )


def through(rows, scale):
    """G P Gᵀ and G P² Gᵀ of a P that is a number for each direction."""
    passed = rows * scale[:, None]
    return {"preconditioned_product": rows @ passed.mT, "preconditioned_gram": passed @ passed.mT}


def rates(gram):
    """How often each gain's interval lies above 1, centred too, and how often it holds 1: over both nulls."""
    plain, centred = matched_gains(gram, K), matched_gains(gram, K, centre=True)
    above = [((one.low > 1) & (other.low > 1)).mean(0) for one, other in zip(plain, centred, strict=True)]
    return above, [((gain.low <= 1) & (gain.high >= 1)).mean(0) for gain in plain]


@pytest.mark.parametrize(("batch_size", "scale"), [(16, 4), (256, 64), (8, 64)])
def test_a_step_of_adam_along_a_fresh_gradient_is_not_more_concentrated_than_its_null(batch_size, scale):
    """v̂ holds a batch's squares, so that steps are flat: over the plain null the same step has too little."""
    rows, fresh, mean = probes_and_batch(batch_size, scale)
    adam = 1 / np.sqrt(mean**2 + SPECTRUM / batch_size)
    gram = measured(rows, fresh * adam, batch_size, **through(rows, adam))
    above, covered = rates(gram)
    assert (above[1] <= 0.05).all(), above[1]
    assert (covered[1] >= 0.93).all(), covered[1]
    if scale == 4:
        assert (covered[0] < 0.3).all(), covered[0]


def test_a_step_that_is_more_than_the_optimizers_is_found():
    rows, fresh, mean = probes_and_batch(16, 16)
    adam = 1 / np.sqrt(mean**2 + SPECTRUM / 16)
    planted = fresh * adam / np.linalg.norm(fresh * adam, axis=1, keepdims=True) + 0.7 * np.eye(240)[0]
    above, _ = rates(measured(rows, planted, 16, **through(rows, adam)))
    assert above[1][1:].min() > 0.9


def test_a_plain_gradient_step_has_more_than_an_optimizer_that_flattens():
    """Beside the plain null it has as much; under Adam it would be concentrated."""
    rows, fresh, mean = probes_and_batch(16, 4)
    gram = measured(rows, fresh, 16, **through(rows, 1 / np.sqrt(mean**2 + SPECTRUM / 16)))
    above, _ = rates(gram)
    assert (above[0] <= 0.05).all()
    assert (above[1][1:] > 0.9).all()


def test_under_plain_sgd_both_are_equal():
    rows, fresh, _ = probes_and_batch(16, 16, sets=5)
    names = [str(number) for number in range(5)]
    gram = dict(zip(names, grams(rows), strict=True))
    product, size = np.einsum("bnd,bd->bn", rows, fresh), (fresh**2).sum(1)
    known = StackedGram.of(
        ProbeGram(
            gram,
            dict(zip(names, product, strict=True)),
            dict(zip(names, size, strict=True)),
            batch_size=16,
            preconditioned_product=gram,
            preconditioned_gram=gram,
        )
    )
    assert all(part.is_plain for part in known.parts())
    plain, beside = matched_gains(known, K)
    for one, other in zip(astuple(plain), astuple(beside), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_constant_changes_nothing():
    """One rate for all parameters: gains are those of the plain null."""
    rows, fresh, _ = probes_and_batch(16, 16, sets=5)
    plain, beside = matched_gains(measured(rows, fresh, 16, **through(rows, np.full((5, 240), 3.0))), K)
    np.testing.assert_allclose(beside.low, plain.low, rtol=1e-9)
    np.testing.assert_allclose(beside.null, plain.null, rtol=1e-9)


def test_the_plain_gain_does_not_depend_on_what_is_known_of_the_optimizer():
    rows, fresh, mean = probes_and_batch(16, 16, sets=5)
    without = matched_gains(measured(rows, fresh, 16), K)
    known = matched_gains(measured(rows, fresh, 16, **through(rows, 1 / np.abs(mean))), K)
    for one, other in zip(astuple(without[0]), astuple(known[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isnan(without[1].gain).all()


def test_shares_are_those_of_explicit_draws():
    """The null of one half by hand: means of P g, in directions of the other half; a batch of one is a sample."""
    rows, fresh, mean = probes_and_batch(1, 16, sets=1)
    adam = 1 / np.abs(mean)
    found = matched_gains(measured(rows, fresh, 1, **through(rows, adam)), (4,), splits=1, draws=4000)[1]
    slow = []
    for first, second in half_splits(np.arange(SAMPLES), 1, 0):
        directions = np.linalg.svd(rows[0, first], full_matrices=False)[2][:4]
        passed = rows[0, second] * adam[0]
        slow.append((((passed @ directions.T) ** 2).sum(1) / (passed**2).sum(1)).mean())
    assert found.null[0, 0] == pytest.approx(np.mean(slow), rel=0.1)


def test_an_update_that_divides_itself_has_no_null():
    """After one step of Adam √v̂ is the update's own gradient, as no fresh one's: chance would call it concentrated."""
    rows, fresh, _ = probes_and_batch(16, 4)
    own = 1 / np.abs(fresh)
    young = measured(rows, fresh * own, 16, **through(rows, own), optimizer_gradients=1.0)
    assert np.isnan(matched_gains(young, K)[1].gain).all()
    old = measured(rows, fresh * own, 16, **through(rows, own), optimizer_gradients=float(LEAST_GRADIENTS))
    assert rates(old)[0][1].max() > 0.15


@pytest.mark.parametrize(("batch_size", "scale", "samples"), [(16, 4, 64), (128, 8, 32), (256, 64, 64)])
def test_a_step_of_muon_along_a_fresh_gradient_is_not_more_concentrated_than_its_null(batch_size, scale, samples):
    rows, fresh, _ = probes_and_batch(batch_size, scale, sets=60, samples=samples)
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((240, 240)))[0]
    rows, fresh = rows @ turned, fresh @ turned
    weights = np.stack([predictive_draws(k, np.arange(samples), batch_size) for k in grams(rows)])
    drawn = np.stack([stepped(part) for part in weights @ rows])
    known = {"drawn_product": rows @ drawn.mT, "drawn_norm_squared": (drawn**2).sum(-1)}
    above, covered = rates(measured(rows, stepped(fresh), batch_size, **known))
    assert (above[1] <= 0.05).all(), above[1]
    assert (covered[1] >= 0.9).all(), covered[1]


def stepped(flat):
    muon = Orthogonalisation(1.0, (3.4445, -4.775, 2.0315), 5, 1e-7)
    return np.stack([muon(torch.tensor(row.reshape(SHAPE))).numpy().ravel() for row in flat])


def test_drawn_gradients_are_those_of_the_null():
    """Passed through nothing, a drawn gradient has the plain null's share in the directions it was shrunk in."""
    rows, fresh, _ = probes_and_batch(64, 16, sets=40)
    weights = np.stack([predictive_draws(k, np.arange(SAMPLES), 64) for k in grams(rows)])
    assert weights.shape == (40, 8 * DRAWN, SAMPLES)
    drawn = weights @ rows
    known = {"drawn_product": rows @ drawn.mT, "drawn_norm_squared": (drawn**2).sum(-1)}
    plain, beside = matched_gains(measured(rows, fresh, 64, **known), (16,))
    assert beside.null.mean() == pytest.approx(plain.null.mean(), rel=0.03)


def test_draws_of_other_halves_are_not_used():
    rows, fresh, _ = probes_and_batch(16, 16, sets=2)
    weights = np.stack([predictive_draws(k, np.arange(SAMPLES), 16) for k in grams(rows)])
    drawn = weights @ rows
    gram = measured(rows, fresh, 16, drawn_product=rows @ drawn.mT, drawn_norm_squared=(drawn**2).sum(-1))
    assert np.isfinite(matched_gains(gram, K)[1].gain).all()
    assert np.isnan(matched_gains(gram, K, seed=1)[1].gain).all()
    assert np.isnan(matched_gains(gram, K, splits=2)[1].gain).all()


def test_there_are_no_draws_where_there_is_no_null():
    assert predictive_draws(np.eye(8), np.arange(8), 0).shape == (0, 8)
    assert predictive_draws(np.eye(6), np.arange(6) % 3, 4).shape == (0, 6)


def test_a_block_of_which_the_optimizer_is_unknown_is_missing():
    rows, fresh, mean = probes_and_batch(16, 16, sets=2)
    known = {name: {"0": value[0]} for name, value in through(rows, 1 / np.abs(mean)).items()}
    names = ("0", "1")
    product, size = np.einsum("bnd,bd->bn", rows, fresh), (fresh**2).sum(1)
    by_block = [dict(zip(names, values, strict=True)) for values in (grams(rows), product, size)]
    found = matched_gains(StackedGram.of(ProbeGram(*by_block, batch_size=16, **known)), K)[1]
    assert np.isfinite(found.gain[0]).all()
    assert np.isnan(found.gain[1]).all()
