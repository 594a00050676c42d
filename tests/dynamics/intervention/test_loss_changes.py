"""Changes of losses are paired by sample, with intervals over groups; predictions are added up over matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import xarray as xr

from dynamics import schema
from dynamics.intervention.loss_changes import (
    CostliestLayer,
    costliest_layer,
    costliest_layer_sentence,
    loss_changes,
    loss_record,
)

MATRICES = ("model.layers.2.q_proj", "model.layers.10.q_proj", "model.layers.2.v_proj", "lm_head")


def record(
    losses: np.ndarray,
    start: np.ndarray,
    *,
    samples: Sequence[str] = (),
    groups: Sequence[str] = (),
    retained: Sequence[bool] = (False, True),
    first_order: np.ndarray | None = None,
    curvature: np.ndarray | None = None,
    start_step: int | Sequence[int] = 0,
    steps: Sequence[int] | None = None,
    matrices: Sequence[str] = MATRICES,
) -> xr.Dataset:
    """Losses by step and sample of two tasks, half of the samples each unless said otherwise."""
    count, size = losses.shape
    tasks = ("new", "old")[: len(retained)]
    names = list(samples) or [tasks[number * len(tasks) // size] for number in range(size)]
    first = np.full((count, len(matrices), len(tasks)), np.nan) if first_order is None else first_order
    arrays = {
        "sample_loss": losses,
        "start_loss": np.broadcast_to(start, losses.shape).copy(),
        "first_order": first,
        "curvature": np.full((count, len(tasks)), np.nan) if curvature is None else curvature,
    }
    coords = {
        "step": list(steps or range(1, count + 1)),
        "task": list(tasks),
        "matrix": list(matrices),
        "sample_task": ("sample", names),
        "sample_group": ("sample", list(groups) or [f"g{number}" for number in range(size)]),
        "sample_id": ("sample", [f"s{number}" for number in range(size)]),
        "start_step": ("step", np.broadcast_to(start_step, count)),
        "retained": ("task", list(retained)),
        "recorded": ("step", [True] * count),
        "reason": ("step", [""] * count),
    }
    return xr.Dataset(schema.label_arrays(schema.LOSS_RECORD, arrays), coords, {"of_matrices": len(matrices)})


def test_a_change_is_the_mean_of_paired_differences():
    start = np.array([5.0, 9.0, 1.0, 3.0])
    losses = start + np.array([[-1.0, -3.0, 0.5, 1.5], [-2.0, -4.0, 0.0, 2.0]])
    changes = loss_changes(record(losses, start))
    assert changes["step"].values.tolist() == [0, 1, 2]
    assert changes["change"].values.tolist() == [[0, 0], [-2, 1], [-3, 1]]
    assert changes["change_low"].values[0].tolist() == changes["change_high"].values[0].tolist() == [0, 0]
    reach = 12.706204736  # t of one degree of freedom; the standard error of two samples is half their difference
    np.testing.assert_allclose(changes["change_high"].values[1] - changes["change"].values[1], [reach, reach * 0.5])
    np.testing.assert_array_equal(changes["sample_loss"].values, np.vstack([start, losses]))


def test_what_samples_differ_in_cancels():
    start = np.array([1.0, 1000.0, 1.0, 1000.0])
    changes = loss_changes(record(start[None] + 1, start))
    np.testing.assert_allclose(changes["change_high"].values[1], 1)


def test_samples_of_a_group_count_as_one():
    start = np.zeros(8)
    losses = np.array([[1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0]])
    groups = ["a", "a", "b", "b", "a", "a", "b", "b"]
    clustered = loss_changes(record(losses, start, groups=groups))
    alone = loss_changes(record(losses[:, ::2], start[::2]))
    np.testing.assert_allclose(clustered["change_low"].values, alone["change_low"].values)
    assert clustered.attrs["groups"] == 2


def test_intervals_hold_the_change_in_95_percent():
    """400 trainings with groups of unequal size, whose samples share half of their variance."""
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        groups = np.repeat(np.arange(16), generator.integers(1, 6, 16))
        shared = generator.normal(size=16)[groups]
        start = 5 + generator.normal(size=len(groups))
        change = 0.3 + shared + generator.normal(size=len(groups))
        data = record((start + change)[None], start, groups=[str(g) for g in groups], retained=[True])
        one = loss_changes(data).isel(step=1, task=0)
        hits.append(float(one["change_low"]) < 0.3 < float(one["change_high"]))
    assert np.mean(hits) >= 0.93


def predicted() -> xr.Dataset:
    start = np.array([5.0, 5.2, 1.0, 1.1])
    losses = start + np.array([[-1.0, -1.1, 0.4, 0.5]])
    first = np.array([[[-0.2, 0.3], [-0.6, 0.1], [-0.1, 0.1], [-0.1, -0.1]]])
    return record(losses, start, first_order=first, curvature=np.array([[0.2, 0.4]]), steps=[7])


def test_predictions_are_sums_over_matrices_and_half_the_curvature():
    changes = loss_changes(predicted())
    np.testing.assert_allclose(changes["predicted_first"], [[0, 0], [-1, 0.4]])
    np.testing.assert_allclose(changes["predicted_second"], [[0, 0], [-0.9, 0.6]])
    assert (changes.attrs["matrices"], changes.attrs["of_matrices"]) == (4, 4)


def test_shares_by_layer_add_to_one_in_the_order_of_layers():
    changes = loss_changes(predicted())
    assert changes["layer"].values.tolist() == ["", "2", "10"]
    np.testing.assert_allclose(changes["layer_share"].sel(step=7, task="new"), [0.1, 0.3, 0.6])
    np.testing.assert_allclose(changes["layer_share"].sel(step=7, task="old"), [-0.25, 1.0, 0.25])
    assert np.isnan(changes["layer_share"].sel(step=0)).all()


def test_layers_of_two_stacks_are_told_apart():
    names = ("vision.layers.0.fc", "model.layers.0.fc", "model.layers.1.fc", "lm_head")
    data = predicted().assign_coords(matrix=list(names))
    assert loss_changes(data)["layer"].values.tolist() == ["", "model.layers.0", "model.layers.1", "vision.layers.0"]


def test_without_predictions_there_are_no_shares():
    changes = loss_changes(record(np.ones((1, 4)), np.zeros(4), matrices=()))
    assert "layer_share" not in changes
    assert np.isnan(changes["predicted_first"]).all()
    assert changes.attrs["matrices"] == 0
    assert costliest_layer(changes) is None


def test_without_a_known_start_the_first_step_stands_for_it():
    losses = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 3.0, 4.0]])
    changes = loss_changes(record(losses, np.full(4, np.nan), steps=[50, 90]))
    assert changes.attrs["start_step"] == 50
    assert changes["change"].values.tolist() == [[0, 0], [1, 0]]


def test_a_start_that_only_some_steps_know_serves_all():
    losses = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 3.0, 4.0]])
    start = np.array([[np.nan] * 4, [0.0, 1.0, 3.0, 4.0]])
    changes = loss_changes(record(losses, start))
    assert changes["change"].values.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_predictions_from_another_start_are_left_out():
    first = np.ones((2, 4, 2))
    changes = loss_changes(record(np.ones((2, 4)), np.zeros(4), first_order=first, start_step=[0, 1]))
    assert np.isnan(changes["predicted_first"].values[2]).all()
    assert changes["predicted_first"].values[1].tolist() == [4, 4]


def test_one_step_alone_is_its_own_start():
    changes = loss_changes(record(np.ones((1, 4)), np.full(4, np.nan)))
    assert changes["change"].values.tolist() == [[0, 0]]


def test_a_sample_without_a_loss_at_the_start_is_left_out_and_later_ends_the_change():
    start = np.array([1.0, np.nan, 1.0, 1.0])
    losses = np.array([[2.0, 9.0, 2.0, 2.0], [2.0, np.nan, 2.0, np.nan]])
    changes = loss_changes(record(losses, start))
    np.testing.assert_array_equal(changes["change"].values, [[0, 0], [1, 1], [1, np.nan]])
    assert changes.attrs["samples"] == 3


def test_nothing_finite_gives_nothing():
    changes = loss_changes(record(np.full((2, 4), np.nan), np.full(4, np.nan)))
    assert np.isnan(changes["change"]).all()
    assert changes.attrs["samples"] == 0


@pytest.mark.parametrize("make", [predicted, lambda: record(np.ones((2, 4)), np.zeros(4), matrices=())])
def test_the_record_of_a_result_gives_it_again(make):
    changes = loss_changes(make())
    again = loss_changes(loss_record(changes))
    xr.testing.assert_allclose(again, changes)
    assert again.attrs == changes.attrs


def resolved(**changes) -> xr.Dataset:
    """Eight samples a task: the new one fell by about 1, the old one rose by about 0.4."""
    start = np.linspace(1, 2, 16)
    moved = np.concatenate([np.linspace(-1.1, -0.9, 8), np.linspace(0.3, 0.5, 8)])
    first = np.array([[[-0.2, 0.3], [-0.6, 0.1], [-0.1, 0.1], [-0.1, -0.1]]])
    return record((start + moved)[None], start, **{"first_order": first, "steps": [7], **changes})


def test_the_costliest_layer_pays_most_beyond_its_gain():
    losses = loss_changes(resolved())
    assert costliest_layer(losses) == CostliestLayer("2", "old", "new", pytest.approx(1.0), pytest.approx(0.3))
    assert costliest_layer_sentence(losses) == (
        "Layer 2 costs the most retained loss for its gain: 100 % of the rise of old, 30 % of the fall of new (first "
        "order)."
    )


@pytest.mark.parametrize(
    "case",
    [
        {"retained": (False, False)},
        {"retained": (True, True)},
        {"first_order": 10 * np.array([[[-0.2, 0.3], [-0.6, 0.1], [-0.1, 0.1], [-0.1, -0.1]]])},
        {"first_order": np.full((1, 4, 2), np.nan)},
        {"groups": ["one"] * 16},
    ],
    ids=["nothing retained", "nothing new", "first order is far off", "no prediction", "no interval"],
)
def test_no_layer_is_named_where_the_total_is_not_resolved(case):
    assert costliest_layer_sentence(loss_changes(resolved(**case))) == ""


def test_a_layer_that_works_against_the_gain_says_so():
    first = np.array([[[0.2, 0.3], [-1.0, 0.1], [0.0, 0.1], [-0.2, -0.1]]])
    sentence = costliest_layer_sentence(loss_changes(resolved(first_order=first)))
    assert sentence.endswith("100 % of the rise of old, a rise of new of 20 % of its fall (first order).")
