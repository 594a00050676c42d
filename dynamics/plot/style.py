"""One look for all figures, and none of it in the user's settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

#: Okabe & Ito 2008, without yellow, which vanishes on white: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NULL_COLOUR = "#8c8c8c"
_FEW_STEPS = 3
MISSING_COLOUR = "#dddddd"
#: Perceptually uniform, the same order of light and dark with any kind of colour vision.
COLOUR_MAP = "viridis"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    # Figures are written with text as text: Verdana and DejaVu are equally wide, the others are narrower.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@contextmanager
def canvas(ax: Axes | None, width: float = 5.6, height: float = 3.4) -> Iterator[Axes]:
    """The user's axes as they are, or new ones in the toolkit's style.

    A figure of its own, not one of pyplot: nothing is shown, kept open or taken from a backend.

    Args:
        ax: The user's axes, or ``None``.
        width: Of a new figure, in inches.
        height: Of a new figure, in inches.
    """
    if ax is not None:
        yield ax
        return
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained").subplots()


def figure_of(ax: Axes) -> Figure:
    """The figure that holds the axes."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def step_axis(ax: Axes, steps: Sequence[int]) -> None:
    """Whole numbers with thousands separated, as steps are; of few steps each has its tick."""
    ax.set_xlabel("optimizer step")
    few = len(steps) <= _FEW_STEPS
    ax.xaxis.set_major_locator(FixedLocator(steps) if few else MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def logarithmic(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers, and with some of them even for less than a decade."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    within_a_decade = high / low < 12  # which may hold no power of ten at all
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if within_a_decade else (1.0,), numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def doubling_axis(ax: Axes, values: Sequence[int], label: str) -> None:
    """A horizontal axis on which doublings are equally far apart, with a tick at each value but crowded ones."""
    ax.set_xscale("log", base=2)
    kept = [
        value for value, beyond in zip(values, [*values[1:], None], strict=True) if not beyond or beyond >= 1.4 * value
    ]
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.set_xlabel(label)


def without_mathematics(texts: Iterable[Text]) -> None:
    """Texts that come from files are drawn as they are: a ``$`` in a matrix name starts no formula."""
    for text in texts:
        text.set_parse_math(False)


def shorten(name: str, length: int = 44) -> str:
    """A long name with its middle left out: both ends tell matrices apart.

    >>> shorten("model.layers.0.self_attn.q_proj", 20)
    'model.l…_attn.q_proj'
    """
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 5
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def say_nothing_to_draw(ax: Axes, reason: str) -> None:
    """Empty axes say why they are."""
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="#555555", wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
