"""How honest the statistics are: false positives on null data, power, and coverage of intervals, in large numbers.

python -m tests.benchmarks.calibration [--sets 4000]
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from dynamics.relate.differences import paired_difference, unpaired_difference
from dynamics.relate.families import permutation_tests
from dynamics.relate.pairs import pair_of
from tests.dynamics.relate.simulated import Curves, clustered_walks, planted, random_walks, saturating_trends


def rejections(curves: Curves, cluster: np.ndarray) -> float:
    """Share of studies with p < 0.05."""
    pairs = [pair_of(x, y, cluster, "over_steps", "pearson") for x, y in zip(*curves, strict=True)]
    return float((permutation_tests(pairs, draws=1999, seed=0).p_value < 0.05).mean())


def naive(curves: Curves) -> float:
    """The same of Spearman's test over all checkpoints of all runs."""
    return float(np.mean([stats.spearmanr(x.ravel(), y.ravel()).pvalue < 0.05 for x, y in zip(*curves, strict=True)]))


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4000, help="simulated studies of each kind")
    sets = parser.parse_args().sets
    rng = np.random.default_rng(0)
    kinds = {
        "independent random walks, 6 runs × 15 steps": (random_walks(rng, sets, 6, 15), np.arange(6)),
        "independent saturating trends, 6 runs × 15 steps": (saturating_trends(rng, sets, 6, 15), np.arange(6)),
        "6 clusters of 3 seeds × 12 steps": (clustered_walks(rng, sets, 6, 3, 12), np.repeat(np.arange(6), 3)),
    }
    print("| null data | share of p < 0.05 | naive Spearman over checkpoints |\n|---|---|---|")
    for name, (curves, cluster) in kinds.items():
        print(f"| {name} | {rejections(curves, cluster):.3f} | {naive(curves):.2f} |")
    print("\n| planted correlation, 12 steps | power, 6 runs | power, 8 runs |\n|---|---|---|")
    for correlation in (0.3, 0.5, 0.7):
        powers = [rejections(planted(rng, sets // 4, runs, 12, correlation), np.arange(runs)) for runs in (6, 8)]
        print(f"| {correlation} | {powers[0]:.2f} | {powers[1]:.2f} |")
    print("\n| 95 % intervals | hold the truth in |\n|---|---|")
    for correlation in (0.0, 0.5):
        curves = planted(rng, sets, 8, 20, correlation)
        found = [pair_of(x, y, np.arange(8), "over_steps", "pearson") for x, y in zip(*curves, strict=True)]
        share = np.mean([each.low <= correlation <= each.high for each in found])
        print(f"| correlation of {correlation}, 8 runs × 20 steps | {share:.3f} |")
    for name, function, units in (("paired", paired_difference, (8, 8)), ("unpaired", unpaired_difference, (6, 9))):
        first, second = 1 + 2 * rng.standard_normal((units[0], sets)), rng.standard_normal((units[1], sets))
        difference = function(first, second, draws=1)
        share = ((difference.low <= 1) & (difference.high >= 1)).mean()
        print(f"| {name} difference, {units[0]} and {units[1]} runs | {share:.3f} |")


if __name__ == "__main__":
    main()
