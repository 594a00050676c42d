"""How honest the statistics are: false positives on null data, power, and coverage of intervals, in large numbers.

python -m tests.benchmarks.calibration [--sets 2000] [--table associations]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
import xarray as xr
from scipy import stats

from dynamics.fisher.concentration import MOST_TIMES, effective_batches, matched_gains, predictive_draws
from dynamics.fisher.samples import SampleGroups, StackedGram, confidence_interval, counted_groups, weight_of
from dynamics.fisher.spectrum import directional, log_participation_ratio
from dynamics.fisher.task_structure import divergence_test
from dynamics.relate import associate, compare, compare_scores
from dynamics.relate.differences import relabelled_difference, students_test
from dynamics.relate.permutations import LEVEL
from dynamics.routing.findings import STEPS, routing_findings
from probes import ProbeGram
from probes.preconditioner import Orthogonalisation
from tests.dynamics.fisher.simulated import NORMS, gradients, grams, norms, power_law, stacked
from tests.dynamics.relate import simulated
from tests.dynamics.relate.simulated import decided
from tests.dynamics.routing.test_findings import routing as routed

Row = Sequence[str]
Table = Callable[[np.random.Generator, int], Iterator[Row]]
#: Measures × tasks of a report: what is related of a run, and three tasks with their mean.
_MEASURES, _TASKS = 11, 3


def shown(result: simulated.Decided) -> np.ndarray:
    """Whether each study's association is shown."""
    return result.p_value <= LEVEL


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """Share of p < 0.05 of Spearman's test over all checkpoints of all runs, as if each were a sample."""
    rejected = [stats.spearmanr(a.ravel(), b.ravel()).pvalue < 0.05 for a, b in zip(x, y, strict=True)]  # type: ignore[attr-defined]
    return float(np.mean(rejected))


