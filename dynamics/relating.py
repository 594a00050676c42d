"""Several runs, or one with scores: what the root of a result says of how they differ and what goes with scores."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import xarray as xr

from dynamics.findings import Finding
from dynamics.options import Options
from dynamics.relate.association import Given
from dynamics.relate.run_measures import Related, relate
from dynamics.relate.score_files import read_scores, score_files
from dynamics.store import encodable_dataset
from dynamics.store.tree import as_json
from dynamics.text import encodable, first_line


def add_relations(
    tree: xr.DataTree,
    trees: Mapping[str, xr.DataTree],
    folders: Mapping[str, Path],
    options: Options,
    labels: Mapping[str, str],
) -> None:
    """Add ``/association`` and ``/comparison`` to the root, where there are scores or groups.

    What fails here is a finding (OD515): it never costs what was measured of the runs.
    """
    named = trees if "runs" in tree.children else {Path(os.path.abspath(folders[""])).name: tree}
    paths = dict(zip(named, folders.values(), strict=True))
    files = [read_scores(path, run=name) for name, folder in paths.items() for path in score_files(folder)]
    files += [read_scores(path) for path in options.scores]
    rows = [row for file in files for row in file.rows]
    directions = dict.fromkeys(options.higher, "higher") | dict.fromkeys(options.lower, "lower")
    try:
        related = relate(
            named,
            rows,
            headline=options.headline,
            given=cast(Given | None, options.given),
            directions=directions,
            labels=labels,
        )
        for name, group in related.groups.items():
            tree[name] = xr.DataTree(encodable_dataset(group.assign_attrs(encodable(group.attrs))))
    except Exception as error:
        problem = f"Scores and groups could not be related: {type(error).__name__}: {first_line(error)}."
        failed = [Finding("OD515", problem, "Please report it, with the score files.")]
        related = Related({}, ())
    else:
        failed = list(related.findings) if related.groups or rows or options.scores else []
    findings = [*(finding for file in files for finding in file.findings), *failed]
    if findings:
        tree.attrs["findings"] = json.dumps([*json.loads(tree.attrs["findings"]), *json.loads(as_json(findings))])
