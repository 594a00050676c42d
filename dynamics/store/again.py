"""Results made when they are opened: of a training without an analysis, or one that has gone on since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xarray as xr

from dynamics.checkpoints.logs import log_groups
from dynamics.findings import Finding
from dynamics.store import read_capture
from dynamics.store.merge import raw_of
from dynamics.store.probed import raw_fisher
from dynamics.store.records import captured, find_captured, finding_of, is_current
from dynamics.store.sources import without_checkpoints
from dynamics.store.tree import Parts, as_json, result_tree

#: Groups that the records do not change.
_KEPT = ("training", "score", "path", "base", "weights", "association")
#: Findings that follow from the numbers of ``/update``: they are found anew.
_FROM_NUMBERS = ("OD202", "OD203", "OD204", "OD205", "OD206", "OD208")
#: What findings about ``/association`` begin with: they stay with it.
_OF_RELATIONS = "OD5"


def capture_alone(run: Path, store: Path) -> xr.DataTree:
    """The result of a training of which nothing else is stored.

    Args:
        run: As it was asked for.
        store: Its capture store.

    Raises:
        FileNotFoundError: If no step is captured yet.
        ValueError: If the store does not open.
    """
    records = captured(read_capture(store))
    if records.update is None:
        raise FileNotFoundError(
            f"The capture store '{store}' holds no step that can be used. Wait for the first one, or analyse "
            f"checkpoints with: python -m dynamics.analyze {run}"
        )
    trajectory = without_checkpoints(store)
    parts = Parts(trajectory.name, None, records, log_groups(trajectory), trajectory.findings)
    return result_tree(parts, _mapping(records.attributes.get("configuration")))


def with_capture(stored: xr.DataTree, store: Path) -> xr.DataTree:
    """An analysis with the records as they are now; as it is if it has them already, or is of several runs."""
    if "runs" in stored.children or is_current(_mapping(stored.attrs.get("captured")), store):
        return stored
    attributes = stored.attrs
    configuration = _mapping(attributes["configuration"])
    matrices = configuration.get("matrices")
    records, problems = find_captured(store, matrices if isinstance(matrices, str) else None)
    if records is None or records.update is None:
        earlier = _findings(attributes["findings"])
        news = [*problems, *(records.findings if records else ())]
        attributes["findings"] = as_json([*earlier, *(finding for finding in news if finding not in earlier)])
        return stored
    told = _findings(attributes["checkpoint_findings" if "captured" in attributes else "findings"])
    told += [
        finding
        for finding in _findings(attributes["findings"])
        if finding.code.startswith(_OF_RELATIONS) and finding not in told
    ]
    parts = Parts(
        run=str(attributes["run"]),
        checkpoints=_checkpoints(stored),
        captured=records,
        logs={name: stored[name].to_dataset() for name in _KEPT if name in stored.children},
        findings=[finding for finding in told if finding.code not in _FROM_NUMBERS],
        inputs=[each for each in json.loads(attributes["inputs"]) if "captured_steps" not in each],
        fisher=raw_fisher(stored),
    )
    tree = result_tree(parts, configuration)
    tree.attrs |= {name: attributes[name] for name in ("label",) if name in attributes}
    return tree


def _checkpoints(stored: xr.DataTree) -> xr.Dataset | None:
    """The raw update of the checkpoints alone."""
    if "captured" not in stored.attrs:
        return raw_of(stored["update"].to_dataset())
    return stored["checkpoints"].to_dataset().load() if "checkpoints" in stored.children else None


def _mapping(content: Any) -> dict[str, Any]:
    """An object from JSON, or the text of one; empty if it is none."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _findings(text: str) -> list[Finding]:
    return [finding for each in json.loads(text) if (finding := finding_of(each))]
