"""What is kept of a study's analysis: a small tree, a report of one seed of each arm, and the figures over all runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import xarray as xr
from zarr.storage import ZipStore

#: Groups of which only the block of all parameters is kept, and groups that are kept whole.
OF_BLOCKS, WHOLE = ("fisher", "concentration", "tasks"), ("summary", "score", "training")
SAMPLES = ("sample", "sample_")


def small(tree: xr.DataTree) -> xr.DataTree:
    """All that relates runs; and the groups of runs that have the same steps, with the dimension ``run`` in front.

    What is of single matrices, blocks or samples is left out.
    """
    kept = {f"/{name}": node.to_dataset() for name, node in tree.children.items() if name != "runs"}
    runs = dict(tree["runs"].children)
    for name in (*OF_BLOCKS, *WHOLE):
        groups = [one[name].to_dataset() for one in runs.values() if name in one.children]
        if len(groups) == len(runs):
            groups = [group.sel(block=["global"]) if name in OF_BLOCKS else group for group in groups]
            groups = [group.drop_dims([dim for dim in SAMPLES if dim in group.dims]) for group in groups]
            whole = xr.concat(groups, xr.Variable("run", list(runs)), data_vars="all", combine_attrs="drop_conflicts")
            kept[f"/{name}"] = whole.drop_encoding()
    found = xr.DataTree.from_dict(kept)
    found.attrs = dict(tree.attrs)
    return found


def of_runs(tree: xr.DataTree, runs: Sequence[str]) -> xr.DataTree:
    """The same result with the groups of some of its runs only."""
    kept = {path: node.to_dataset(inherit=False) for path, node in tree.subtree_with_keys if path != "."}
    left_out = {f"runs/{run}" for run in tree["runs"].children if run not in runs}
    kept = {path: group for path, group in kept.items() if "/".join(path.split("/")[:2]) not in left_out}
    found = xr.DataTree.from_dict(kept)
    found.attrs = dict(tree.attrs)
    return found


def keep(analysis: Path, results: Path, shown: Sequence[str]) -> None:
    """Write ``study.zarr.zip``, ``report.html`` and ``figures/`` from ``OUT/analysis``.

    Args:
        analysis: Folder of a result of several runs.
        results: Where to.
        shown: Runs of the report.
    """
    from dynamics import plot
    from dynamics.report.page import page

    with xr.open_datatree(analysis / "analysis.zarr", engine="zarr") as tree:
        tree.load()
    with TemporaryDirectory() as folder:  # a zip store cannot replace what it has written
        small(tree).to_zarr(Path(folder) / "study.zarr", consolidated=False, zarr_format=2)
        shutil.make_archive(str(results / "study.zarr"), "zip", Path(folder) / "study.zarr")
    chosen = of_runs(tree, shown)
    drawn = {name: plot.to_svg(figure) for name, figure in plot.figures(chosen).items()}
    (results / "report.html").write_text(page(chosen, figures=drawn), encoding="utf-8")
    shutil.rmtree(results / "figures", ignore_errors=True)
    (results / "figures").mkdir()
    for name, svg in drawn.items():
        if "/" not in name:
            (results / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")


def kept_study(results: Path) -> xr.DataTree:
    """The small tree of kept results, read into memory."""
    with ZipStore(results / "study.zarr.zip", mode="r") as store:
        return xr.open_datatree(store, engine="zarr", consolidated=False).load()  # pyright: ignore[reportArgumentType]
