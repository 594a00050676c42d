"""The heatmap for a page: pointing at a cell shows its value, without a script."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.colors import Normalize, to_hex

from dynamics.plot.heatmap import colour_range, describe_cells, per_cell, title_of_cells
from dynamics.plot.select import RowGroup, axis_label, group, row_groups
from dynamics.plot.style import COLOUR_MAP, MISSING_COLOUR, shorten
from dynamics.text import sentence_case

#: A page with more cells than this opens slowly and shows the picture instead.
MOST_CELLS = 12_000
_LEVELS = 64
_CELL_HEIGHT, _TOP, _BOTTOM = 11, 4, 16
_WIDTH, _CHARACTER = 340, 5.6


def fits_a_page(data: xr.DataTree | xr.Dataset) -> bool:
    """Return whether a browser opens a hover heatmap of this result at once."""
    update = group(data, "update")
    return update.sizes["step"] * update.sizes["matrix"] <= MOST_CELLS


def hover_heatmap(
    data: xr.DataTree | xr.Dataset, *, variable: str = "effective_rank_energy", kind: str = "total"
) -> tuple[str, list[tuple[str, str]]]:
    """Draw one variable as matrix × step in SVG, one panel for each role, rows by layer, all on one colour scale.

    Args:
        data: The result of one run, or its ``/update`` group.
        variable: Any variable with the dimensions step and matrix.
        kind: ``"total"`` or ``"increment"``.

    Returns:
        The colour scale, and for each role its name and its panel, both ``<svg>`` elements. Names inside the
        elements are escaped; the role's name is not.

    Raises:
        ValueError: If the variable is not in the result, or not one of matrices and steps.

    Example: ``scale, panels = plot.hover_heatmap(dynamics.open_run("runs/imax"))``
    """
    update = group(data, "update")
    values = per_cell(update, variable, kind)
    title = sentence_case(title_of_cells(update, variable, kind))
    low, high = colour_range(values)
    scale = mpl.colormaps[COLOUR_MAP].resampled(_LEVELS)
    colours = np.array([to_hex(scale(level)) for level in range(_LEVELS)])
    level = np.nan_to_num(np.asarray(Normalize(low, high)(values)) * (_LEVELS - 1)).clip(0, _LEVELS - 1).round()
    fills = np.where(np.isfinite(values), colours[level.astype(np.int64)], MISSING_COLOUR)
    steps = update["step"].values.tolist()
    names = [str(name) for name in update["matrix"].values]
    panels = []
    for rows in row_groups(update):
        description = f"{title}, {rows.label}. {describe_cells(values[list(rows.positions)], len(steps))}"
        panels.append((rows.label, _panel(rows, names, steps, values, fills, description)))
    return _colour_scale(colours, low, high, axis_label(variable)), panels


def _panel(
    rows: RowGroup, names: list[str], steps: list[int], values: np.ndarray, fills: np.ndarray, description: str
) -> str:
    labels = [shorten(label, 26) for label in rows.labels]
    left = 8 + int(_CHARACTER * max(len(label) for label in labels))
    width = min(26.0, (_WIDTH - left) / len(steps))
    # Whole pixels leave no seams; cells thinner than that overlap a little instead.
    width = float(int(width)) if width >= 2 else width
    size = f'width="{width if width >= 2 else width + 0.5:.4g}" height="{_CELL_HEIGHT}"'
    every = max(1, -(-len(labels) // 32))
    parts = []
    for row, position in enumerate(rows.positions):
        cells = "".join(
            f'<rect x="{column * width:.4g}" {size} fill="{fills[position, column]}">'
            f"<title>{escape(names[position])}, step {step:,}: {_number(values[position, column])}</title></rect>"
            for column, step in enumerate(steps)
        )
        name = f'<text x="-4" y="9" text-anchor="end">{escape(labels[row])}</text>' if row % every == 0 else ""
        parts.append(f'<g transform="translate({left:.4g} {_TOP + row * _CELL_HEIGHT})">{name}{cells}</g>')
    bottom = _TOP + len(labels) * _CELL_HEIGHT
    right = left + width * len(steps)
    ends = f'<text x="{left:.4g}" y="{bottom + 12}">step {steps[0]:,}</text>' + (
        f'<text x="{right:.4g}" y="{bottom + 12}" text-anchor="end">{steps[-1]:,}</text>' if len(steps) > 3 else ""
    )
    height = bottom + _BOTTOM
    return (
        f'<svg class="cells" shape-rendering="crispEdges" role="img" aria-label={quoteattr(description)} '
        f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">{"".join(parts)}{ends}</svg>'
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "no value"


def _colour_scale(colours: np.ndarray, low: float, high: float, label: str) -> str:
    steps = "".join(
        f'<rect x="{60 + 3 * index}" y="2" width="3.5" height="10" fill="{colour}"/>'
        for index, colour in enumerate(colours)
    )
    right = 60 + 3 * len(colours)
    words = quoteattr(f"Colour scale: {label}, from {low:.3g} (dark) to {high:.3g} (light); grey: no value")
    return (
        f'<svg class="scale" role="img" aria-label={words} width="480" height="16" viewBox="0 0 480 16">'
        f'<text x="56" y="11" text-anchor="end">{low:.3g}</text>{steps}<text x="{right + 4}" y="11">{high:.3g}</text>'
        f'<rect x="{right + 60}" y="2" width="10" height="10" fill="{MISSING_COLOUR}"/>'
        f'<text x="{right + 74}" y="11">no value</text></svg>'
    )
