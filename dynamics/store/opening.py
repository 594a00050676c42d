"""A run's stored result, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import xarray as xr

from dynamics.findings import Finding, from_json, to_json
from dynamics.store.capture import CAPTURE
from dynamics.store.record_folders import RECORDS, record_folders, records_below
from dynamics.store.replace import ANALYSIS, PREVIOUS, RESULT
from dynamics.store.results import FOLDER, read_tree, result_path


def open_run(run: str | PathLike[str]) -> xr.DataTree:
    """Open what is stored for a run: what its training recorded, merged with what was analysed of its checkpoints.

    An analysis has the captured steps in it. They are merged anew, in memory, only if the records are others by now; so
    a training can be looked at while it runs.

    Args:
        run: A run folder with ``dynamics/analysis/`` or ``dynamics/records/``, the folder that these are in, or one of
            the two, which is then opened without the other.

    Returns:
        The result tree; its layout is in ``dynamics.schema``. Arrays of an analysis are read when they are used.

    Raises:
        FileNotFoundError: If nothing is stored; the message has the command that makes it.
        ValueError: If what is stored does not open.

    Example: the effective rank of one matrix over the steps::

        tree = dynamics.open_run("runs/imax")
        tree["update"]["effective_rank_energy"].sel(kind="total", matrix="model.layers.0.self_attn.q_proj")
    """
    folder = Path(run)
    folders = record_folders(folder)
    result = None if folders is not None and folders.path == folder else result_path(folder)
    if result is None and folders is None:
        paths = [parent / name for parent in (folder / FOLDER, folder) for name in (ANALYSIS, RESULT)]
        if linked := [path for path in paths if path.is_symlink()]:
            raise FileNotFoundError(f"'{linked[0]}' is a link, which is not followed. Open what it points to instead.")
        raise FileNotFoundError(
            f"No stored result for '{folder}' (looked for {ANALYSIS}/, {RECORDS}/, {RESULT} and {CAPTURE}, there and "
            f"in {FOLDER}/).{records_below(folder) or f' Make one with: python -m dynamics.analyze {folder}'}"
        )
    if result is None or (folders is not None and folder != result):
        # Here, not above: reading a result must not wait for torch.
        from dynamics.store.tree import records_alone, reopened

        assert folders is not None
        if result is None:
            return records_alone(folder, folders)
        return add_findings(reopened(read_tree(result), folders), _interrupted(result))
    return add_findings(read_tree(result), _interrupted(result))


def add_findings(tree: xr.DataTree, findings: Sequence[Finding]) -> xr.DataTree:
    """Add findings to those of a tree, and return it; what it holds already is not added again."""
    present = from_json(tree.attrs.get("findings", "[]"))
    if news := [finding for finding in findings if finding not in present]:
        tree.attrs["findings"] = to_json([*present, *news])
    return tree


def _interrupted(result: Path) -> list[Finding]:
    """Return a finding if the result is one whose replacement was interrupted."""
    if result.parent.name != PREVIOUS:
        return []
    return [
        Finding(
            "OD601",
            f"The last analysis was stopped while it put its result in place. This is the one before, in {PREVIOUS}/.",
            "Analyse the run again, which repairs it.",
            file=PREVIOUS,
        )
    ]
