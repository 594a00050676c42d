"""One figure in place of all."""

import pytest

from dynamics import plot


@pytest.fixture
def one_figure(monkeypatch):
    """Of the figures only one is written, where what matters is that files are written, or where."""
    all_of = plot.drawings

    def spectra(tree):
        return {name: draw for name, draw in all_of(tree).items() if name.endswith("spectra")}

    monkeypatch.setattr(plot, "drawings", spectra)
