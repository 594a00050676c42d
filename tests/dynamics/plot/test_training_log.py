import numpy as np
import pytest

from dynamics import plot
from tests.trees import HOSTILE, example_tree


def test_draws_what_was_logged_each_training_apart():
    tree = example_tree(segment=[0, 0, 0, 1, 1, 1])
    first, second = plot.training_log(tree).axes[0].lines
    assert first.get_ydata().tolist() == tree["training"]["value"].sel(metric="loss").values[:3].tolist()
    assert second.get_xdata().tolist() == [400, 500, 600]


def test_a_logged_nan_is_left_out():
    tree = example_tree()
    tree["training"]["value"][2] = np.nan
    (line,) = plot.training_log(tree).axes[0].lines
    assert line.get_xdata().tolist() == [100, 200, 400, 500, 600]


def test_the_name_is_the_logged_one():
    tree = example_tree()
    log = tree["training"].to_dataset().assign_coords(metric=[HOSTILE])
    figure = plot.training_log(log, variable=HOSTILE)
    assert figure.axes[0].get_title(loc="left") == f"Training log: {HOSTILE}"
    assert "<script" not in plot.to_svg(figure)


def test_a_run_without_a_log_is_refused():
    tree = example_tree()
    del tree["training"]
    with pytest.raises(
        ValueError, match=r"^Expected a result with the group /training, got one with \['update', 'null', 's"
    ):
        plot.training_log(tree)


def test_a_number_that_was_not_logged_is_refused():
    with pytest.raises(
        ValueError, match=r"^Expected the name of a number in the training log, got 'lr'\. There are: loss\.$"
    ):
        plot.training_log(example_tree(), variable="lr")
