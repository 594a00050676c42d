"""What the parts of an update do, in the summary, in the terminal and on the page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dynamics
from dynamics import plot
from dynamics.intervention.findings import VERDICTS, findings_of, statements
from dynamics.report import summarise
from dynamics.report.interventions import intervention_summary
from dynamics.report.page import page
from probes import Task, gradient_gram
from tests.interventions import CASES, intervention, with_intervention
from tests.trees import HOSTILE, example_tree

TASKS = ("all", "report", "vqa")


@pytest.fixture(scope="module")
def group():
    return intervention(CASES["more"], CASES["together"], CASES["less"], tasks=TASKS, ks=(4, 16), factors={"vqa": 3.0})


@pytest.fixture(scope="module")
def tree(group):
    return with_intervention(example_tree(3, 2), group)


@pytest.fixture(scope="module")
def measured():
    """The group of one gradient step of a linear regression, as it is measured."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    scales, truth = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2]), torch.ones(6)
    inputs = torch.randn(64, 6, generator=generator) * scales
    noise = 0.1 * torch.randn(64, generator=generator)
    samples = [{"x": row, "y": row @ truth + error} for row, error in zip(inputs, noise, strict=True)]

    def squares(model, batch):
        return (model(batch["x"].double())[:, 0] - batch["y"]) ** 2 / 2

    tasks = [Task(name, samples[first::2], loss=squares) for first, name in enumerate(TASKS[1:])]
    change = {"weight": 0.05 * (scales**2 * truth).double()[None]}
    arms = dynamics.counterfactuals(layer, tasks, gradient_gram(layer, tasks, update=change), change, k=(4, 1))
    return dynamics.intervene(layer, tasks, arms, step=30)


def section(text):
    return text[text.index("<h2>Does the concentration matter?") : text.index("<h2>Where and when?")]


def test_it_is_a_key_of_the_summary_and_survives_json(tree):
    told = summarise(tree)["intervention"]
    assert told == intervention_summary(tree) == json.loads(json.dumps(told, allow_nan=False))


def test_the_last_step_is_told_with_what_it_was_measured_from(group, tree):
    told = intervention_summary(tree)
    names = ("step", "k", "space", "splits", "groups", "samples", "share_outside_space", "norm_deviation")
    assert [told[name] for name in names] == [300, 16, "tangent", 2, 40, 80, 0.0, 3e-7]
    assert (told["repeat_deviation"], told["verdict"]) == (0.0, "less")
    assert told["statements"] == statements(group)
    assert told["steps"] == {"of": 3, **dict.fromkeys(VERDICTS, 0), "more": 1, "together": 1, "less": 1}


def test_the_headline_comes_first_and_every_k_and_task_has_a_row(group, tree):
    rows = intervention_summary(tree)["parts"]
    assert [(row["k"], row["task"]) for row in rows] == [(k, task) for k in (16, 4) for task in TASKS]
    vqa = group.sel(step=300, k=16, task="vqa")
    for name in ("excess", "interaction", "attributed", "share", "efficiency", "sufficiency", "necessity"):
        ends = {"value": f"{name}", "low": f"{name}_low", "high": f"{name}_high"}
        assert rows[2][name] == {word: float(vqa[end]) for word, end in ends.items()}
    for name in ("captured", "excess_p", "relative_excess", "separable_scale"):
        assert rows[2][name] == float(vqa[name])
    assert rows[2]["off"]["high"] == float(vqa["effect_high"].sel(arm="off", scale=1.0))


def test_every_arm_has_its_effect_at_the_headline(group, tree):
    arms = intervention_summary(tree)["arms"]
    assert [row["arm"] for row in arms] == ["full", "on", "off", "random", "matched"]
    at = group.sel(step=300, k=16, task="all", arm="random")
    assert arms[3]["norm"] == float(at["norm"])
    assert arms[3]["effect"]["low"] == float(at["effect_low"].sel(scale=1.0))
    assert arms[3]["required_groups"] == 400
    assert arms[3]["score_effect"] == {"value": None, "low": None, "high": None}


