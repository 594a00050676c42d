"""Interventions of records and of probed checkpoints, joined over steps."""

import numpy as np
import pytest
import xarray as xr

from dynamics import open_run, schema
from dynamics.store.record_file import decoded_record, encoded_record
from dynamics.store.records import (
    joined_interventions,
    joined_sharpness,
    unmeasured_effects,
    with_probed_effects,
)
from tests.records import effects, rewrite
from tests.runs import write_records


def test_a_record_gives_its_effects_back():
    group = effects()
    xr.testing.assert_identical(decoded_record(20, encoded_record(20, {"intervention": group}))["intervention"], group)


def test_steps_are_joined_over_all_arms_and_all_k():
    first = effects(10, arms=("full", "on", "off"), ks=(4,), scales=(1.0,), tasks=("all", "b"), lacking=("score",))
    second = effects(20, arms=("full", "bottom", "on", "off"), ks=(2, 4), tasks=("all", "a"))
    joined = joined_interventions([second, first])
    assert joined["step"].values.tolist() == [10, 20]
    assert joined["from_step"].values.tolist() == [0, 10]
    assert joined["arm"].values.tolist() == ["full", "on", "off", "bottom"]
    assert (joined["k"].values.tolist(), joined["scale"].values.tolist()) == ([2, 4], [0.5, 1.0])
    assert joined["task"].values.tolist() == ["all", "b", "a"]
    for part in (first, second):
        for name in part:
            at = {dim: part[dim].values for dim in part[name].dims}
            np.testing.assert_array_equal(joined[name].sel(at), part[name], err_msg=str(name))
    ran = joined["effect"].notnull()
    assert ran.sel(step=10).sum() == first["effect"].size
    assert ran.sel(step=20).sum() == second["effect"].size
    assert joined["score_effect"].sel(step=10).isnull().all()


def test_what_was_not_run_has_no_flag():
    joined = joined_interventions([effects(10, ks=(4,)), effects(20, ks=(2,))])
    for name in schema.INTERVENTION_FLAGS:
        assert joined[name].dtype == bool
        assert joined[name].sel(step=20, k=2).all()
        assert not joined[name].sel(step=20, k=4).any()


def test_attributes_are_the_last_steps_and_deviations_the_largest():
    joined = joined_interventions([effects(20).assign_attrs(groups=6), effects(30).assign_attrs(norm_deviation=None)])
    assert joined.attrs["groups"] == 8
    assert joined.attrs["norm_deviation"] == 20 * 1e-7


def test_nothing_is_joined_to_nothing():
    assert joined_interventions([]) is None
    assert with_probed_effects(None, None, joined_interventions) is None


def test_records_win_over_checkpoints():
    recorded, probed = effects(10), joined_interventions([effects(10, ks=(8,)), effects(20, ks=(8,))])
    joined = with_probed_effects(recorded, probed, joined_interventions)
    assert joined["recorded"].values.tolist() == [True, False]
    assert np.isfinite(joined["effect"].sel(step=10, k=2)).all()
    assert joined["effect"].sel(step=10, k=8).isnull().all()
    assert with_probed_effects(recorded, probed.isel(step=[0]), joined_interventions)["recorded"].values.tolist() == [
        True
    ]
    kept = unmeasured_effects(xr.DataTree.from_dict({"/intervention": joined}), "intervention")
    xr.testing.assert_equal(kept["effect"].sel(k=[8]).drop_vars("recorded"), probed["effect"].sel(step=[20]))


@pytest.fixture
def run(tmp_path):
    store = write_records(tmp_path / "run", [10, 20])
    for step in (10, 20):
        rewrite(
            store / f"step-{step:012d}.safetensors", lambda groups, at=step: groups.update(intervention=effects(at))
        )
    return tmp_path / "run"


def test_a_run_is_opened_with_its_interventions(run):
    tree = open_run(run)
    schema.check(tree)
    assert tree["intervention"]["step"].values.tolist() == [10, 20]
    assert tree["intervention"]["recorded"].values.tolist() == [True, True]


def test_a_damaged_intervention_costs_itself_alone(run):
    record = run / "dynamics" / "records" / "step-000000000010.safetensors"
    rewrite(record, lambda groups: groups["intervention"]["effect"].values.fill(1e200))
    tree = open_run(run)
    assert tree["intervention"]["step"].values.tolist() == [20]
    assert tree["update"]["step"].values.tolist() == [10, 20]
    assert "'intervention' has a number in 'effect' that is not from" in tree.attrs["findings"]


def sharpness(step: int, tasks: list[str]) -> xr.Dataset:
    coords = {"step": [step], "task": ["all", *tasks], "task_": tasks}
    kinds = {"resolved": True, "reason": "", "relative_reason": ""}
    arrays = {
        name: np.full([len(coords[dim]) for dim in variable.dims], kinds.get(name, 1.0))
        for name, variable in schema.SHARPNESS.items()
    }
    return xr.Dataset(schema.label_arrays(schema.SHARPNESS, arrays), coords)


def test_critical_steps_are_joined_over_all_tasks():
    joined = joined_sharpness([sharpness(10, ["a", "b"]), sharpness(20, ["b", "c"])])
    assert joined["step"].values.tolist() == [10, 20]
    assert joined["critical_step"].sel(task=["all", "b"]).notnull().all()
    assert np.isnan(joined["critical_step"].sel(step=10, task="c"))
    assert joined["resolved"].dtype == bool
    assert joined["resolved"].sel(step=20).to_series().to_dict() == {"a": False, "all": True, "b": True, "c": True}
    assert joined["reason"].sel(step=10, task="c") == ""
    assert joined["critical_step"].attrs == schema.SHARPNESS["critical_step"].attributes
    assert joined_sharpness([]) is None
