"""What the study found, as small tables: units, differences between arms, associations, clusters, stages.

Differences are means over paired seeds with an interval of Student's t, and the exact sign-flip test: over all 2ⁿ
signs of the n differences, how often their mean is as far from 0. With 8 seeds the smallest two-sided p is 2/2⁸ =
0.008. One measure is primary (ln participation ratio of the Fisher at the last step, IMAX against DMAX-plain); all
others are corrected together by Holm's method.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from examples.imax.associations import add_holm, associations
from examples.imax.data import PILOTED, arm, held_out
from examples.imax.question_only import gate, question_only
from examples.imax.tasks import METRICS, TASKS

#: The one measure and contrast for which no correction is made.
PRIMARY = ("ln_participation_ratio", "imax", "dmax-plain")
MEASURES = ("ln_participation_ratio", "spectral_entropy", "dominant_ratio")
GAINS = ("gain_over_isotropic", "gain_over_gradient")
SCORES = tuple(f"{task}: {metric.name}" for task in TASKS for metric in METRICS[task])
#: The primary metric of each task, and whether higher is better.
MAIN = {f"{task}: {METRICS[task][0].name}": METRICS[task][0].higher_is_better for task in TASKS}
MEAN = "mean of the seven, standardised"


def row(out: Path, name: str, seed: int, tree: xr.DataTree) -> dict[str, Any]:
    """One unit: its scores, the Fisher's measures of the last step, and the gains over both nulls (k of 16).

    The gains are those of the last long increment: the last of all is 1/25 of the training, and serves the Fisher.

    Args:
        out: Folder of the study.
        name: Of the arm.
        seed: Of the unit.
        tree: The unit's result, as ``dynamics.open_run`` gives it.
    """
    told = _told(out, name, seed)
    fisher = tree["fisher"].to_dataset().isel(step=-1).sel(block="global", task="all")
    concentration = tree["concentration"].to_dataset().isel(step=-2).sel(block="global", k=16)
    found: dict[str, Any] = {"arm": name, "seed": seed, "step": int(fisher["step"])}
    for task in TASKS:
        for metric in METRICS[task]:
            found[f"{task}: {metric.name}"] = told["scores"][task][metric.name]["score"]
    for measure in MEASURES:
        for end in ("", "_low", "_high"):
            found[measure + end] = float(fisher[measure + end])
    found["gain_over_isotropic"] = float(concentration["captured"] / concentration["null_isotropic"])
    for end in ("", "_low", "_high"):
        found[f"gain_over_gradient{end}"] = float(concentration[f"gain{end}"])
    found["seconds"] = told["seconds"]
    return found


def add_mean_score(rows: Sequence[dict[str, Any]]) -> None:
    """Adds the mean over tasks of the primary metrics: standardised over all rows, and turned so that higher is better.

    A metric that is the same everywhere counts 0.
    """
    turned = []
    for column, higher in MAIN.items():
        values = np.array([each[column] for each in rows], float)
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        turned.append((values - values.mean()) / (spread or 1.0) * (1 if higher else -1))
    for each, mean in zip(rows, np.mean(turned, axis=0).tolist(), strict=True):
        each[MEAN] = mean


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p of the mean of paired differences, over all signs.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    values = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    means = np.abs(signs @ values)
    return float((means >= abs(values.sum()) * (1 - 1e-12)).mean())


def differences(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every measure and score, the first arm against each other one, paired by seed.

    A measure that is not finite in some unit has no difference: NaN, and the number of pairs says of how many.
    """
    columns = [*MEASURES, *GAINS, MEAN, *SCORES]
    table = {(each["arm"], each["seed"]): each for each in rows}
    seeds = sorted({each["seed"] for each in rows})
    found = []
    for other, column in itertools.product(arms[1:], columns):
        values = np.array([table[arms[0], seed][column] - table[other, seed][column] for seed in seeds], float)
        finite = len(values) > 1 and bool(np.isfinite(values).all())
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if finite else math.nan
        found.append(
            {
                "measure": column,
                "contrast": f"{arms[0]} − {other}",
                "pairs": len(values),
                "difference": float(values.mean()),
                "low": float(values.mean() - half),
                "high": float(values.mean() + half),
                "p": sign_flip(values.tolist()) if finite else math.nan,
                "primary": (column, arms[0], other) == PRIMARY,
            }
        )
    add_holm(found)
    return found


