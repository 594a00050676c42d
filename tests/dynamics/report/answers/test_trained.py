"""Planted faults are found and their cause is named; healthy runs of many shapes are left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics import analyze_run, open_trajectory
from dynamics.pipeline import measure
from dynamics.report.answers.trained import did_it_train
from dynamics.report.summary import summarise
from dynamics.routing.dataset import joined_routing, measure_routing, routing_record
from tests.runs import drifting, random_factors, write_adapter, write_records, write_run
from tests.trees import HOSTILE, example_tree, matrix_names
from tests.whole_models import model_tensors, write_dense_run, write_model

NAMES = tuple(f"model.layers.{layer}.self_attn.{role}" for layer in range(6) for role in ("q_proj", "v_proj"))


def answer(tree):
    return did_it_train(tree, {"segments": np.unique(tree["update"]["segment"])})


def of_run(folder, base=None):
    return answer(measure(open_trajectory(folder, base=base)))


def of_steps(folder, change=lambda step, factors: None, **shape):
    """The answer about a LoRA run of three checkpoints, whose factors are changed in place."""
    steps = drifting((10, 20, 30), names=NAMES, **shape)
    for step, factors in steps.items():
        change(step, factors)
    return of_run(write_run(folder / "run", steps))


def times(factor, *names, steps=(10, 20, 30)):
    """A change that multiplies B of these matrices."""

    def change(step, factors):
        for name in names:
            if step in steps:
                factors[name] = (factors[name][0] * factor, factors[name][1])

    return change


def edited(tree, group, **arrays):
    """The same result with other arrays in one group."""
    dataset = tree[group].to_dataset().load()
    for name, values in arrays.items():
        dataset[name].values[:] = values
    tree[group] = xr.DataTree(dataset)
    return tree


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_healthy_adapter_trained_everywhere(tmp_path, rank):
    result = of_steps(tmp_path, rank=rank)
    assert (result.verdict, result.surer) == ("yes", "")
    assert result.answer.startswith("All 12 matrices moved by step 30; the smallest update is 0.")


def test_an_adapter_alone_has_no_step(tmp_path):
    write_adapter(tmp_path / "adapter", random_factors(NAMES))
    assert of_run(tmp_path / "adapter").answer.startswith("All 12 matrices moved; ")


def test_a_healthy_dense_run_trained_everywhere(tmp_path):
    assert of_run(write_dense_run(tmp_path / "run", (10, 20, 30))).verdict == "yes"


def test_a_healthy_recording_trained_everywhere(tmp_path):
    write_records(tmp_path / "run")
    tree = analyze_run(tmp_path / "run", report=False)
    assert answer(tree).answer == "All 4 matrices moved by step 20."
    assert summarise(tree)["answers"][0]["answer"] == answer(tree).answer


def test_updates_that_are_zero_are_named_by_role(tmp_path):
    result = of_steps(tmp_path, times(0, NAMES[0], NAMES[3], NAMES[5]))
    assert result.verdict == "mixed"
    assert result.answer == (
        "9 of 12 matrices moved by step 30; 3 are exactly zero, as before the first step: no gradient, a learning rate "
        "of 0, or lost when saved (2 of 6 self_attn.v_proj and 1 of 6 self_attn.q_proj; first "
        "model.layers.0.self_attn.q_proj)."
    )
    assert "DynamicsCallback" in result.surer


def test_an_adapter_whose_b_is_zero_did_not_train(tmp_path):
    write_adapter(tmp_path / "adapter", {n: (0 * b, a) for n, (b, a) in random_factors(NAMES).items()})
    result = of_run(tmp_path / "adapter")
    assert result.verdict == "no"
    assert result.answer.startswith("None of 12 matrices moved; all are exactly zero")


def test_a_checkpoint_of_step_0_is_before_training(tmp_path):
    zero = {name: (0 * b, a) for name, (b, a) in random_factors(NAMES).items()}
    assert of_run(write_run(tmp_path / "run", {0: zero})).verdict == "undecided"


def test_updates_that_were_lost_when_saved_had_moved(tmp_path):
    result = of_steps(tmp_path, times(0, *NAMES[:3], steps=(30,)))
    assert "3 are exactly zero, although not at an earlier step: lost when saved, or reset" in result.answer


@pytest.mark.parametrize(
    ("factor", "state", "moved"),
    [(1e-3, "smaller than 1/30 of the median of its role", "11 of 12"), (1e3, "larger than 30 times the", "All 12")],
)
def test_matrices_far_from_their_role_are_named(tmp_path, factor, state, moved):
    result = of_steps(tmp_path, times(factor, NAMES[2]))
    assert result.verdict == "mixed"
    assert result.answer.startswith(f"{moved} matrices moved by step 30; 1 is {state}")
    assert result.answer.endswith(f"(1 of 6 self_attn.q_proj; {NAMES[2]}).")


def test_weights_that_are_not_finite_are_named(tmp_path):
    def break_one(step, factors):
        factors[NAMES[5]][0][0, 0] = torch.nan

    result = of_steps(tmp_path, break_one)
    assert result.verdict == "mixed"
    assert "1 is not finite, as after a loss that diverged" in result.answer


def test_where_no_update_is_finite_that_is_told():
    tree = example_tree(steps=2, matrices=2)
    tree["update"]["frobenius_norm"].loc[{"kind": "total"}] = np.inf
    result = answer(tree)
    assert result.verdict == "no"
    assert result.answer.startswith("None of 2 matrices has a finite update by step 200")


def test_one_shard_of_a_sharded_training_is_told(tmp_path):
    def keep_an_eighth(step, factors):
        for left, _ in factors.values():
            left[8:] = 0

    result = of_steps(tmp_path, keep_an_eighth, out=64)
    assert result.verdict == "mixed"
    assert "; all are saved only in part: 12.5 % of their rows or columns" in result.answer
    assert result.surer == "Gather the weights of all processes before saving."


def test_a_matrix_that_stopped_is_told(tmp_path):
    steps = drifting((10, 20, 30), names=NAMES)
    steps[30][NAMES[1]] = steps[20][NAMES[1]]
    result = of_run(write_run(tmp_path / "run", steps))
    assert "1 is as at step 20: frozen since, or without a gradient" in result.answer


def test_a_role_that_stopped_as_a_whole_is_frozen_on_purpose(tmp_path):
    steps = drifting((10, 20, 30), names=NAMES)
    steps[30] |= {name: steps[20][name] for name in NAMES if name.endswith("v_proj")}
    result = of_run(write_run(tmp_path / "run", steps))
    assert result.verdict == "yes"
    assert "6 are as at step 20, in whole roles, as if frozen on purpose (6 of 6 self_attn.v_proj" in result.answer


def test_where_nothing_moves_at_the_end_nothing_stopped_alone(tmp_path):
    steps = drifting((10, 20, 30), names=NAMES)
    assert of_run(write_run(tmp_path / "run", {**steps, 30: steps[20]})).verdict == "yes"


def test_gradients_tell_why_a_matrix_did_not_move():
    first, second = matrix_names(14)[:2]
    tree = example_tree(zero=[first, second], gradients=[100, 200])
    norm = tree["gradient"].to_dataset()["norm_before_clip"].values.copy()
    norm[:, 0] = 0
    result = answer(edited(tree, "gradient", norm_before_clip=norm))
    assert f"1 is exactly zero, since no gradient reached it (1 of 2 self_attn.q_proj; {first})" in result.answer
    assert (
        f"despite its gradients: not in the optimizer, or a learning rate of 0 (1 of 2 self_attn.k_proj; {second})"
        in (result.answer)
    )
    assert result.surer == ""


def test_a_learning_rate_of_zero_is_the_cause():
    tree = example_tree(zero=matrix_names(14))
    log = tree["training"].to_dataset().assign_coords(metric=["learning_rate"])
    log["value"].values[:] = 0
    tree["training"] = xr.DataTree(log)
    result = answer(tree)
    assert (result.verdict, "since the learning rate was 0" in result.answer) == ("no", True)


def test_experts_that_were_chosen_rarely_are_no_fault_and_those_never_chosen_are():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(4) for expert in range(4)]
    tree = example_tree(matrices=names, zero=names[:1])
    norm = tree["update"].to_dataset()["frobenius_norm"].values.copy()
    norm[:, :, 1] *= 1e-4
    result = answer(edited(tree, "update", frobenius_norm=norm))
    assert (
        "15 of 16 matrices moved by step 600; 1 is exactly zero, as if their experts were never chosen" in result.answer
    )


def test_experts_without_a_token_are_told_from_those_whose_routing_is_unknown():
    names = [f"model.layers.{layer}.mlp.experts.up_proj[{expert}]" for layer in range(2) for expert in range(4)]
    tree = example_tree(matrices=names, zero=[names[1], names[6]])
    steps = tree["update"]["step"].values
    counts = np.array([5.0, 0.0, 5.0, 5.0])
    about = {"routing": ["top-k"], "held_in": ["experts"]}
    parts = [routing_record(int(step), {"model.layers.0.mlp": (counts, 15.0, 0.1)}, about) for step in steps]
    tree["routing"] = xr.DataTree(measure_routing(joined_routing(parts), tree["update"].to_dataset()))
    text = answer(tree).answer
    assert "1 is exactly zero, since no token reached the expert at any captured step" in text
    assert "1 is exactly zero, as if their experts were never chosen" in text


def test_a_merge_that_lost_the_adapter_is_told(tmp_path):
    base = model_tensors()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "equal", base)
    result = of_run(tmp_path / "equal", base=tmp_path / "base")
    assert result.verdict == "no"
    assert "all are exactly zero, equal to the base: a merge lost the adapter, or nothing was trained" in result.answer
    write_model(tmp_path / "rounded", {key: value.bfloat16() for key, value in base.items()})
    result = of_run(tmp_path / "rounded", base=tmp_path / "base")
    assert result.verdict == "no"
    assert "all are equal to the base but for rounding to another format: a merge lost the adapter" in result.answer


def test_a_merge_of_some_roles_leaves_the_others_frozen(tmp_path):
    base = model_tensors()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "merged", {key: value * (1.1 if "q_proj" in key else 1.0) for key, value in base.items()})
    result = of_run(tmp_path / "merged", base=tmp_path / "base")
    assert result.verdict == "yes"
    assert "2 of 6 matrices moved; 4 are exactly zero, in whole roles, as if frozen on purpose" in result.answer


def test_an_update_that_merging_would_lose_has_trained(tmp_path):
    write_model(tmp_path / "base", {f"{name}.weight": torch.ones(12, 10).bfloat16() for name in NAMES})
    write_adapter(tmp_path / "run", {name: (1e-5 * b, a) for name, (b, a) in random_factors(NAMES).items()})
    tree = measure(open_trajectory(tmp_path / "run", base=tmp_path / "base"))
    result = answer(tree)
    assert result.verdict == "yes"
    assert "all are mostly rounded away when merged into the base's format, which loses 100 % at worst" in result.answer
    assert "OD211" in [finding["code"] for finding in json.loads(tree.attrs["findings"])]


def test_an_update_that_is_mostly_rounding_is_told():
    share = example_tree()["update"].to_dataset()["quantisation_noise_share"].values.copy()
    share[-1, 0, :2] = 0.8
    result = answer(edited(example_tree(), "update", quantisation_noise_share=share))
    assert result.verdict == "mixed"
    assert "2 are mostly rounding of the format in which it is stored (F32)" in result.answer


def test_dense_weights_without_a_start_have_no_update(tmp_path):
    tree = example_tree(steps=1)
    result = answer(edited(tree, "update", count=0))
    assert (result.verdict, "--base" in result.surer) == ("undecided", True)


def test_of_several_adapters_each_counts_and_not_their_sum():
    names = ["layers.0.q", "layers.0.q@a", "layers.0.q@b"]
    assert answer(example_tree(matrices=names, zero=names[1:2])).answer.startswith("1 of 2 matrices moved")


def test_the_newest_training_counts():
    result = answer(example_tree(steps=6, segment=[0, 0, 0, 1, 1, 1]))
    assert result.answer.startswith("All 14 matrices of the newest of 2 trainings moved by step 600")


def test_names_with_markup_are_as_they_are():
    assert HOSTILE in answer(example_tree(matrices=[HOSTILE, "b"], zero=[HOSTILE])).answer


def test_one_matrix_is_told_in_the_singular():
    assert answer(example_tree(matrices=["q"])).answer == "The one matrix moved by step 600."


def test_evidence_is_in_the_result(tmp_path):
    write_model(tmp_path / "base", {f"{name}.weight": torch.ones(12, 10).bfloat16() for name in NAMES})
    factors = random_factors(NAMES)
    factors |= {NAMES[0]: (0 * factors[NAMES[0]][0], factors[NAMES[0]][1])}
    write_adapter(tmp_path / "run", {name: (1e-5 * b, a) for name, (b, a) in factors.items()})
    recorded = example_tree(zero=matrix_names(14)[:1], gradients=[100])
    for tree in (measure(open_trajectory(tmp_path / "run", base=tmp_path / "base")), recorded):
        for number in answer(tree).evidence:
            group, _, name = number.path.lstrip("/").partition("/")
            assert name in tree[group].to_dataset()


@pytest.mark.parametrize("spread", [0.1, 0.4, 0.8])
def test_healthy_results_of_many_shapes_raise_no_alarm(spread):
    generator, tree = np.random.default_rng(0), example_tree(steps=1, matrices=56)
    alarms = 0
    for _ in range(40):
        norm = np.exp(generator.normal(0, spread, tree["update"]["frobenius_norm"].shape))
        alarms += answer(edited(tree, "update", frobenius_norm=norm)).verdict != "yes"
    assert alarms <= 2
