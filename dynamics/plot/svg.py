"""Figures as SVG text: the same bytes for the same numbers, and words for those who cannot see them."""

from __future__ import annotations

import re
import warnings
from hashlib import sha256
from io import StringIO
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl
from matplotlib.figure import Figure

_OUTPUT: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "optimization-dynamics"}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_PROLOGUE = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)
_GLOBAL_STYLE = re.compile(r"<style type=\"text/css\">\*\{[^}]*\}</style>")
_EMPTY_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_IDENTIFIER = re.compile(r"(\bid=\"|url\(#|href=\"#)")


def describe(figure: Figure, title: str, description: str) -> None:
    """Gives a figure its words: a title, and what it shows."""
    figure.set_label(f"{title}\n{description}")


def words_of(figure: Figure) -> tuple[str, str]:
    """Title and description of a figure, ``""`` where it has none."""
    title, _, description = str(figure.get_label()).partition("\n")
    return title, description


def to_svg(figure: Figure) -> str:
    """A figure as one ``<svg>`` element that can stand alone or inside a page.

    Text stays text (it can be searched and read aloud). Identifiers carry a prefix of the figure's own, so that
    several figures can share a page. Neither time nor version is written: equal figures give equal text.

    Args:
        figure: Any matplotlib figure; ``describe`` gives it its title and description.
    """
    drawn = StringIO()
    with mpl.rc_context(_OUTPUT), warnings.catch_warnings():
        # The letters are drawn by the reader's fonts, not by the one matplotlib measures with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
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
