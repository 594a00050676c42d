import re

import numpy as np
import pytest

from dynamics import plot
from tests.related import many_tasks, related_groups, texts


@pytest.fixture(scope="module")
def group():
    return related_groups()["association"]


def test_writes_the_stored_numbers_and_names_as_they_are(group):
    written = texts(plot.association_grid(group))
    value = group["coefficient"].sel(task="vqa/accuracy", measure="total/stable_rank").item()
    assert np.isfinite(value)
    assert any(f"{value:.2f}".replace("-", "−") in text for text in written)
    assert "$x$/f1" in written


def test_brackets_are_for_what_is_not_significant(group):
    changed = group.copy(deep=True)
    changed["holds"][:] = True
    assert not [text.get_text() for text in plot.association_grid(changed).axes[0].texts if "(" in text.get_text()]
    changed["holds"][:] = False
    assert all(text.get_text().startswith("(") for text in plot.association_grid(changed).axes[0].texts)


def test_of_many_tasks_twenty_are_drawn():
    figure = plot.association_grid(many_tasks())
    assert max(figure.get_size_inches()) <= 30
    assert figure.axes[0].get_title(loc="left") == "Correlation with scores, 20 of 301 tasks"


def test_it_becomes_svg(group):
    assert plot.to_svg(plot.association_grid(group)).startswith("<svg")


def test_unknown_tasks_are_refused(group):
    with pytest.raises(ValueError, match=re.escape("Expected tasks of the association, got 'no'. There are: ")):
        plot.association_grid(group, tasks=["no"])
