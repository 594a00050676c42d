"""What is said of the rank is what the numbers show: by energy, by noise, by effect, and nothing more."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics.intervention.truncations import TRUNCATIONS
from dynamics.report.answers.rank import is_the_rank_right
from tests.trees import HOSTILE, example_tree, matrix_names


def answer(tree):
    return is_the_rank_right(tree, {"segments": np.unique(tree["update"]["segment"])})


def with_spectra(total, increments=None, steps=(100, 200, 300, 400, 500), names: int | list[str] = 14, **how):
    """A result whose matrices have these singular values at the last step, and increments of equal size."""
    count = len(total)
    tree = example_tree(steps, names, rank=count, **how)
    update = tree["update"].to_dataset().load()
    update["singular_value"].loc[{"kind": "total"}] = np.nan
    update["singular_value"].loc[{"kind": "total", "index": slice(0, count - 1)}] = np.asarray(total, dtype=float)
    if increments is not None:
        padded = np.zeros(2 * count)
        padded[: len(increments)] = increments
        rows = update["from_step"].values >= 0
        update["singular_value"].values[rows, 1] = padded
    energy = np.cumsum(np.square(total)) / np.square(total).sum()
    update["suggested_rank"].values[:] = 1 + int((energy < 0.99).sum())
    update["frobenius_norm"].loc[{"kind": "total"}] = float(np.linalg.norm(total))
    tree["update"] = xr.DataTree(update)
    return tree


def with_sensitivity(tree, effect, low, high, loss=2.0, step=500):
    """The same with the effect of a cut to 99 % of the energy, of 2 directions in each matrix."""
    names = tree["update"]["matrix"].values
    effects = np.full((1, len(TRUNCATIONS), 1), np.nan)
    arrays = {}
    for name, value in (("", effect), ("_low", low), ("_high", high)):
        arrays[f"truncation_effect{name}"] = (("step", "truncation", "task"), np.where(np.isnan(effects), value, 0.0))
    dataset = xr.Dataset(
        {
            **arrays,
            "singular_value": (("step", "matrix", "index"), np.ones((1, len(names), 8))),
            "parameters": (("step", "truncation"), np.full((1, len(TRUNCATIONS)), 2.0 * 384 * len(names))),
            "loss": (("step", "task"), np.full((1, 1), loss)),
            "out": ("matrix", np.full(len(names), 256)),
            "in": ("matrix", np.full(len(names), 128)),
        },
        coords={"step": [step], "truncation": list(TRUNCATIONS), "task": ["all"], "matrix": names},
    )
    tree["sensitivity"] = xr.DataTree(dataset)
    return tree


IDLE = [10.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
FULL = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
ENDING = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 0.2, 0.1]


def test_a_rank_of_which_half_holds_the_energy_is_too_high():
    result = answer(with_spectra(IDLE, [0.1] * 8))
    assert result.verdict == "no"
    assert result.answer == (
        "By energy and training noise, rank 8 is at least half idle in all 14 matrices; adapters with the ranks of "
        "rank_pattern.json have 25 % of the parameters."
    )
    assert "alpha_pattern" in result.surer


def test_a_rank_that_is_used_to_its_end_may_be_too_low_or_just_right():
    result = answer(with_spectra(FULL, [0.2] * 8))
    assert result.verdict == "undecided"
    assert "rank 8 is used up in all 14 matrices" in result.answer
    assert "the ranks of rank_pattern.json would save no parameters" in result.answer
    assert "twice the rank" in result.surer


def test_a_rank_with_room_to_spare_is_right():
    result = answer(with_spectra(ENDING, [0.2] * 8))
    assert (result.verdict, result.sure) == ("yes", 0.95)
    assert "used, with room to spare, in all 14 matrices" in result.answer


def test_noise_as_large_as_the_update_decides_nothing():
    result = answer(with_spectra(FULL, [9.0] * 8))
    assert (result.verdict, result.sure) == ("undecided", None)
    assert "not shown to be too high or too low: 99 % of an update's energy needs 8" in result.answer


@pytest.mark.parametrize("steps", [(100,), (100, 200, 300), (1, 2, 3, 4, 5)])
def test_few_or_close_checkpoints_leave_energy_alone(steps):
    result = answer(with_spectra(FULL, steps=steps))
    assert (result.verdict, result.sure) == ("undecided", None)
    assert result.answer.startswith("By energy alone, ")
    assert "Keep 4 checkpoints or more" in result.surer


def test_roles_are_told_apart():
    tree = with_spectra(FULL, [0.2] * 8)
    update = tree["update"].to_dataset().load()
    idle = np.char.endswith(update["role"].values, "q_proj")
    update["singular_value"].values[:, 0, idle, :8] = IDLE
    update["suggested_rank"].values[idle] = 2
    tree["update"] = xr.DataTree(update)
    result = answer(tree)
    assert "at least half idle in 2 of 2 self_attn.q_proj" in result.answer
    assert "and in 3 other roles" in result.answer


def test_a_harmless_cut_confirms_that_the_rank_is_too_high():
    result = answer(with_sensitivity(with_spectra(IDLE, [0.1] * 8), -0.004, -0.01, 0.002))
    assert (result.verdict, result.sure) == ("no", 0.95)
    assert result.answer.endswith(
        "25 % of the parameters, and with them the held-out loss rises by 0.20 % (95 % interval −0.10 % to 0.50 %)."
    )
    assert "--probe" not in result.surer


@pytest.mark.parametrize(("low", "high", "verdict"), [(-0.5, -0.1, "yes"), (-0.1, 0.05, "undecided")])
def test_a_cut_that_costs_or_may_cost_is_no_proof_of_a_rank_that_is_too_high(low, high, verdict):
    result = answer(with_sensitivity(with_spectra(IDLE, [0.1] * 8), (low + high) / 2, low, high))
    assert result.verdict == verdict
    assert ("alpha_pattern" in result.surer) == (verdict != "yes")


def test_a_cut_that_costs_is_no_proof_that_a_rank_that_is_used_up_suffices():
    tree = with_spectra(FULL, [0.2] * 8)
    update = tree["update"].to_dataset().load()
    update["singular_value"].values[:, 0, 0, :8] = IDLE
    update["suggested_rank"].values[0] = 2
    tree["update"] = xr.DataTree(update)
    result = answer(with_sensitivity(tree, -0.3, -0.5, -0.1))
    assert result.verdict == "undecided"
    assert "used up in" in result.answer
    assert "at least half idle in 1 of 2" in result.answer


@pytest.mark.parametrize("change", [{"step": 100}, {"effect": np.nan}, {"loss": 0.0}])
def test_effects_of_another_step_or_none_do_not_count(change):
    given = {"effect": -0.004, "low": -0.01, "high": 0.002} | change
    result = answer(with_sensitivity(with_spectra(IDLE, [0.1] * 8), **given))
    assert "held-out" not in result.answer


def test_without_an_adapter_there_is_no_rank():
    tree = example_tree()
    tree["update"] = xr.DataTree(tree["update"].to_dataset().assign_coords(adapter_rank=("matrix", np.zeros(14, int))))
    assert answer(tree).verdict == "not_asked"


def test_adapters_that_did_not_move_use_no_rank():
    result = answer(example_tree(zero=matrix_names(14)))
    assert result.verdict == "undecided"
    assert "so none uses its rank" in result.answer


def test_what_is_not_finite_is_left_out():
    tree = with_spectra(IDLE, [0.1] * 8)
    update = tree["update"].to_dataset().load()
    update["singular_value"].values[-1, 0, 0] = np.nan
    update["frobenius_norm"].values[-1, 0, 0] = np.nan
    tree["update"] = xr.DataTree(update)
    assert "all 13 matrices" in answer(tree).answer


def test_the_newest_training_counts():
    tree = with_spectra(IDLE, [0.1] * 8, steps=range(100, 1000, 100), segment=[0] * 5 + [1] * 4)
    assert "rank 8 of the newest training is" in answer(tree).answer


def test_of_several_adapters_each_counts_and_not_their_sum():
    names = ["layers.0.q", "layers.0.q@a", "layers.0.q@b"]
    assert "all 2 matrices" in answer(with_spectra(IDLE, [0.1] * 8, names=names)).answer


def test_names_with_markup_are_as_they_are():
    assert HOSTILE in answer(with_spectra(IDLE, [0.1] * 8, names=[HOSTILE])).answer


@pytest.mark.parametrize("spectrum", [IDLE, FULL])
def test_evidence_is_in_the_result(spectrum):
    tree = with_sensitivity(with_spectra(spectrum, [0.1] * 8), -0.004, -0.01, 0.002)
    for number in answer(tree).evidence:
        group, _, name = number.path.lstrip("/").partition("/")
        assert name in tree[group].to_dataset()
