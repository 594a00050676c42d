"""What the study found, as small files: one row a unit, paired differences between arms, the pilot's table.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats
from statsmodels.stats.multitest import multipletests

from examples.imax.data import PILOTED, arm, held_out
from examples.imax.question_only import gate, question_only
from examples.imax.tasks import METRICS, TASKS

#: The one measure and contrast for which no correction is made.
PRIMARY = ("ln_participation_ratio", "imax", "dmax-plain")
MEASURES = ("ln_participation_ratio", "spectral_entropy", "dominant_ratio")


def row(out: Path, name: str, seed: int) -> dict[str, Any]:
    """One unit: its scores, and at the last step the Fisher's measures and the gains over both nulls (k of 16)."""
    import dynamics

    folder = out / f"{name}-{seed}"
    told = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    tree = dynamics.open_run(folder)
    fisher = tree["fisher"].to_dataset().isel(step=-1).sel(block="global", task="all")
    concentration = tree["concentration"].to_dataset().isel(step=-1).sel(block="global", k=16)
    found: dict[str, Any] = {"arm": name, "seed": seed, "step": int(fisher["step"])}
    for task in TASKS:
        for metric in METRICS[task]:
            found[f"{task}: {metric.name}"] = told["scores"][task][metric.name]["score"]
    for measure in MEASURES:
        for end in ("", "_low", "_high"):
            found[measure + end] = _number(fisher[measure + end])
    found["gain_over_isotropic"] = _number(concentration["captured"] / concentration["null_isotropic"])
    for end in ("", "_low", "_high"):
        found[f"gain_over_gradient{end}"] = _number(concentration[f"gain{end}"])
    found["seconds"] = told["seconds"]
    return found


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
    columns = [f"{task}: {metric.name}" for task in TASKS for metric in METRICS[task]]
    columns = [*MEASURES, "gain_over_isotropic", "gain_over_gradient", *columns]
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
    rest = [each for each in found if not each["primary"] and math.isfinite(each["p"])]
    corrected = np.asarray(multipletests([each["p"] for each in rest], method="holm")[1]) if rest else np.zeros(0)
    for each in found:
        each["p_holm"] = math.nan
    for each, p in zip(rest, corrected, strict=True):
        each["p_holm"] = float(p)
    return found


def write_results(out: Path, arms: Sequence[str], seeds: Sequence[int], folder: Path) -> Path:
    """Write ``units.csv``, ``differences.csv`` and ``cards.json`` of a complete study.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = [(name, seed) for seed in seeds for name in arms]
    rows = [row(out, name, seed) for name, seed in units]
    _write_table(folder / "units.csv", rows)
    if len(arms) > 1:
        _write_table(folder / "differences.csv", differences(rows, arms))
    stored = {unit: json.loads((out / f"{unit[0]}-{unit[1]}" / "scores.json").read_text("utf-8")) for unit in units}
    cards = {f"{name}-{seed}": each["card"] for (name, seed), each in stored.items()}
    (folder / "cards.json").write_text(json.dumps(cards, indent=1) + "\n", encoding="utf-8")
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


def _number(value: xr.DataArray) -> float:
    return float(value)


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
