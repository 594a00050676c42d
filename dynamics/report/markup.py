"""Text of files and definitions as HTML: escaped first, then marked up."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# An index after a bracket of a norm, after an increment or a singular value; not the underscore of a name.
_INDEX = re.compile(r"(?<=[‖Δσ])_(?:\{([^}]*)\}|(\w))")


def breakable(name: str) -> Markup:
    """A long dotted name that may break after its dots.

    >>> breakable("a.<b>")
    Markup('a.<wbr>&lt;b&gt;')
    """
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def formula(text: str) -> Markup:
    """A definition with its indices set low.

    >>> formula("‖Δ_{t−1}‖_F of entropy_energy")
    Markup('‖Δ<sub>t−1</sub>‖<sub>F</sub> of entropy_energy')
    """
    return Markup(_INDEX.sub(lambda index: f"<sub>{index[1] or index[2]}</sub>", str(escape(text))))