def test_a_score_of_one_task_alone_is_told(group):
    at = {"arm": "on", "k": 16, "task": "vqa"}
    scored = group.copy(deep=True)
    for end, value in (("", 0.2), ("_low", 0.1), ("_high", 0.3)):
        if f"score_effect{end}" not in scored:
            scored[f"score_effect{end}"] = scored["norm"].expand_dims(task=scored["task"]) * np.nan
        scored[f"score_effect{end}"].loc[at] = value
    arms = intervention_summary(with_intervention(example_tree(1, 1), scored))["arms"]
    assert arms[1]["score_effects"] == {"vqa": {"value": 0.2, "low": 0.1, "high": 0.3}}
    assert arms[0]["score_effects"] == {}
    assert arms[1]["score_effect"]["value"] is None


def test_missing_numbers_are_none():
    unresolved = intervention(CASES["unresolved"], share_outside_space=None, norm_deviation=[2e-7, 3e-7])
    told = intervention_summary(with_intervention(example_tree(1, 1), unresolved))
    assert (told["share_outside_space"], told["norm_deviation"]) == (None, 3e-7)
    assert told["parts"][0]["share"] == {"value": None, "low": None, "high": None}
    assert intervention_summary(example_tree(1, 1)) is None
    empty = intervention(CASES["more"])
    empty["effect"][:] = np.nan
    assert intervention_summary(with_intervention(example_tree(1, 1), empty)) is None


def test_without_parts_there_are_arms_alone():
    names = ["effect", "effect_low", "effect_high", "norm", "headline", "required_groups"]
    whole = intervention(CASES["more"]).sel(arm=["full", "random"])[names]
    tree = with_intervention(example_tree(1, 1), whole)
    told = intervention_summary(tree)
    assert (told["verdict"], told["parts"], len(told["arms"])) == ("", [], 2)
    assert "<table" not in section(page(tree, figures={}))


def test_the_page_has_a_section_with_figures_and_a_row_for_each_k_and_task(tree):
    text = page(tree)
    part = section(text)
    assert part.count("<figure>") == 5
    assert part.count('<th scope="row">') == 6
    assert "<p>Of the update to step 300, 50.0 % of the squared norm lies in the 16 leading directions" in part
    assert "<td>−0.12 (−0.14 to −0.095)</td>" in part
    assert "<code>intervention/excess</code>" in text


def test_a_run_that_was_not_intervened_on_has_no_section():
    assert "Does the concentration matter?" not in page(example_tree(1, 1), figures={})


def test_names_of_tasks_are_escaped():
    scored = replace(CASES["more"], score=(0.1, 0.2))
    group = intervention(scored, tasks=("all", HOSTILE, "b"), factors={HOSTILE: 2.0})
    text = page(with_intervention(example_tree(1, 1), group), figures={})
    assert "<script>alert" not in text
    assert text.count("<script") == 1


def test_what_was_measured_is_told_and_drawn(measured):
    tree = with_intervention(example_tree(1, 1), measured)
    told = intervention_summary(tree)
    assert (told["step"], told["k"], [row["k"] for row in told["parts"]]) == (30, 4, [4, 4, 4, 1, 1, 1])
    assert told["verdict"] in VERDICTS
    assert told["statements"][0].startswith("Of the update to step 30, ")
    assert {finding.code for finding in findings_of(measured)} <= {"OD701", "OD702", "OD703"}
    full, on, off = (measured["effect"].sel(arm=arm, scale=1.0) for arm in ("full", "on", "off"))
    np.testing.assert_allclose(measured["attributed"], (on + full - off) / 2)
    assert measured["resolved"].all()
    np.testing.assert_allclose(measured["share"], (measured["attributed"] / full).where(measured["separable"]))
    for show in ("arms", "scales", "norm", "tasks"):
        assert plot.to_svg(plot.intervention(measured, show=show)).startswith("<svg")
