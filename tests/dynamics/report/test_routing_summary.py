"""The summary, the page and the terminal say how even loads are and who was trained, with names escaped."""

from __future__ import annotations

from io import StringIO

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from dynamics.report.page import page
from dynamics.report.routing_summary import routing_summary
from dynamics.report.summary import summarise
from dynamics.report.terminal import terminal_numbers
from tests.dynamics.plot.test_routing import measured
from tests.trees import example_tree


def tree(**options) -> xr.DataTree:
    result = example_tree(3, 2)
    result["routing"] = xr.DataTree(measured(**options))
    return result


def test_numbers_are_those_of_the_last_step():
    summary = routing_summary(tree())
    assert summary is not None
    assert summary["step"] == 200
    row = summary["layers"][1]
    assert {name: row[name] for name in ("layer", "routing", "experts", "tokens", "largest_expert", "dead")} == {
        "layer": "b.mlp",
        "routing": "top-k",
        "experts": 3,
        "tokens": 6,
        "largest_expert": 0,
        "dead": 1,
    }
    assert row["largest_share"] == pytest.approx(10 / 12)
    assert row["load_update_correlation"] == pytest.approx(1.0)


def test_the_sentence():
    summary = routing_summary(tree())
    assert summary is not None
    assert summary["sentence"] == (
        "Tokens are spread as if over 76 % of the experts of a layer (median of 2 layers). The largest load is that of "
        "expert 0 of b.mlp: 83.3 % of its layer's, 2.5 times a uniform load. 1 of 6 experts got no token. Rank "
        "correlation of load and increment over the experts of a layer: 1.0 (median over layers; near 1, experts with "
        "more tokens moved more)."
    )


def test_without_routing_there_is_none():
    assert routing_summary(example_tree(3, 2)) is None
    empty = measured()
    empty["load"][:] = empty["largest_share"][:] = np.nan
    result = example_tree(3, 2)
    result["routing"] = xr.DataTree(empty)
    assert routing_summary(result)["sentence"] == "No router was called at the last step with routing."


def test_the_page_has_a_section_and_the_terminal_a_sentence():
    result = tree(names=("<script>a", "b.mlp"))
    html = page(result)
    assert 'data-contents="Experts"' in html
    assert "&lt;script&gt;a" in html
    assert "<script>a" not in html
    output = StringIO()
    Console(file=output, width=80).print(terminal_numbers(summarise(result)))
    assert "Tokens are spread as if over 76 %" in " ".join(output.getvalue().split())
    assert 'data-contents="Experts"' not in page(example_tree(3, 2))