def cluster_rows(out: Path, units: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """The Fisher on each unit's own training data, entries counted as independent and counted by their images."""
    found = []
    for name, seed in units:
        for counted, measured in _told(out, name, seed)["own_fisher"].items():
            found.append({"arm": name, "seed": seed, "counted": counted, **measured})
    return found


def stage_rows(out: Path, strategies: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Strategies' units with their scores, beside the unit of DMAX-plain that both go on from."""
    units = [(name, seed) for seed in seeds for name in ("dmax-plain", *strategies)]
    found = []
    for name, seed in units:
        told = _told(out, name, seed)["scores"]
        found.append(
            {"strategy": name, "seed": seed}
            | {f"{task}: {metric.name}": told[task][metric.name]["score"] for task in TASKS for metric in METRICS[task]}
        )
    return found


def pseudo_rows(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What the model said of images for the tasks that they lack: asked, kept, and how right both are."""
    found = []
    for seed in seeds:
        for task, label in _told(out, "three-stage", seed)["pseudo_labels"].items():
            metric = METRICS[task][0].name
            found.append(
                {
                    "seed": seed,
                    "task": task,
                    "metric": metric,
                    "asked": label["asked"],
                    "kept": label["kept"],
                    "retention": label["kept"] / label["asked"] if label["asked"] else math.nan,
                    "of_asked": label[f"{metric} of asked"],
                    "of_kept": label[f"{metric} of kept"],
                }
            )
    return found


def score_rows(out: Path, units: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Scores as ``python -m dynamics.analyze --scores`` reads them: each task's primary metric, at the last step."""
    found = []
    for name, seed in units:
        told = _told(out, name, seed)
        for task in TASKS:
            metric = METRICS[task][0].name
            one = told["scores"][task][metric]
            found.append(
                {
                    "run": f"{name}-{seed}",
                    "step": told["card"]["entries"] // told["size"]["batch"],
                    "task": task,
                    "metric": metric,
                    "score": one["score"],
                    "items": one["entries"],
                    "standard_error": one["standard_error"],
                }
            )
    return found


def write_results(
    out: Path, arms: Sequence[str], seeds: Sequence[int], strategies: Sequence[str], stages: Sequence[int], folder: Path
) -> Path:
    """Write the tables of a complete and analysed study, and its data cards.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = [(name, seed) for seed in seeds for name in arms]
    with xr.open_datatree(out / "analysis" / "analysis.zarr", engine="zarr") as analysis:
        rows = [row(out, name, seed, analysis["runs"][f"{name}-{seed}"]) for name, seed in units]  # pyright: ignore[reportArgumentType]
    add_mean_score(rows)
    write_table(folder / "units.csv", rows)
    write_table(folder / "clusters.csv", cluster_rows(out, units))
    if len(arms) > 1:
        write_table(folder / "differences.csv", differences(rows, arms))
    columns = [*MEASURES, *GAINS], [MEAN, *MAIN]
    write_table(folder / "associations.csv", associations(rows, *columns, primary=(PRIMARY[0], MEAN)))
    if stages:
        write_table(folder / "stages.csv", stage_rows(out, strategies, stages))
        write_table(folder / "pseudo_labels.csv", pseudo_rows(out, stages))
    cards = {f"{name}-{seed}": _told(out, name, seed)["card"] for name, seed in units}
    (folder / "cards.json").write_text(json.dumps(cards) + "\n", encoding="utf-8")
    if (out / "pilot.json").exists():
        shutil.copy(out / "pilot.json", folder / "pilot.json")
    return folder


def pilot(out: Path, unit: Path) -> int:
    """Print and write the pilot's table.

    Returns:
        0 if every task passes, else 1.
    """
    from examples.imax.train import scores

    told = json.loads((unit / "scores.json").read_text(encoding="utf-8"))
    test = held_out(told["size"]["scored"], PILOTED)
    train = arm(told["arm"], told["size"]["images"], told["seed"])
    table = gate(told["scores"], scores(question_only(train.entries, test.entries), test))
    for task, each in table.items():
        print(
            f"{task:14} {each['metric']:20} {each['score']:.3f} ± {each['standard_error']:.3f}   question only "
            f"{each['question_only']:.3f}   {each['errors_above']:5.1f} SE   {'passes' if each['passes'] else 'FAILS'}"
        )
    (out / "pilot.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["passes"] for each in table.values()) else 1


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns, as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _told(out: Path, name: str, seed: int) -> dict[str, Any]:
    return json.loads((out / f"{name}-{seed}" / "scores.json").read_text(encoding="utf-8"))
