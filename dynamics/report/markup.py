"""Text of files and definitions as HTML: escaped first, then marked up."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# An index after a bracket of a norm, after an increment, a gradient, a singular value, a sum, or a letter that stands
# alone; not the underscore of a name.
_INDEX = re.compile(r"(?:(?<=[‖Δσ∇ΣμḡFKL])|(?<=\b[vf]))_(?:\{([^}]*)\}|((?<=K_)[a-z]{2}|\w))")


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
    >>> formula("Σ_{j≤k} K_ij², v_j of null_gradient")
    Markup('Σ<sub>j≤k</sub> K<sub>ij</sub>², v<sub>j</sub> of null_gradient')
    """
    return Markup(_INDEX.sub(lambda index: f"<sub>{index[1] or index[2]}</sub>", str(escape(text))))
