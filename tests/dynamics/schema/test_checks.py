import json
import re

import numpy as np
import pytest
import xarray as xr

from dynamics import schema
from dynamics.checkpoints import open_trajectory
from dynamics.pipeline import measure
from tests.fishers import with_fisher
from tests.runs import write_run


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(open_trajectory(write_run(tmp_path_factory.mktemp("measured") / "run")))


@pytest.fixture
def tree(measured):
    return measured.copy(deep=True)


def changed(tree, **variables):
    datasets = {path: node.to_dataset(inherit=False) for path, node in tree.subtree_with_keys}
    result = xr.DataTree.from_dict({path: dataset for path, dataset in datasets.items() if path != "."})
    result.attrs = dict(tree.attrs)
    result["update"] = xr.DataTree(datasets["update"].assign(variables))
    return result


def test_what_the_pipeline_makes_keeps_the_schema(tree):
    schema.check(tree)


def test_several_runs_are_checked_each(tree):
    both = xr.DataTree.from_dict({"/runs/a": tree, "/runs/b": tree})
    schema.check(both)
    del both["runs"]["b"].attrs["seed"]
    with pytest.raises(ValueError, match=re.escape("/runs/b/ lacks the attribute 'seed'")):
        schema.check(both)


@pytest.mark.parametrize("name", schema.UPDATE)
def test_every_variable_is_asked_for(tree, name):
    update = tree["update"].to_dataset().drop_vars(name)
    tree["update"] = xr.DataTree(update)
    with pytest.raises(ValueError, match=re.escape(f"/update lacks '{name}'")):
        schema.check(tree)


def test_dimensions(tree):
    values = tree["update"]["stable_rank"]
    with pytest.raises(ValueError, match=re.escape("/update/stable_rank has dimensions ('kind', 'step', 'matrix')")):
        schema.check(changed(tree, stable_rank=values.transpose("kind", "step", "matrix")))


def test_attributes(tree):
    values = tree["update"]["stable_rank"].copy()
    del values.attrs["definition"]
    with pytest.raises(ValueError, match=re.escape("/update/stable_rank lacks the attribute 'definition'")):
        schema.check(changed(tree, stable_rank=values))


def test_groups_of_checkpoints(tree):
    tree["base"] = xr.DataTree(xr.Dataset({"relative_size": (("matrix", "step"), np.ones((2, 3)))}))
    with pytest.raises(ValueError, match=re.escape("/base lacks 'base_norm'")) as caught:
        schema.check(tree)
    assert "/base/relative_size has dimensions ('matrix', 'step'), expected ('step', 'matrix')" in str(caught.value)


def test_spectra_are_descending_and_end_at_their_count(tree):
    values = tree["update"]["singular_value"].copy()
    flipped = values.copy(data=values.values[..., ::-1])
    with pytest.raises(ValueError, match="not descending"):
        schema.check(changed(tree, singular_value=flipped))
    with pytest.raises(ValueError, match="numbers beyond count"):
        schema.check(changed(tree, singular_value=values.fillna(0.0)))


def test_steps_are_unique_and_ascending(tree):
    update = tree["update"].to_dataset()
    tree["update"] = xr.DataTree(update.assign_coords(step=np.array([10, 10, 30])))
    with pytest.raises(ValueError, match="steps are not unique and ascending"):
        schema.check(tree)


def test_increments_do_not_cross_trainings(tree):
    update = tree["update"].to_dataset()
    tree["update"] = xr.DataTree(update.assign_coords(segment=("step", [0, 1, 1])))
    with pytest.raises(ValueError, match="from_step 10 of step 20 is not an earlier step of its segment"):
        schema.check(tree)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("singular_value", np.inf, "/update/singular_value holds infinity"),
        ("dominant_ratio", 7.0, "/update/dominant_ratio is above 1"),
        ("count", 3, "/update has an increment where from_step is -1"),
        ("is_zero", True, "/update has measures of an update that is zero"),
    ],
)
def test_numbers_that_cannot_be(tree, name, value, message):
    values = tree["update"][name]
    with pytest.raises(ValueError, match=re.escape(message)):
        schema.check(changed(tree, **{name: values.copy(data=np.full_like(values.values, value))}))


def test_flags_are_booleans(tree):
    with pytest.raises(ValueError, match=re.escape("/update/is_zero is float64, expected bool")):
        schema.check(changed(tree, is_zero=tree["update"]["is_zero"].astype(float)))


def test_names_are_those_of_the_live_base_model(tree):
    update = tree["update"].to_dataset()
    names = [f"base_model.model.{name}" for name in update["matrix"].values]
    tree["update"] = xr.DataTree(update.assign_coords(matrix=names))
    with pytest.raises(ValueError, match="has a wrapper's prefix"):
        schema.check(tree)


def test_the_seed_is_a_number(tree):
    tree.attrs["seed"] = "zero"
    with pytest.raises(ValueError, match=re.escape("'seed' is 'zero', expected an integer")):
        schema.check(tree)


def test_attributes_are_strict_json(tree):
    tree.attrs["findings"] = json.dumps([float("nan")])
    with pytest.raises(ValueError, match="'findings' is not strict JSON"):
        schema.check(tree)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.down_proj", (12, "mlp.down_proj", "model.layers")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn", "transformer.h")),
        ("stages.0.blocks.2.mlp.fc1", (0, "blocks.*.mlp.fc1", "stages")),
        ("model.layers.1.self_attn.q_proj@second", (1, "self_attn.q_proj@second", "model.layers")),
        ("classifier.0", (0, "classifier.0", "")),
        ("embed_tokens", (-1, "embed_tokens", "")),
        (f"layers.{'9' * 30}.q", (-1, f"layers.{'9' * 30}.q", "")),
    ],
)
def test_layer_role_and_stack(name, expected):
    assert schema.layer_and_role(name) == expected


@pytest.fixture(scope="module")
def with_the_fisher(measured):
    return with_fisher(measured.copy(deep=True))


def test_the_fishers_groups_keep_the_schema(with_the_fisher):
    schema.check(with_the_fisher)


def test_the_fishers_variables_have_a_definition():
    for variables in schema.FISHER_GROUPS.values():
        for name, variable in variables.items():
            assert variable.dims[0] == "step", name
            assert variable.definition or name in schema.FISHER_RECORD, name


@pytest.mark.parametrize("group", schema.FISHER_GROUPS)
def test_a_fisher_group_that_lacks_something(with_the_fisher, group):
    tree = with_the_fisher.copy()
    name = next(iter(schema.FISHER_GROUPS[group]))
    tree[group] = xr.DataTree(tree[group].to_dataset().drop_vars([name, "evaluated_at_step"]))
    with pytest.raises(ValueError, match=re.escape(f"/{group} lacks '{name}'")) as refused:
        schema.check(tree)
    assert f"/{group} lacks the coordinate 'evaluated_at_step'" in str(refused.value)


def test_a_fisher_without_all_and_transposed(with_the_fisher):
    tree = with_the_fisher.copy()
    tree["tasks"] = xr.DataTree(tree["tasks"].to_dataset().drop_sel(task="all").transpose("block", "step", ...))
    with pytest.raises(ValueError, match=re.escape("/tasks lacks the task 'all'")) as refused:
        schema.check(tree)
    assert "/tasks/noise_scale has dimensions ('block', 'step', 'task')" in str(refused.value)
