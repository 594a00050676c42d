"""A run's stored result, wherever it lies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import xarray as xr

from dynamics.findings import Finding
from dynamics.store import FOLDER, RESULT, capture_path, read_tree, result_path
from dynamics.store.capture import CAPTURE
from dynamics.store.replace import STAGING, interrupted_elsewhere
from dynamics.text import encodable


def open_run(run: str | PathLike[str]) -> xr.DataTree:
    """Open what is stored for a run: what its training captured, merged with what was analysed of its checkpoints.

    An analysis has the captured steps in it. They are merged anew, in memory, only if the capture store holds something
    else by now; so a training can be looked at while it runs.

    Args:
        run: A run folder with ``dynamics/analysis.zarr`` or ``dynamics/capture.zarr``, the folder that these are in, or
            one of the two, which is then opened without the other.

    Returns:
        The result tree; its layout is in ``dynamics.schema``. Arrays of an analysis are read when they are used.

    Raises:
        FileNotFoundError: If nothing is stored; the message has the command that makes it.
        ValueError: If the store does not open.

    Example: the effective rank of one matrix over the steps::

        tree = dynamics.open_run("runs/imax")
        tree["update"]["effective_rank_energy"].sel(kind="total", matrix="model.layers.0.self_attn.q_proj")
    """
    folder = Path(run)
    capture = capture_path(folder)
    result = None if capture == folder else result_path(folder)
    if result is None and capture is None:
        linked = [path for path in (folder / FOLDER / RESULT, folder / RESULT) if path.is_symlink()]
        if linked:
            raise FileNotFoundError(f"'{linked[0]}' is a link, which is not followed. Open what it points to instead.")
        raise FileNotFoundError(
            f"No stored result for '{folder}' (looked for {RESULT} and {CAPTURE}, there and in {FOLDER}/). "
            f"Make one with: python -m dynamics.analyze {folder}"
        )
    if result is not None and (capture is None or result == folder):
        return add_findings(read_tree(result), incomplete(_output_folder(result)))
    # Here, not above: reading a result must not wait for torch.
    from dynamics.store.tree import capture_alone, with_capture

    assert capture is not None
    if result is None:
        return capture_alone(folder, capture)
    return add_findings(with_capture(read_tree(result), capture), incomplete(_output_folder(result)))


def incomplete(out: Path) -> list[Finding]:
    """Return findings of what another machine began to put into an output folder, and did not finish."""
    stages = interrupted_elsewhere(out)
    if not stages:
        return []
    more = f" and {len(stages) - 1} more" if len(stages) > 1 else ""
    return [
        Finding(
            "OD601",
            "Another machine, or this one before it was restarted, began to replace this result and did not finish: "
            f"{STAGING}/{stages[0]}{more}. Files of two analyses may stand side by side.",
            f"Make sure that nothing is analysing this run there, remove {STAGING}, and analyse the run again.",
            file=f"{STAGING}/{stages[0]}",
            evidence={"stages": len(stages)},
        )
    ]


def add_findings(tree: xr.DataTree, findings: Sequence[Finding]) -> xr.DataTree:
    """Add findings to those of a tree, and return it; what it holds already is not added again."""
    present = json.loads(tree.attrs.get("findings", "[]"))
    news = [entry for finding in findings if (entry := encodable(finding.to_dict())) not in present]
    if news:
        tree.attrs["findings"] = json.dumps([*present, *news], allow_nan=False)
    return tree


def _output_folder(result: Path) -> Path:
    """Return the folder of a result, which may be set aside below it."""
    return next((folder.parent for folder in result.parents if folder.name == STAGING), result.parent)
