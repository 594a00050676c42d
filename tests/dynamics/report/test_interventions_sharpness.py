"""How far a step could have gone, in the summary and on the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from dynamics import critical_sharpness
from dynamics.report import summarise
from dynamics.report.interventions import sharpness_summary
from dynamics.report.page import page
from probes import Task
from tests.trees import HOSTILE, example_tree


def squares(curvature: float):
    return lambda model, batch: curvature * model(batch["x"].double())[:, 0] ** 2 / 2


def tree_with(length: float | None, *, tasks: int = 1, weight: float = 1.0) -> xr.DataTree:
    """A result with a quadratic's sharpness at step 20, from step 10: along a step −length, or of gradient descent."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, weight)
    samples = [{"x": [1.0]}] * 2
    names = ["square", HOSTILE][:tasks]
    measured = critical_sharpness(
        nn.Sequential(layer),
        [Task(name, samples, loss=squares(1.0 + number)) for number, name in enumerate(names)],
        None if length is None else {"0": torch.tensor([[-length]], dtype=torch.float64)},
        lr=0.5 if length is None else None,
        step=20,
    )
    tree = example_tree(matrices=2, steps=[10, 20])
    group = measured.assign_coords(from_step=("step", np.array([10])), recorded=("step", [True]))
    tree["sharpness"] = xr.DataTree(group)
    return tree


@pytest.mark.parametrize(
    ("length", "weight", "sentence"),
    [
        (0.5, 1.0, "At step 10 the update to step 20 could have been 4.00 times as long before the loss is where it "
         "began (95 % interval 4.00 to 4.00)."),
        (4.0, 1.0, "At step 10 the update to step 20 went too far: the loss is where it began at 0.500 of its length "
         "(95 % interval 0.500 to 0.500)."),
        (None, 1.0, "At step 10 the critical sharpness is 1.00 (95 % interval 1.00 to 1.00): gradient descent lowers "
         "the loss of the probe samples while it is below 2/η = 4.00."),
        (-1.0, 1.0, "At step 10 it is not known how far a step could go: the loss rises at once."),
        (0.5, float("nan"), "At step 10 it is not known how far a step could go: the loss at the start is not finite."),
    ],
)  # fmt: skip
def test_the_sentence_is_the_quadratics_truth(length, weight, sentence):
    summary = sharpness_summary(tree_with(length, weight=weight))
    assert summary["statement"] == sentence


def test_every_pair_of_tasks_is_in_the_summary_and_on_the_page():
    tree = tree_with(0.5, tasks=2)
    summary = summarise(tree)
    assert json.loads(json.dumps(summary, allow_nan=False))["sharpness"] == summary["sharpness"]
    pairs = {(pair["along"], pair["of"]): pair["value"] for pair in summary["sharpness"]["pairs"]}
    # Gradients w and 2w: from w to −w at η = 2 along the first, at η = 1 along the second.
    assert pairs["square", HOSTILE] == pytest.approx(1.0, rel=1e-6)
    assert pairs[HOSTILE, "square"] == pytest.approx(2.0, rel=1e-6)
    assert len(pairs) == 6
    html = page(tree, figures={})
    assert "How long may a step be?" in html
    assert summary["sharpness"]["statement"] in html
    assert HOSTILE not in html


def test_there_is_none_without_a_measurement():
    summary = summarise(example_tree())
    assert summary["sharpness"] is None
    assert "How long may a step be?" not in page(example_tree(), figures={})
