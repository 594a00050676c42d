import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.figure import Figure

from dynamics import plot
from dynamics.plot.style import words_of
from tests.fishers import BLOCKS, MEANS, with_fisher
from tests.trees import HOSTILE, example_runs, example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2))


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def bands(figure):
    return [each for each in figure.axes[0].collections if isinstance(each, FillBetweenPolyCollection)]


@pytest.mark.parametrize("variable", ["spectral_entropy", "dominant_ratio", "ln_participation_ratio"])
@pytest.mark.parametrize("block", ["global", BLOCKS[0]])
def test_draws_the_stored_numbers_with_their_interval(tree, variable, block):
    figure = plot.fisher_trajectory(tree, variable=variable, block=block)
    stored = tree["fisher"].to_dataset().sel(block=block, task="all")
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [100, 200, 300]
    assert np.array_equal(line.get_ydata(), stored[variable])
    (band,) = bands(figure)
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == stored[f"{variable}_low"].min()
    assert heights.max() == stored[f"{variable}_high"].max()


def test_says_what_it_shows(tree):
    figure = plot.fisher_trajectory(tree, variable="spectral_entropy", block=BLOCKS[1])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == f"Spectral entropy SE of the Fisher\n{BLOCKS[1]}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Optimizer step", "Spectral entropy SE (nat)")
    assert labels(figure) == ["all samples, plug-in", "95 % sampling error at this N; the Fisher's own SE is larger"]
    title, words = words_of(figure)
    assert title == f"Spectral entropy SE of the Fisher, {BLOCKS[1]}"
    first = float(tree["fisher"]["spectral_entropy"].sel(block=BLOCKS[1], task="all", step=100))
    assert words.startswith(f"Lines over optimizer steps with intervals; all samples: {first:.3g} at step 100 and ")


def test_the_dominant_ratio_is_named_for_what_it_is(tree):
    figure = plot.fisher_trajectory(tree, variable="dominant_ratio")
    assert labels(figure) == ["all samples, plug-in", "95 % interval, from held-out halves to plug-in"]
    assert figure.axes[0].get_ylabel() == "Dominant ratio ρ"


def test_each_task_has_a_line_of_its_own(tree):
    figure = plot.fisher_trajectory(tree, tasks=["all", *MEANS])
    assert labels(figure) == ["all samples", *MEANS, "95 % interval"]
    lines = figure.axes[0].lines
    stored = tree["fisher"]["ln_participation_ratio"].sel(block="global", task="document")
    assert np.array_equal(lines[2].get_ydata(), stored)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 5


def test_two_trainings_are_never_joined():
    tree = with_fisher(example_tree(3, 2, segment=[0, 0, 1]))
    figure = plot.fisher_trajectory(tree)
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[100, 200], [300]]
    assert labels(figure) == ["all samples", "95 % interval"]


def test_a_single_step_has_bars_side_by_side():
    tree = with_fisher(example_tree([7], 2), steps=(7,))
    figure = plot.fisher_trajectory(tree, tasks=["all", "chart", "document"])
    bars = [each for each in figure.axes[0].collections if isinstance(each, LineCollection)]
    places = [bar.get_segments()[0][0, 0] for bar in bars]
    assert len(set(places)) == 3
    assert all(abs(place - 7) < 0.5 for place in places)
    assert figure.axes[0].get_xticks().tolist() == [7]


def test_a_variable_without_an_interval_is_a_line(tree):
    figure = plot.fisher_trajectory(tree, variable="trace")
    assert labels(figure) == ["all samples"]
    assert figure.axes[0].get_ylabel() == "Trace of the Fisher (loss²/weight²)"


def test_missing_numbers_are_gaps_with_a_reason(tree):
    tree = tree.copy(deep=True)
    tree["fisher"]["ln_participation_ratio"][1] = np.nan
    assert np.isnan(plot.fisher_trajectory(tree).axes[0].lines[0].get_ydata()).tolist() == [False, True, False]
    tree["fisher"]["ln_participation_ratio"][:] = np.nan
    figure = plot.fisher_trajectory(tree)
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
    assert words_of(figure)[1] == "No step has a value."


def test_names_of_tasks_are_drawn_as_they_are():
    names = {"_a": MEANS["chart"], HOSTILE: MEANS["document"]}
    tree = with_fisher(example_tree([7], 2), steps=(7,), means=names)
    figure = plot.fisher_trajectory(tree, tasks=["_a", HOSTILE])
    assert labels(figure)[0] == " _a"
    assert "<script" not in plot.to_svg(figure)


def test_the_group_alone_will_do_and_axes_of_ones_own(tree):
    axes = Figure().subplots()
    figure = plot.fisher_trajectory(tree["fisher"].to_dataset(), variable="spectral_entropy", ax=axes)
    assert figure is axes.get_figure()
    assert axes.get_title() == "Spectral entropy SE of the Fisher"


def test_what_is_not_there_is_an_error(tree):
    with pytest.raises(ValueError, match=r"^Expected a task of the result, got 'x'\. There are: all, chart, "):
        plot.fisher_trajectory(tree, tasks=["x"])
    with pytest.raises(ValueError, match=r"^Expected a variable of step, block and task, got 'samples' with "):
        plot.fisher_trajectory(tree, variable="samples")
    with pytest.raises(ValueError, match=r"^Expected a result with the group /fisher, got one with \["):
        plot.fisher_trajectory(example_tree(1, 1))
    with pytest.raises(
        ValueError, match=r"^Expected the result of one run, got 1 runs\. Pass one: tree\['runs/a'\]\.$"
    ):
        plot.fisher_trajectory(example_runs(a=tree))
