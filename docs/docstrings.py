"""Make docstrings Markdown for the API pages: Sphinx roles become code, doctests become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`~?([^`]+)`")
#: A doctest that starts at the margin, to the next blank line. Those of an "Examples:" section are indented.
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrite each docstring when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace roles, literal blocks and doctests by their Markdown."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value).replace("::\n", ":\n")
            obj.docstring.value = _DOCTEST.sub(lambda doctest: f"```pycon\n{doctest[0]}\n```", text)
