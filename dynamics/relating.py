"""Several runs, or one with scores: what the root of a result says of how they differ and what goes with scores."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from dynamics.checkpoints.score_files import read_scores, score_files
from dynamics.options import Options
from dynamics.relate.of_runs import relate
from dynamics.store import encodable, encodable_dataset
from dynamics.stored.tree import as_json


def add_relations(
    tree: xr.DataTree,
    trees: Mapping[str, xr.DataTree],
    folders: Mapping[str, Path],
    options: Options,
    labels: Mapping[str, str],
) -> None:
    """Adds ``/association`` and ``/comparison`` to the root, where there are scores or groups."""
    named = trees if "runs" in tree.children else {Path(os.path.abspath(folders[""])).name: tree}
    places = dict(zip(named, folders.values(), strict=True))
    files = [read_scores(path, run=name) for name, folder in places.items() for path in score_files(folder)]
    files += [read_scores(path) for path in options.scores]
    rows = [row for file in files for row in file.rows]
    directions = dict.fromkeys(options.higher, "higher") | dict.fromkeys(options.lower, "lower")
    related = relate(named, rows, headline=options.headline, directions=directions, labels=labels)
    for name, group in related.groups.items():
        tree[name] = xr.DataTree(encodable_dataset(group.assign_attrs(encodable(group.attrs))))
    found = [finding for file in files for finding in file.findings]
    if related.groups or rows or options.scores:
        found += related.findings
    if found:
        tree.attrs["findings"] = json.dumps([*json.loads(tree.attrs["findings"]), *json.loads(as_json(found))])
