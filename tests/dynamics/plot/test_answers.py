"""The small pictures beside the answers: what they draw, in marks and in words."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr

from dynamics.plot.answers import answer_pictures
from dynamics.report import summarise
from tests.dynamics.relate.simulated_trainings import Training
from tests.fishers import with_fisher
from tests.related import RUNS
from tests.trees import HOSTILE, example_runs, example_tree, matrix_names


def pictures(tree, **changes):
    return answer_pictures(tree, {**summarise(tree), **changes})


def label(picture):
    return ElementTree.fromstring(picture).attrib["aria-label"]


def marks(picture, tag, kind):
    """The marks of one class."""
    return [mark for mark in ElementTree.fromstring(picture).iter(tag) if mark.attrib.get("class") == kind]


def test_a_plain_run_has_norms_ranks_and_increments():
    drawn = pictures(example_tree(steps=3))
    assert set(drawn) == {"trained", "rank", "stable"}
    assert all(len(picture) < 6000 for picture in drawn.values())


def test_norms_have_a_mark_for_each_role_and_zeros_stand_out():
    names = matrix_names(14)
    tree = example_tree(steps=1, zero=names[:1])
    picture = pictures(tree)["trained"]
    assert len(marks(picture, "circle", "dot")) == 7
    assert len(marks(picture, "circle", "dot bad")) == 1
    assert "1 are exactly zero" in label(picture)
    assert "trained" not in pictures(example_tree(steps=1, zero=names))


def test_ranks_fill_the_adapters():
    tree = example_tree(steps=1, matrices=2)
    tree["update"]["suggested_rank"][:] = 4
    picture = pictures(tree)["rank"]
    assert label(picture).endswith("self_attn.k_proj: 4 of 8; self_attn.q_proj: 4 of 8")
    track, bar = (marks(picture, "line", kind)[0].attrib for kind in ("track", "bar"))
    height = [float(line["y1"]) - float(line["y2"]) for line in (track, bar)]
    assert height[1] == pytest.approx(height[0] / 2)


def test_dense_matrices_have_no_rank_to_fill():
    tree = example_tree(steps=1, matrices=2)
    tree["update"]["adapter_rank"].values[:] = 0
    assert "rank" not in pictures(tree)


def score(task, best):
    return {"task": task, "best": best and {"step": best, "score": 0.8}}


def test_the_best_score_is_ringed():
    tree = example_tree(steps=3)
    rows = [{"step": step, "increment": None, "scores": {"vqa": 0.2 * step}} for step in (1, 2, 4)]
    picture = pictures(tree, scores=[score("other", None), score("vqa", 4)], checkpoints=rows)["checkpoint"]
    assert label(picture) == "Score over steps: vqa 0.200 at step 1 and 0.800 at step 4; best at step 4"
    (ring,) = marks(picture, "circle", "best")
    points = marks(picture, "polyline", "line")[0].attrib["points"].split()
    assert f"{ring.attrib['cx']},{ring.attrib['cy']}" == points[-1]


def test_losses_since_the_start_are_drawn_where_known():
    tree = example_tree(steps=3)
    losses = Training(groups=8).draw(np.random.default_rng(0)).sel(step=[0, 100, 200])
    change = np.array([[0.0, 0.0], [-0.5, 0.1], [-0.8, np.nan]])
    names = ("change", "change_low", "change_high", "predicted_first", "predicted_second")
    tree["loss"] = xr.DataTree(losses.assign(dict.fromkeys(names, (("step", "task"), change))))
    picture = pictures(tree)["checkpoint"]
    assert label(picture).endswith("vqa 0 at step 0 and −0.800 at step 200; wiki 0 at step 0 and 0.100 at step 100")
    assert len(marks(picture, "polyline", "line retained")) == 1
    assert len(marks(picture, "line", "rule")) == 1


def test_increments_fall_beside_the_learning_rate():
    tree = example_tree(steps=3)
    log = tree["training"].to_dataset()
    names = ["learning_rate" if name == "loss" else name for name in log["metric"].values.tolist()]
    tree["training"] = xr.DataTree(log.assign_coords(metric=names))
    rows = [{"step": step, "increment": value, "scores": {}} for step, value in ((1, 4.0), (2, 2.0), (3, 0.0))]
    picture = pictures(tree, checkpoints=rows)["stable"]
    assert label(picture).startswith("Over steps: increment 4.00 at step 1 and 0 at step 3; learning rate ")
    first, *_, last = (
        float(point.partition(",")[2]) for point in marks(picture, "polyline", "line")[0].attrib["points"].split()
    )
    assert first < last  # down is a larger y
    assert len(marks(picture, "polyline", "line second")) == 1
    assert float(marks(picture, "line", "rule")[0].attrib["y1"]) == last


@pytest.mark.parametrize("values", [[], [1.0], [None, None], [np.nan, 1.0, 2.0]])
def test_few_or_missing_numbers_draw_nothing_wrong(values):
    tree = example_tree(steps=3)
    rows = [{"step": step, "increment": value, "scores": {}} for step, value in enumerate(values)]
    drawn = pictures(tree, checkpoints=rows)
    assert ("stable" in drawn) == (sum(value is not None for value in values) > 1)
    assert "nan" not in "".join(drawn.values())


def test_very_many_steps_are_thinned():
    tree = example_tree(steps=3)
    rows = [{"step": step, "increment": 1.0 + step, "scores": {}} for step in range(5000)]
    points = marks(pictures(tree, checkpoints=rows)["stable"], "polyline", "line")[0].attrib["points"].split()
    assert len(points) <= 200
    across = [float(point.partition(",")[0]) for point in points]
    assert all(left <= right for left, right in pairwise(across))


def test_cosines_and_gains_come_from_the_fisher():
    tree = with_fisher(example_tree(matrices=7, steps=3))
    summary = summarise(tree)
    drawn = answer_pictures(tree, summary)
    known = [pair for pair in summary["fisher"]["pairs"] if pair["cosine"]["value"] is not None]
    assert len(marks(drawn["tasks"], "circle", "dot")) == len(known)
    gain = tree["concentration"]["gain"].sel(block="global", k=summary["fisher"]["concentration"]["at_k"]["k"])
    assert len(marks(drawn["concentration"], "circle", "dot")) == int(np.isfinite(gain).sum())
    for question in ("tasks", "concentration"):
        assert len(marks(drawn[question], "line", "rule")) == 1
        inside = [float(y) for y in re.findall(r' y[12]="([-\d.]+)"', drawn[question])]
        assert min(inside) >= 0
        assert max(inside) <= 56


def test_gains_without_an_interval_have_none():
    tree = with_fisher(example_tree(matrices=2, steps=1), steps=(100,))
    for end in ("low", "high"):
        tree["concentration"][f"gain_{end}"][:] = np.nan
    picture = pictures(tree)["concentration"]
    (interval,) = marks(picture, "line", "range")
    assert interval.attrib["y1"] == interval.attrib["y2"]


def test_groups_have_their_runs_and_means():
    scores = xr.DataArray([[0.1], [0.3], [0.6], [np.nan]], dims=("run", "task"))
    compared = xr.Dataset(
        {
            "score": scores,
            "group_mean": (("group", "task"), [[0.2], [0.6]]),
            "run_group": ("run", ["a", "a", HOSTILE, "a"]),
        },
        {"run": RUNS[:4], "task": [HOSTILE], "group": ["a", HOSTILE]},
    )
    tree = example_runs(x=example_tree(steps=1))
    tree["score_comparison"] = xr.DataTree(compared)
    picture = answer_pictures(tree, {})["recipe"]
    assert len(marks(picture, "circle", "dot")) == 3
    assert len(marks(picture, "line", "range")) == 2
    assert "means: a 0.200; " in label(picture)
    assert "<script" not in picture
    assert answer_pictures(example_runs(x=example_tree(steps=1)), {}) == {}
