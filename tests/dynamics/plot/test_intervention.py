from __future__ import annotations

import re

import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.style import words_of
from tests.interventions import CASES, intervention, with_intervention
from tests.trees import HOSTILE, example_tree

TASKS = ("all", "report", "vqa")
SHOWN = ("arms", "scales", "norm", "tasks", "steps")


@pytest.fixture(scope="module")
def group():
    group = intervention(*list(CASES.values())[:4], tasks=TASKS, ks=(4, 16), factors={"vqa": 3.0})
    group["captured"].loc[{"k": 4}] /= 2
    return group


def drawn(figure, label):
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def intervals(figure):
    """Both ends of all intervals, in the order in which they are drawn."""
    segments = [segment for lines in figure.axes[0].collections for segment in lines.get_segments()]
    return np.array(segments)


def title(figure):
    return figure.axes[0].get_title(loc="left")


def rows(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_arms_have_the_stored_effects_for_each_k(group):
    figure = plot.intervention(group)
    assert title(figure) == "Effects of an update and its parts, step 400"
    assert rows(figure) == [
        "whole update (full)",
        "leading directions (on)",
        "the rest (off)",
        "random directions (random)",
        "random, same norm (matched)",
    ]
    effect = group.sel(step=400, scale=1.0, task="all")
    for k in (4, 16):
        np.testing.assert_array_equal(drawn(figure, f"k = {k}")[0], effect["effect"].sel(k=k)[1:])
    np.testing.assert_array_equal(drawn(figure, "any k")[0], effect["effect"].sel(k=16, arm=["full"]))
    np.testing.assert_allclose(intervals(figure)[:4, 0, 0], effect["effect_low"].sel(k=4)[1:])
    np.testing.assert_allclose(intervals(figure)[:4, 1, 0], effect["effect_high"].sel(k=4)[1:])


def test_one_k_is_drawn_in_one_colour(group):
    figure = plot.intervention(group, k=4, step=100)
    effect = group["effect"].sel(step=100, scale=1.0, task="all", k=4)
    np.testing.assert_array_equal(drawn(figure, "k = 4, 95 % interval")[0], effect)


def test_curves_begin_where_nothing_is_added(group):
    figure = plot.intervention(group, show="scales", task="vqa")
    assert title(figure) == "Effects over length, vqa, 16 directions, step 400"
    for arm, label in (("full", "whole update"), ("on", "leading directions"), ("off", "the rest")):
        x, y = drawn(figure, label)
        np.testing.assert_allclose(x, [0, 0.25, 0.5, 1], atol=0.01)
        np.testing.assert_array_equal(y, [0, *group["effect"].sel(step=400, k=16, task="vqa", arm=arm)])


def test_the_effect_over_the_norm_stands_beside_what_would_pay_for_it(group):
    figure = plot.intervention(group, show="norm")
    at = group.sel(step=400, task="all")
    x, y = drawn(figure, "leading directions, 95 % interval")
    np.testing.assert_array_equal(x, at["captured"])
    np.testing.assert_array_equal(y, at["attributed"])
    np.testing.assert_array_equal(drawn(figure, "the same, alone")[1], at["effect"].sel(arm="on", scale=1.0))
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "pays for its norm"]
    assert (line.get_xy1(), line.get_slope()) == ((0, 0), at["effect"].sel(arm="full", scale=1.0, k=16))
    assert [text.get_text() for text in figure.axes[0].texts] == ["k = 4", "k = 16"]


def test_each_task_has_a_row_of_three_effects(group):
    figure = plot.intervention(group, show="tasks", step=200)
    assert title(figure) == "Effects by task, 16 directions, step 200"
    assert rows(figure) == ["all samples", "report", "vqa"]
    effect = group["effect"].sel(step=200, scale=1.0, k=16, arm="off")
    np.testing.assert_array_equal(drawn(figure, "the rest")[0], effect)


def test_steps_have_the_headline_of_their_own():
    group = intervention(CASES["more"], CASES["less"], ks=(4, 16))
    group["headline"][0] = [True, False]
    group["effect"].loc[{"step": 100, "k": 4}] = 7.0
    figure = plot.intervention(group, show="steps")
    assert drawn(figure, "leading directions")[1].tolist() == [7.0, CASES["less"].on]
    assert drawn(plot.intervention(group, show="steps", k=16), "leading directions")[1][0] == CASES["more"].on


