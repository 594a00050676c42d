"""From stored results of many runs to one report: relating, comparing, drawing, writing.

    python -m tests.benchmarks.comparison [--runs 20] [--checkpoints 20] [--matrices 200] [--xarray]

Results are synthetic, of two groups, with scores; the aim for 20 × 20 × 200 is 60 s to the page on two cores. With
``--xarray`` the same result is also written by ``DataTree.to_zarr`` straight to the folder, which reads all metadata
again at each group.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics import plot
from dynamics.relate.run_measures import relate_runs
from dynamics.relate.score_files import ScoreRow
from dynamics.report import summarise
from dynamics.report.page import page
from dynamics.store import encodable_dataset, read_tree, write_tree
from dynamics.text import encodable
from tests.trees import example_tree


def main() -> None:
    """Read the command line and print how long each part takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--matrices", type=int, default=200)
    parser.add_argument("--xarray", action="store_true", help="write the result with xarray as well")
    args = parser.parse_args()
    names = [f"{group}_s{seed}" for seed in range(args.runs // 2) for group in ("imax", "dmax")]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        template = example_tree(steps=args.checkpoints, matrices=args.matrices)
        steps = template["update"]["step"].values.tolist()
        for name in names:
            template["summary"]["participation_ratio_quantile"] *= rng.uniform(0.9, 1.1)
            write_tree(template, Path(place) / name)
        rows = [ScoreRow(name, step, "vqa/accuracy", float(rng.uniform())) for name in names for step in steps]
        start = time.perf_counter()
        trees = {name: read_tree(Path(place) / name) for name in names}
        times = {"reading": time.perf_counter()}
        related = relate_runs(trees, rows, labels={name: name[:4] for name in names})
        tree = xr.DataTree.from_dict({f"/runs/{name}": each for name, each in trees.items()})
        for name, group in related.groups.items():
            tree[name] = xr.DataTree(encodable_dataset(group.assign_attrs(encodable(group.attrs))))
        tree.attrs["findings"] = "[]"
        times["relating and comparing"] = time.perf_counter()
        summarise(tree)
        times["summary"] = time.perf_counter()
        drawings = {name: plot.to_svg(figure) for name, figure in plot.figures(tree).items()}
        times[f"{len(drawings)} figures"] = time.perf_counter()
        size = len(page(tree, figures=drawings)) / 2**20
        times[f"page of {size:.0f} MiB"] = time.perf_counter()
        write_tree(tree, Path(place) / "result")
        times["writing"] = time.perf_counter()
        if args.xarray:
            tree.to_zarr(Path(place) / "by_xarray", zarr_format=2, consolidated=True)
            times["writing by xarray alone"] = time.perf_counter()
    before = start
    for what, now in times.items():
        print(f"{what:28} {now - before:6.1f} s")
        before = now
    print(f"{'all':28} {before - start:6.1f} s")


if __name__ == "__main__":
    main()
