import numpy as np
import pytest

from dynamics import plot
from tests.trees import example_tree


def with_noise(batch: float):
    tree = example_tree(gradients=[100, 200, 300])
    gradient = tree["gradient"].to_dataset()
    gradient["noise_to_signal"][:] = [np.nan, 4.0, 2.0]
    gradient["batch_size"][:] = batch
    gradient["noise_scale"][:] = gradient["noise_to_signal"] * batch
    tree["gradient"] = gradient
    return tree


@pytest.mark.parametrize(
    ("batch", "expected", "unit"), [(16.0, [64.0, 32.0], "samples"), (np.nan, [4.0, 2.0], "batches")]
)
def test_draws_noise_beside_the_batch(batch, expected, unit):
    figure = plot.noise_scale(with_noise(batch))
    line, edge = figure.axes[0].lines
    assert line.get_ydata()[1:].tolist() == expected
    assert (edge.get_ydata() == (1.0 if np.isnan(batch) else batch)).all()
    assert figure.axes[0].get_ylabel() == f"Noise scale ({unit})"
    assert "noise_scale" in plot.drawings(with_noise(batch))


def test_without_micro_batches_there_is_no_figure():
    tree = example_tree(gradients=[100, 200])
    assert "noise_scale" not in plot.drawings(tree)
    assert "No step has a noise scale" in [text.get_text() for text in plot.noise_scale(tree).axes[0].texts]


def test_a_result_of_an_earlier_version_is_refused():
    gradient = example_tree(gradients=[100, 200])["gradient"].to_dataset().drop_vars(["noise_to_signal", "batch_size"])
    with pytest.raises(ValueError, match="noise_to_signal"):
        plot.noise_scale(gradient)


def test_a_run_without_gradients_is_refused():
    with pytest.raises(ValueError, match="Expected a result with the group /gradient"):
        plot.noise_scale(example_tree())