def test_many_steps_have_bands():
    figure = plot.intervention(intervention(*[CASES["more"]] * 12), show="steps")
    np.testing.assert_allclose(drawn(figure, "whole update")[0], 100 * np.arange(1, 13))
    assert len(figure.axes[0].collections) == 3


def test_a_single_step_has_its_points_beside_its_tick():
    figure = plot.intervention(intervention(CASES["more"]), show="steps")
    low, high = figure.axes[0].get_xlim()
    assert low < 100 < high
    assert high - low < 1


@pytest.mark.parametrize("show", SHOWN)
def test_what_has_no_share_is_drawn_without_a_missing_number(show):
    group = intervention(CASES["unresolved"], CASES["together"], tasks=TASKS, ks=(1, 4, 16))
    paths = [line for line in plot.to_svg(plot.intervention(group, show=show)).splitlines() if " d=" in line]
    assert not [line for line in paths if re.search(r"\b(nan|inf)\b", line.lower())]


@pytest.mark.parametrize("show", SHOWN)
def test_the_legend_stays_inside_and_below_the_axes(group, show):
    figure = plot.intervention(group, show=show)
    figure.draw_without_rendering()
    legend, axes = figure.axes[0].get_legend(), figure.axes[0]
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= axes.xaxis.label.get_window_extent().y0


def test_hostile_names_are_drawn_as_they_are():
    group = intervention(CASES["more"], tasks=("all", HOSTILE, "$_a$")).assign_coords(
        arm=["full", "on", "off", "layer:3", "without_layer:" + "x" * 90]
    )
    assert "…" in rows(plot.intervention(group))[-1]
    assert rows(plot.intervention(group, show="tasks"))[2] == "$_a$"
    plot.to_svg(plot.intervention(group, show="tasks"))


def test_without_a_value_it_says_so():
    group = intervention(CASES["more"])
    group["effect"][:] = np.nan
    for show in ("arms", "scales", "steps"):
        figure = plot.intervention(group, show=show)
        assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
        assert words_of(figure)[1].endswith("Fall of the loss: no value.")
    whole = intervention(CASES["more"]).sel(arm=["full", "random"]).drop_vars("attributed")
    figure = plot.intervention(whole, show="norm")
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]


def test_it_describes_itself():
    assert words_of(plot.intervention(intervention(CASES["more"]))) == (
        "Effects of an update and its parts, step 100",
        "Points with intervals. Fall of the loss: whole update 0.0500 (95 % interval 0.0300 to 0.0700); leading "
        "directions 0.0790 (95 % interval 0.0590 to 0.0990); the rest −0.0310 (95 % interval −0.0510 to −0.0110).",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": "all"}, "Expected show to be one of arms, scales, norm, tasks, steps, got 'all'."),
        ({"k": 3}, "Expected a k of the result, got 3. There are: 4, 16."),
        ({"step": 7}, "Expected a step of the result, got 7. There are: 100, 200, 300, 400."),
        ({"task": "qa"}, "Expected a task of the result, got 'qa'. There are: all, report, vqa."),
    ],
)
def test_what_is_not_there_is_an_error(group, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plot.intervention(group, **options)


def test_a_result_without_interventions_is_an_error():
    with pytest.raises(ValueError, match=r"^Expected a result with the group /intervention, got one with"):
        plot.intervention(example_tree(1, 1))


def test_figures_of_a_result_are_those_that_have_something_to_show(group):
    def names(part):
        figures = plot.drawings(with_intervention(example_tree(1, 2), part))
        return [name.removeprefix("intervention_") for name in figures if name.startswith("intervention")]

    assert names(group) == list(SHOWN)
    assert names(group.sel(task=["all", "vqa"]).isel(step=[0])) == ["arms", "scales", "norm"]
    whole = group.sel(arm=["full", "random"]).drop_vars(["attributed", "captured"])
    assert names(whole.isel(step=[0])) == ["arms", "tasks"]
    assert names(group.where(group["step"] > 400)) == []
