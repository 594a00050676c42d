"""How honest the statistics are: false positives on null data, power, and coverage of intervals, in large numbers.

python -m tests.benchmarks.calibration [--sets 4000]
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from dynamics.fisher.eigenvalues import directional
from dynamics.fisher.gradient_null import MOST_TIMES, matched_gain
from dynamics.fisher.pairs import Labels, counted_groups, interval, weight_of
from dynamics.fisher.participation import log_participation_ratio
from dynamics.fisher.sharing import divergence_test
from dynamics.relate.differences import paired_difference, unpaired_difference
from dynamics.relate.families import permutation_tests
from dynamics.relate.pairs import pair_of
from tests.dynamics.fisher.simulated import NORMS, gradients, grams, norms, power_law
from tests.dynamics.relate.simulated import Curves, clustered_walks, planted, random_walks, saturating_trends


def rejections(curves: Curves, cluster: np.ndarray) -> float:
    """Share of studies with p < 0.05."""
    pairs = [pair_of(x, y, cluster, "over_steps", "pearson") for x, y in zip(*curves, strict=True)]
    return float((permutation_tests(pairs, draws=1999, seed=0).p_value < 0.05).mean())


def naive(curves: Curves) -> float:
    """The same of Spearman's test over all checkpoints of all runs."""
    return float(np.mean([stats.spearmanr(x.ravel(), y.ravel()).pvalue < 0.05 for x, y in zip(*curves, strict=True)]))


def divergence_rates(rng: np.random.Generator, sets: int) -> None:
    """How often χ's permutation test has p ≤ 0.05, for two tasks of one Fisher and of disjoint ones."""
    print(
        "\n| χ of two tasks, norms | p ≤ 0.05, one Fisher, 20 a task | p ≤ 0.05, disjoint, 32 a task |\n|---|---|---|"
    )
    for law in ("alike", "lognormal"):
        for ratio in (1, 3, 30):
            shares = []
            for samples, disjoint, count in ((20, False, sets), (32, True, max(sets // 10, 1))):
                rows = gradients(rng, count, 2 * samples, power_law(200)) * norms(rng, law, count, 2 * samples)
                rows[:, :samples] *= ratio
                if disjoint:
                    rows[:, :samples, ::2] = rows[:, samples:, 1::2] = 0
                labels = Labels(np.arange(2 * samples), np.repeat(np.eye(2, dtype=bool), samples, axis=0))
                found = divergence_test(grams(rows), labels, permutations=59)
                assert (found.high <= np.log(2)).all()
                shares.append((found.p_value <= 0.05).mean())
            print(f"| {law}, {ratio} : 1 | {shares[0]:.3f} | {shares[1]:.3f} |")


def participation_coverage(rng: np.random.Generator, sets: int) -> None:
    """How often 95 % intervals of ln PR hold the truth: with groups for Student's t, with N_eff, and of directions."""
    spectrum = power_law(200)
    truth = 2 * np.log(spectrum.sum()) - np.log((spectrum**2).sum())
    one, other = gradients(rng, 2, 50_000, spectrum)
    of_directions = -np.log(((one * other).sum(1) ** 2 / ((one**2).sum(1) * (other**2).sum(1))).mean())
    print("\n| ln PR, norms, N | t of groups | t of min(groups, N_eff) | of directions | median N_eff |")
    print("|---|---|---|---|---|")
    for law in NORMS:
        for samples in (16, 64, 147):
            held, effective = np.zeros(3), []
            labels = Labels(np.arange(samples), np.ones((samples, 1), dtype=bool))
            for _ in range(sets // 50):
                gram = grams(gradients(rng, 50, samples, spectrum) * norms(rng, law, 50, samples))
                found, unit = (log_participation_ratio(part, labels) for part in (gram, directional(gram)))
                counted = counted_groups(gram, labels)
                _, reach = interval(np.zeros(1), np.ones(1), samples)
                _, widened = interval(np.zeros(1), np.ones(1), counted)
                narrow = np.abs(found.estimate - truth) <= (found.high - found.estimate) * reach / widened
                wide = (found.low <= truth) & (truth <= found.high)
                directions = (unit.low <= of_directions) & (of_directions <= unit.high)
                held += [narrow.sum(), wide.sum(), directions.sum()]
                effective += weight_of(gram, labels).groups[:, 0].tolist()
            shares = " | ".join(f"{share:.3f}" for share in held / len(effective))
            print(f"| {law}, {samples} | {shares} | {np.median(effective):.0f} |")


def gain_rates(rng: np.random.Generator, sets: int) -> None:
    """How often a fresh gradient of m samples has an interval, one with 1 in it, and is called concentrated."""
    spectrum, k = power_law(300), (1, 4, 16)
    print(
        "\n| gain of a fresh gradient: N, tr Σ/‖μ‖², m, k | has an interval | holds 1 | above 1, centred too "
        "| median ln gain |"
    )
    print("|---|---|---|---|---|")
    for samples, scale, batch in (
        (4, 64, 16),
        (8, 64, 16),
        (64, 4, 16),
        (64, 64, 256),
        (64, 64, 4096),
        (128, 1000, 512),
    ):
        mean = rng.standard_normal((sets, 1, 300)) * np.sqrt(spectrum)
        mean *= np.sqrt(spectrum.sum() / scale / (mean**2).sum(-1, keepdims=True))
        rows = gradients(rng, sets, samples, spectrum, mean)
        update = mean[:, 0] + rng.standard_normal((sets, 300)) * np.sqrt(spectrum / batch)
        product, size = np.einsum("bnd,bd->bn", rows, update), np.linalg.norm(update, axis=1)
        given = (grams(rows), product, size, np.arange(samples), batch, k)
        plain, centred = matched_gain(*given), matched_gain(*given, centre=True)
        above = (plain.low > 1) & (centred.low > 1)
        for place, count in enumerate(k):
            if count > samples // 2:
                continue
            low, high, middle = (part[:, place] for part in (plain.low, plain.high, plain.ln_gain))
            limit = "" if batch <= MOST_TIMES * (samples // 2) else " (not flagged: m > 8·|B|)"
            known, holds = np.isfinite(low).mean(), ((low <= 1) & (high >= 1)).mean()
            print(
                f"| {samples}, {scale}, {batch}, {count} | {known:.3f} | {holds:.3f} | "
                f"{above[:, place].mean():.3f}{limit} | {np.median(middle):.2f} |"
            )


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
    fisher = np.random.default_rng(1)
    divergence_rates(fisher, sets // 8)
    participation_coverage(fisher, sets // 4)
    gain_rates(fisher, sets // 10)


if __name__ == "__main__":
    main()
