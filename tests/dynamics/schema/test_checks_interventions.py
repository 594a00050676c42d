"""The group of interventions, in a result and in a record of strangers: what is wrong with it is said."""

import re

import numpy as np
import pytest
import xarray as xr

from dynamics import open_run
from dynamics.schema import INTERVENTION, INTERVENTION_AXES, INTERVENTION_FLAGS, check, check_record
from dynamics.store.records import OPTIONAL, TABLES, joined_interventions
from tests.records import effects
from tests.runs import write_records


def problem(group):
    return check_record({"intervention": group}, TABLES, OPTIONAL).get("intervention")


def test_a_good_record_has_no_problem():
    assert problem(effects()) is None
    assert problem(effects(lacking=("score_effect", "share", "captured", "resolved"))) is None


def with_values(name, values):
    group = effects()
    variable = xr.Variable(group[name].dims, values, group[name].attrs)
    return group.assign_coords({name: variable}) if name in group.coords else group.assign({name: variable})


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (effects(lacking=("effect",)), "lacks 'effect' with the dimensions ('step', 'arm', 'k', 'scale', 'task')"),
        (effects().drop_vars("from_step"), "lacks 'from_step' with the dimensions ('step',)"),
        (with_values("from_step", [20]), "is an increment since a later step"),
        (with_values("resolved", np.ones((1, 1, 2))), "holds no truth values in 'resolved'"),
        (with_values("norm", np.ones((1, 3, 1), dtype=bool)), "holds no numbers in 'norm'"),
        (with_values("k", [0]), "has a number in 'k' that is not from 1 to 999999999999"),
        (with_values("scale", [1, 2]), "holds no numbers in 'scale'"),
        (with_values("scale", [1.0, 1.0]), "has a k or a scale twice, or a scale that is not above 0"),
        (with_values("scale", [-1.0, 1.0]), "has a k or a scale twice, or a scale that is not above 0"),
        (with_values("scale", [0.5, 2.0]), "lacks the scale 1"),
        (with_values("arm", ["full", "on", "on"]), "has two arms of one name"),
        (with_values("arm", ["on", "off", "x"]), "lacks the task 'all' or the arm 'full'"),
        (with_values("task", ["a", "b"]), "lacks the task 'all' or the arm 'full'"),
        (with_values("captured", np.full((1, 1, 2), 1e200)), "has a number in 'captured' that is not from -1e+100 to"),
        (effects().assign_attrs(space="other"), "does not say its space"),
        (effects().assign_attrs(groups="8"), "does not say its splits, groups and samples"),
        (effects().assign_attrs(norm_deviation="small"), "has a 'norm_deviation' that is no number"),
    ],
)
def test_what_is_wrong_is_said(group, words):
    assert words in (problem(group) or "")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    run = tmp_path_factory.mktemp("rules")
    write_records(run, [10, 20])
    return open_run(run).load()


def test_a_result_keeps_the_rules(tree):
    group = joined_interventions([effects(10), effects(20, arms=("full", "on", "off", "random"), ks=(4,))])
    check(tree.assign({"intervention": xr.DataTree(group)}))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (effects().drop_vars("effect"), "/intervention lacks 'effect'"),
        (effects().drop_vars("arm"), "/intervention lacks the coordinate 'arm'"),
        (effects(arms=("full", "on", "on")), "/intervention names a step, an arm, a k, a scale or a task twice"),
        (effects(tasks=("a", "b")), "/intervention lacks the task 'all'"),
        (with_values("resolved", np.ones((1, 1, 2))), "/intervention/resolved is float64, expected bool"),
        (effects().transpose("task", ...), "/intervention/effect has dimensions ('task', 'step', 'arm', 'k', 'scale')"),
        (effects().assign_coords(from_step=("k", [1])), "/intervention has the coordinate 'from_step' on ('k',)"),
    ],
)
def test_a_result_that_breaks_one_is_refused(tree, group, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(tree.assign({"intervention": xr.DataTree(group)}))


def test_every_dimension_has_a_coordinate():
    dims = {dim for variable in INTERVENTION.values() for dim in variable.dims}
    assert dims == {"step", *INTERVENTION_AXES}
    assert set(INTERVENTION_FLAGS) < set(INTERVENTION)