def false_associations(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Associations that are none."""
    yield "null data, share shown at 0.05", "6 runs", "8 runs", "12 runs", "naive, 6 runs"
    kinds: dict[str, Callable[..., simulated.Curves]] = {
        "independent random walks": simulated.random_walks,
        "independent saturating trends": simulated.saturating_trends,
        "runs of different volatility, in both": simulated.shared_volatility,
        "one run five times as lively, in both": simulated.one_lively_run,
    }
    for name, kind in kinds.items():
        curves = [kind(rng, sets, runs, 12) for runs in (6, 8, 12)]
        yield name, *(share(shown(decided(*pair))) for pair in curves), f"{naive(*curves[0]):.2f}"
    for name, noise, given in (
        ("common cause: each run learns at its own speed", 0.0, None),
        ('the same, `given="loss"`', 0.0, "loss"),
        ("the same, a loss with noise of 8 % of its spread", 0.05, "loss"),
        ("the same, a loss with noise of 33 % of its spread", 0.2, "loss"),
        ('the same, `given="trend"`', 0.0, "trend"),
    ):
        rates = []
        for runs in (6, 8, 12):
            x, y, loss = simulated.learning_speeds(rng, sets, runs, 12, noise)
            rates.append(share(shown(decided(x, y, loss if given == "loss" else None, slopes=given == "trend"))))
        yield name, *rates, ""
    x, y = simulated.clustered_walks(rng, sets, 6, 3, 12)
    rate = share(shown(decided(x, y, cluster=np.repeat(np.arange(6), 3))))
    yield "6 clusters of 3 seeds (`clusters=`)", rate, "", "", f"{naive(x, y):.2f}"


def false_differences(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Differences that are none, of one measure and of the others beside it."""
    sizes = ((3, 4), (3, 5), (3, 10), (5, 5), (8, 8))
    yield "no difference, share shown at 0.05", *(f"{first} + {second} runs" for first, second in sizes)
    for spread in (1.0, 5.0, 0.2):
        row = [share(differs(*simulated.groups_of_spread(rng, sets, *size, spread))) for size in sizes]
        yield f"spread of the first group {spread:g} times the second's", *row
    row = [share(any_measure(rng, sets // 20, size, 5.0)) for size in sizes]
    yield f"any of {_MEASURES - 1} measures beside the headline, spread 5 : 1", *row
    row = [share(any_of_three(rng, sets, max(size))) for size in sizes]
    yield "any of three groups of the larger size, spreads 5 : 1 : 1", *row


def false_scores(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Scores of two groups that do not differ: what is said of their mean, of three scores beside it, of any."""
    sizes = ((3, 4), (4, 4), (3, 8), (5, 5), (8, 8))
    yield "scores without a difference, mean / another / any", *(f"{first} + {second} runs" for first, second in sizes)
    for name, spread, items in (
        ("equal spreads", 1.0, 0),
        ("spread of the first group five times the second's", 5.0, 0),
        ("accuracies of 50 items: ties", 1.0, 50),
    ):
        row = []
        for size in sizes:
            held = np.array([scores_differ(rng, size, spread, items) for _ in range(sets // 2)])
            row.append(" / ".join(share(column) for column in (*held.T, np.any(held, axis=1))))
        yield name, *row


def scores_differ(rng: np.random.Generator, size: tuple[int, int], spread: float, items: int) -> list[bool]:
    """Whether two groups are said to differ in the mean over three correlated scores, and in one of these."""
    values = rng.standard_normal((sum(size), 1, _TASKS)) + rng.standard_normal((sum(size), 1, 1))
    if items:
        values = rng.binomial(items, 1 / (1 + np.exp(-0.3 * values))) / items
    values[: size[0]] *= spread
    scores, groups = grouped(values, size)
    tasks = [f"t{number}/accuracy" for number in range(_TASKS)]
    holds = compare_scores(scores.rename(measure="task").assign_coords(task=tasks, step=[1]), groups, draws=999)[
        "holds"
    ]
    return [bool(holds.values[0, 0]), bool(holds.values[0, 1:].any())]


def differs(first: np.ndarray, second: np.ndarray, *, comparisons: int = 1, pairs: bool = False) -> np.ndarray:
    """Whether each set's difference is shown, ``[unit, set]``."""
    difference, test = relabelled_difference(first, second, pairs=pairs, draws=1999)
    p_value = np.maximum(test.p_value, students_test(difference, difference.freedom)[0])
    return comparisons * p_value <= LEVEL


def any_measure(rng: np.random.Generator, sets: int, size: tuple[int, int], spread: float) -> np.ndarray:
    """Whether any measure but the headline is said to differ."""
    return np.array([beside(rng, size, spread) for _ in range(sets)])


def beside(rng: np.random.Generator, size: tuple[int, int], spread: float) -> bool:
    values = rng.standard_normal((sum(size), 1, _MEASURES)) + rng.standard_normal((sum(size), 1, 1))
    values[: size[0]] *= spread
    result = compare(*grouped(values, size), headline="m0", draws=999)
    return bool(result["holds"].values[0, 1:].any())


def grouped(values: np.ndarray, size: tuple[int, int]) -> tuple[xr.DataArray, dict[str, list[str]]]:
    """``[run, step, measure]`` with names, and two groups of its runs."""
    runs = [f"r{number}" for number in range(sum(size))]
    coords = {"run": runs, "step": range(values.shape[1]), "measure": [f"m{m}" for m in range(values.shape[2])]}
    return xr.DataArray(values, coords, ("run", "step", "measure")), {"a": runs[: size[0]], "b": runs[size[0] :]}


def any_of_three(rng: np.random.Generator, sets: int, runs: int) -> np.ndarray:
    """Whether any of three groups is said to differ from another."""
    groups = [spread * rng.standard_normal((runs, sets)) for spread in (5.0, 1.0, 1.0)]
    return np.any([differs(a, b, comparisons=3) for a, b in combinations(groups, 2)], axis=0)


def power(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """What is there and is shown."""
    yield "planted, share shown at 0.05", "6 runs", "8 runs", "12 runs"
    for correlation in (0.3, 0.5, 0.7):
        curves = [simulated.planted(rng, sets, runs, 12, correlation) for runs in (6, 8, 12)]
        yield f"correlation of {correlation}, 12 steps", *(share(shown(decided(*pair))) for pair in curves)
    for shift in (1.0, 1.5, 2.0):
        pairs = [simulated.groups_of_spread(rng, sets, runs, runs, 1.0, shift) for runs in (6, 8, 12)]
        row = [share(differs(*pair)) for pair in pairs]
        yield f"difference of {shift:g} standard deviations, so many runs in each group", *row


def coverage(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often 95 % intervals hold the truth."""
    yield "95 % intervals", "hold the truth in"
    for correlation in (0.0, 0.5):
        for runs in (6, 8, 12):
            result = decided(*simulated.planted(rng, sets, runs, 12, correlation))
            held = (result.low <= correlation) & (correlation <= result.high)
            yield f"correlation of {correlation}, {runs} runs × 12 steps", share(held)
    for first, second, spread in ((6, 9, 2.0), (3, 5, 5.0), (5, 5, 5.0)):
        difference, test = relabelled_difference(
            *simulated.groups_of_spread(rng, sets, first, second, spread, 1.0), pairs=False, draws=1999
        )
        reach = difference.error * np.maximum(test.critical, students_test(difference, difference.freedom)[1])
        yield (
            f"difference, {first} + {second} runs, spread {spread:g} : 1",
            share(abs(difference.difference - 1) <= reach),
        )


def reports(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Whole reports on data without any effect: 11 measures, three tasks and their mean, two groups."""
    kinds = {
        "independent random walks": simulated.random_walks,
        "runs of different volatility": simulated.shared_volatility,
    }
    yield (
        "reports that state something",
        "headline association",
        "another",
        "a measure differs",
        "a score differs",
        "anything",
    )
    for runs in (6, 12):
        for name, kind in kinds.items():
            table = np.array([said(rng, kind, runs) for _ in range(sets // 10)])
            columns = [*table.T, table.any(1)]
            yield f"{name}, {runs} runs × 10 steps", *(share(column) for column in columns)


def said(rng: np.random.Generator, kind: Callable[..., simulated.Curves], runs: int) -> list[bool]:
    """Whether a report states the headline association, another one, a difference in measures, and one in scores."""
    x, y = (np.moveaxis(values, 0, -1) for values in kind(rng, _MEASURES, runs, 10))
    measures, groups = grouped(x, (runs // 2, runs - runs // 2))
    tasks = [f"t{number}/accuracy" for number in range(_TASKS)]
    scores = measures.isel(measure=range(_TASKS)).rename(measure="task").assign_coords(task=tasks)
    scores = scores.copy(data=y[..., :_TASKS])
    holds = associate(measures, scores, headline="m0", draws=999)["holds"]
    leading = bool(holds.sel(measure="m0", task="all"))
    differences = compare(measures, groups, headline="m0", draws=999)["holds"]
    of_scores = compare_scores(scores, groups, draws=999)["holds"]
    return [leading, bool(holds.sum() > leading), bool(differences.any()), bool(of_scores.any())]


def share(flags: np.ndarray) -> str:
    return f"{np.mean(flags):.3f}"


def divergence_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often χ's permutation test has p ≤ 0.05, for two tasks of one Fisher and of disjoint ones."""
    sets = max(sets // 4, 1)
    yield "χ of two tasks, norms", "p ≤ 0.05, one Fisher, 20 a task", "p ≤ 0.05, disjoint, 32 a task"
    for law in ("alike", "lognormal"):
        for ratio in (1, 3, 30):
            shares = []
            for samples, disjoint, count in ((20, False, sets), (32, True, max(sets // 10, 1))):
                rows = gradients(rng, count, 2 * samples, power_law(200)) * norms(rng, law, count, 2 * samples)
                rows[:, :samples] *= ratio
                if disjoint:
                    rows[:, :samples, ::2] = rows[:, samples:, 1::2] = 0
                labels = SampleGroups(np.arange(2 * samples), np.repeat(np.eye(2, dtype=bool), samples, axis=0))
                test = divergence_test(grams(rows), labels, permutations=59)
                assert (test.high <= np.log(2)).all()
                shares.append(share(test.p_value <= 0.05))
            yield f"{law}, {ratio} : 1", *shares


def participation_coverage(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often 95 % intervals of ln PR hold the truth: with groups for Student's t, with N_eff, and of directions."""
    spectrum = power_law(200)
    truth = 2 * np.log(spectrum.sum()) - np.log((spectrum**2).sum())
    one, other = gradients(rng, 2, 50_000, spectrum)
    of_directions = -np.log(((one * other).sum(1) ** 2 / ((one**2).sum(1) * (other**2).sum(1))).mean())
    yield "ln PR, norms, N", "t of groups", "t of min(groups, N_eff)", "of directions", "median N_eff"
    for law in NORMS:
        for samples in (16, 64, 147):
            held, effective = np.zeros(3), []
            labels = SampleGroups.of_one_task(np.arange(samples))
            for _ in range(max(sets // 100, 1)):
                gram = grams(gradients(rng, 50, samples, spectrum) * norms(rng, law, 50, samples))
                test, unit = (log_participation_ratio(part, labels) for part in (gram, directional(gram)))
                counted = counted_groups(gram, labels)
                _, reach = confidence_interval(np.zeros(1), np.ones(1), samples)
                _, widened = confidence_interval(np.zeros(1), np.ones(1), counted)
                narrow = np.abs(test.estimate - truth) <= (test.high - test.estimate) * reach / widened
                wide = (test.low <= truth) & (truth <= test.high)
                directions = (unit.low <= of_directions) & (of_directions <= unit.high)
                held += [narrow.sum(), wide.sum(), directions.sum()]
                effective += weight_of(gram, labels).groups[:, 0].tolist()
            shares = (f"{part:.3f}" for part in held / len(effective))
            yield f"{law}, {samples}", *shares, f"{np.median(effective):.0f}"


def gain_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often a fresh gradient of m samples has an interval, one with 1 in it, and is called concentrated."""
    spectrum, k = power_law(300), (1, 4, 16)
    sets = max(sets // 5, 1)
    heading = "gain of a fresh gradient: N, tr Σ/‖μ‖², m, k"
    yield heading, "has an interval", "holds 1", "above 1, centred too", "median ln gain"
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
        gram = stacked(grams(rows), product, size, batch_size=batch)
        plain, centred = (matched_gains(gram, k, centre=centre)[0] for centre in (False, True))
        above = (plain.low > 1) & (centred.low > 1)
        for position, count in enumerate(k):
            if count > samples // 2:
                continue
            low, high, middle = (part[:, position] for part in (plain.low, plain.high, plain.ln_gain))
            limit = "" if batch <= MOST_TIMES * (samples // 2) else " (not flagged: m > 8·|B|)"
            yield (
                f"{samples}, {scale}, {batch}, {count}",
                share(np.isfinite(low)),
                share((low <= 1) & (high >= 1)),
                f"{share(above[:, position])}{limit}",
                f"{np.median(middle):.2f}",
            )


def optimizer_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often a step of an optimizer along fresh gradients is called concentrated, over both nulls."""
    spectrum, k, sets = power_law(240), (1, 4, 16), max(sets // 20, 1)
    yield "step of a fresh gradient: N, tr Σ/‖μ‖², batch", "holds 1, plain", "holds 1, optimizer", "above 1, k = 1/4/16"
    for samples, scale, batch in ((64, 4, 4), (64, 64, 16), (128, 1000, 16)):
        mean = rng.standard_normal((sets, 1, 240)) * np.sqrt(spectrum)
        mean *= np.sqrt(spectrum.sum() / scale / (mean**2).sum(-1, keepdims=True))
        rows = gradients(rng, sets, samples, spectrum, mean)
        where = f"{samples}, {scale}, {batch}"
        for name, steps, increment, decay in (
            ("AdamW, step 1", 1, 1, 0.999),
            ("AdamW, step 3", 3, 1, 0.999),
            ("AdamW, step 10", 10, 1, 0.999),
            ("AdamW, step 100", 100, 1, 0.999),
            ("AdamW, β₂ = 0.95, step 20", 20, 1, 0.95),
            ("AdamW, steps 51 to 100", 100, 50, 0.999),
        ):
            update, adam = adamw_training(rng, mean[:, 0], spectrum, batch, steps, increment, decay)
            passed = rows * adam[:, None]
            m = round(batch * effective_batches(increment, steps - increment, 0.9))
            products = {"preconditioned_product": rows @ passed.mT, "preconditioned_gram": passed @ passed.mT}
            yield f"{name}: {where}", *optimizer_shares(rows, update, m, products, k)
        fresh = mean[:, 0] + rng.standard_normal((sets, 240)) * np.sqrt(spectrum / batch)
        turned = np.linalg.qr(rng.standard_normal((240, 240)))[0]
        weights = np.stack([predictive_draws(one, np.arange(samples), batch) for one in grams(rows)])
        drawn = np.stack([by_muon(part @ turned) for part in weights @ rows])
        products = {"drawn_product": rows @ turned @ drawn.mT, "drawn_norm_squared": (drawn**2).sum(-1)}
        yield f"Muon: {where}", *optimizer_shares(rows @ turned, by_muon(fresh @ turned), batch, products, k)


def adamw_training(
    rng: np.random.Generator,
    mean: np.ndarray,
    spectrum: np.ndarray,
    batch: int,
    steps: int,
    increment: int,
    decay: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The last increment of trainings with β₁ = 0.9, and P at its end; gradients stay those of the start."""
    first, second, update = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean)
    for step in range(1, steps + 1):
        gradient = mean + rng.standard_normal(mean.shape) * np.sqrt(spectrum / batch)
        first, second = 0.9 * first + 0.1 * gradient, decay * second + (1 - decay) * gradient**2
        if step > steps - increment:
            update = update + first / (1 - 0.9**step) / np.sqrt(second / (1 - decay**step))
    return update, 1 / np.sqrt(second / (1 - decay**steps))


def by_muon(flat: np.ndarray) -> np.ndarray:
    """Steps of Muon along gradients of a matrix of 12 × 20."""
    muon = Orthogonalisation(1.0, (3.4445, -4.775, 2.0315), 5, 1e-7)
    return np.stack([muon(torch.tensor(row.reshape(12, 20))).numpy().ravel() for row in flat])


def optimizer_shares(
    rows: np.ndarray, update: np.ndarray, batch: int, products: dict[str, np.ndarray], k: Sequence[int]
) -> Iterator[str]:
    """How often intervals hold 1, over the plain null and the optimizer's, and how often the latter's flag is given."""
    names = [str(number) for number in range(len(rows))]
    arrays = (grams(rows), np.einsum("bnd,bd->bn", rows, update), (update**2).sum(1))
    by_block = [dict(zip(names, array, strict=True)) for array in arrays]
    passed = {name: dict(zip(names, array, strict=True)) for name, array in products.items()}
    gram = StackedGram.of(ProbeGram(*by_block, batch_size=batch, **passed))
    plain, centred = (matched_gains(gram, k, centre=centre) for centre in (False, True))
    for gain in plain:
        yield "/".join(share(held) for held in ((gain.low <= 1) & (gain.high >= 1)).T)
    yield "/".join(share(above) for above in ((plain[1].low > 1) & (centred[1].low > 1)).T)


def routing_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Findings about uniform routers of 4 layers at 3 steps, tokens choosing alone or in runs that choose alike."""
    yield "tokens, experts, k, run", "largest load above its null, a layer", "OD330", "OD331"
    for tokens, experts, k in ((256, 8, 2), (1024, 8, 2), (1024, 64, 4), (4096, 64, 1)):
        for run in (1, 4, 16, 64):
            above, dead, over = [], [], []
            for _ in range(sets):
                scores = rng.random((STEPS, 4, tokens // run, experts), dtype=np.float32)
                chosen = np.argpartition(scores, k - 1, axis=-1)[..., :k].reshape(STEPS, 4, -1)
                counts = run * np.stack([[np.bincount(one, minlength=experts) for one in of] for of in chosen])
                measured = routed(counts.astype(np.float64), k)
                codes = {finding.code for finding in routing_findings(measured, [])}
                above.append((measured["largest_share"] > measured["largest_share_chance"]).values.mean())
                dead.append("OD330" in codes)
                over.append("OD331" in codes)
            yield f"{tokens}, {experts}, {k}, {run}", *(share(np.array(flags)) for flags in (above, dead, over))


#: Each gives a table: headings first, then its rows.
TABLES: dict[str, Table] = {
    "associations": false_associations,
    "differences": false_differences,
    "scores": false_scores,
    "power": power,
    "coverage": coverage,
    "reports": reports,
    "divergence": divergence_rates,
    "participation": participation_coverage,
    "gain": gain_rates,
    "optimizer": optimizer_rates,
    "routing": routing_rates,
}


def main(tables: dict[str, Table], description: str | None, *, sets: int) -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=sets, help="simulated studies of each kind")
    parser.add_argument("--table", choices=tables, action="append", help="which tables; by default all")
    arguments = parser.parse_args()
    for name in arguments.table or tables:
        rows = tables[name](np.random.default_rng(0), arguments.sets)
        headings = next(rows)
        print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)
        print()


if __name__ == "__main__":
    main(TABLES, __doc__, sets=2000)
