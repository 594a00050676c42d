"""The look of all figures: axes, titles, ticks and colours, and each figure as SVG text.

Nothing is changed in the user's matplotlib settings. Equal numbers give equal bytes of SVG, and every figure carries a
title and a description for readers who cannot see it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from io import StringIO
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dynamics.schema import GLOBAL
from dynamics.text import sentence_case

#: Okabe & Ito 2008, without yellow, which vanishes on white: distinguishable with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NULL_COLOUR = "#8c8c8c"
_FEW_STEPS = 3
#: Panels of one figure, and side by side.
MOST_PANELS, _COLUMNS = 6, 3
MISSING_COLOUR = "#dddddd"
#: Letters on a light cell, which stay dark in a dark scheme.
ON_LIGHT = "#262626"
#: Perceptually uniform; the order from dark to light is the same with any kind of colour vision.
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
def panel(
    ax: Axes | None, title: str, description: str, *, block: str = GLOBAL, width: float = 5.6, height: float = 3.4
) -> Iterator[Axes]:
    """Yield titled axes to draw in: the user's in their own style, or new ones in the toolkit's.

    The figure of new axes does not belong to pyplot: nothing is shown, kept open or taken from a backend.

    Args:
        ax: The user's axes, or ``None``.
        title: Of the axes; begins with a capital letter once it is drawn.
        description: What the figure shows, for readers who cannot see it; only a new figure gets one.
        block: A matrix that is named in a second line of the title; none for all trainable parameters together.
        width: Of a new figure, in inches.
        height: Of a new figure, in inches.
    """
    title = sentence_case(title)
    with mpl.rc_context(STYLE) if ax is None else nullcontext():
        axes = Figure(figsize=(width, height), layout="constrained").subplots() if ax is None else ax
        without_mathematics([axes.set_title(title if block == GLOBAL else f"{title}\n{shorten(block, 60)}")])
        yield axes
        if ax is None:
            mark_cut_axis(axes)
    if ax is None:
        describe(figure_of(axes), title if block == GLOBAL else f"{title}, {block}", description)


def figure_of(ax: Axes) -> Figure:
    """Return the figure that holds the axes."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def panels(names: Sequence[str], draw: Callable[[Axes, str], None], title: str, description: str) -> Figure:
    """Return a figure with a panel for each name.

    Args:
        names: Of the panels, ``MOST_PANELS`` at most; they come from files.
        draw: Draws in the axes of one name.
        title: Of the figure, for readers who cannot see it; begins with a capital letter.
        description: What it shows, likewise.
    """
    columns = min(max(len(names), 1), _COLUMNS)
    rows = -(-max(len(names), 1) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * columns, 2.7 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, name in zip(places, names, strict=False):
            without_mathematics([axes.set_title(shorten(name, 34))])
            draw(axes, name)
            mark_cut_axis(axes)
        if not names:
            say_nothing_to_draw(places[0], "No score has a value")
        for axes in places[max(len(names), 1) :]:
            axes.set_visible(False)
    describe(figure, sentence_case(title), description)
    return figure


def step_axis(ax: Axes, steps: Sequence[int]) -> None:
    """Label the horizontal axis with steps: whole numbers with thousands separators, one tick each for a few steps."""
    ax.set_xlabel("Optimizer step")
    few = len(steps) <= _FEW_STEPS
    ax.xaxis.set_major_locator(FixedLocator(steps) if few else MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def mark_cut_axis(ax: Axes) -> None:
    """Mark a vertical axis of numbers that does not begin at zero with a break at its foot."""
    low, high = sorted(ax.get_ylim())
    numbers = ax.get_yscale() == "linear" and not isinstance(ax.yaxis.get_major_locator(), FixedLocator)
    if not numbers or low <= 0 <= high or ax.images:
        return
    strokes = Path([(-0.01, 0.01), (0.01, 0.03), (-0.01, 0.035), (0.01, 0.055)], [Path.MOVETO, Path.LINETO] * 2)
    mark = PathPatch(strokes, transform=ax.transAxes, fill=False, color="#333333", linewidth=0.9, clip_on=False)
    mark.set_in_layout(False)
    ax.add_artist(mark)


def logarithmic(ax: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at its ticks even over less than a decade."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    within_a_decade = high / low < 12  # such a range may hold no power of ten
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if within_a_decade else (1.0,), numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def doubling_axis(ax: Axes, values: Sequence[int], label: str) -> None:
    """Make the horizontal axis logarithmic to base 2, with a tick at each value unless they would crowd."""
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
    """Draw texts from files as they are: a ``$`` in a matrix name starts no formula."""
    for text in texts:
        text.set_parse_math(False)


def shorten(name: str, length: int = 44) -> str:
    """Return a long name without its middle: both ends are needed to tell matrices apart.

    >>> shorten("model.layers.0.self_attn.q_proj", 20)
    'model.l…_attn.q_proj'
    """
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 5
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def say_nothing_to_draw(ax: Axes, reason: str = "No values: see the findings") -> None:
    """Write on empty axes why they are empty."""
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="#555555", wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


_OUTPUT: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "optimization-dynamics"}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_PROLOGUE = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)
_GLOBAL_STYLE = re.compile(r"<style type=\"text/css\">\*\{[^}]*\}</style>")
_EMPTY_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_IDENTIFIER = re.compile(r"(\bid=\"|url\(#|href=\"#)")


def describe(figure: Figure, title: str, description: str) -> None:
    """Give a figure its title and its description, which ``to_svg`` writes."""
    figure.set_label(f"{title}\n{description}")


def words_of(figure: Figure) -> tuple[str, str]:
    """Return title and description of a figure, ``""`` where it has none."""
    title, _, description = str(figure.get_label()).partition("\n")
    return title, description


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Lay a figure out for SVG; by itself, matplotlib draws all of it for the layout, and again for the file."""
    engine, canvas, dpi = figure.get_layout_engine(), figure.canvas, figure.dpi
    if engine is None:
        yield
        return
    FigureCanvasSVG(figure)
    try:
        figure.dpi = 72  # of every SVG
        engine.execute(figure)
        figure.dpi = dpi
        with mpl.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)
        yield
    finally:
        figure.dpi = dpi
        figure.set_layout_engine(engine)
        figure.set_canvas(canvas)


def to_svg(figure: Figure) -> str:
    """Return a figure as one ``<svg>`` element, for a file of its own or for a page.

    Text stays text, so it can be searched and read aloud. Identifiers carry a prefix that differs between figures, so
    several figures can share a page. Neither time nor version is written: equal figures give equal text.

    Args:
        figure: Any matplotlib figure; ``describe`` gives it its title and description.

    Raises:
        TypeError: If it is no figure.

    Example: ``Path("spectra.svg").write_text(plot.to_svg(plot.spectrum(tree)))``

    >>> to_svg(Figure())[:4]
    '<svg'
    """
    if not isinstance(figure, Figure):
        kind = type(figure).__name__
        raise TypeError(f"Expected a matplotlib figure, got {kind}. Draw one first: to_svg(plot.spectrum(tree)).")
    drawn = StringIO()
    with mpl.rc_context(_OUTPUT), warnings.catch_warnings():
        # The letters are drawn by the reader's fonts, not by the one matplotlib measures with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        with _laid_out(figure):
            figure.savefig(drawn, format="svg", metadata=_NO_METADATA)
    text = _EMPTY_METADATA.sub("", _PROLOGUE.sub("", drawn.getvalue()))
    # A style for * would reach the whole page; on the root it reaches what is inside.
    text = _GLOBAL_STYLE.sub("", text).replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    title, description = words_of(figure)
    prefix = f"f{sha256((title + text).encode()).hexdigest()[:8]}-"
    text = _IDENTIFIER.sub(rf"\g<1>{prefix}", text)
    label = ". ".join(part.rstrip(".") for part in (title, description) if part)
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    text = text.replace("<svg ", f'<svg role="img" aria-label={quoteattr(label)} ', 1)
    return re.sub(r"(<svg\b[^>]*>)", lambda root: root[1] + words, text, count=1)
