"""How honest the statistics are: false positives on null data, power, and coverage of intervals, in large numbers.

python -m tests.benchmarks.calibration [--sets 2000] [--table associations]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import xarray as xr
from scipy import stats

from dynamics.fisher.concentration import MOST_TIMES, matched_gain
from dynamics.fisher.samples import SampleGroups, confidence_interval, counted_groups, weight_of
from dynamics.fisher.spectrum import directional, log_participation_ratio
from dynamics.fisher.task_structure import cosines, divergence_test, simultaneous_interval
from dynamics.relate import associate, choose_checkpoint, compare, compare_scores
from dynamics.relate.differences import relabelled_difference, students_test
from dynamics.relate.group_losses import GroupedLosses
from dynamics.relate.permutations import LEVEL
from dynamics.relate.stability import course_of
from dynamics.report.answers.answer import VERDICTS
from dynamics.report.answers.concentration import ABOUT, chance_steps
from dynamics.report.answers.trained import did_it_train
from dynamics.spectra.training_noise import STATES
from dynamics.text import counted
from tests.adapters import claims
from tests.dynamics.fisher.simulated import NORMS, gradients, grams, norms, power_law, stacked
from tests.dynamics.relate import simulated
from tests.dynamics.relate.simulated import decided
from tests.dynamics.relate.simulated_trainings import STEPS, Training
from tests.dynamics.report.answers import test_checkpoint, test_recipe
from tests.trainings import KINDS, trainings
from tests.trees import example_tree

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
        plain, centred = matched_gain(gram, k), matched_gain(gram, k, centre=True)
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


def answer_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often answers are right, undecided and wrong where the truth is known, in a fifth as many simulations."""
    sets = max(sets // 5, 1)
    yield "answer, truth", "right", "undecided", "wrong"
    for name, (kind, true) in KINDS.items():
        states = [course_of(training).state for training in trainings(kind, rng, sets)]
        claims = np.array([state != "undecided" for state in states])
        right = np.array([state in true for state in states])
        yield f"stable: {name} ({true[0]})", share(right), share(~claims & ~right), share(claims & ~right)
    for name, cosine in (("share directions", 0.5), ("orthogonal", 0.0), ("fight", -0.5)):
        for groups, tasks, ratio in ((6, 2, 1.0), (16, 2, 1.0), (16, 4, 1.0), (64, 4, 1.0), (16, 4, 10.0)):
            truth = true_cosines(cosine, tasks)
            signs = np.array([claimed_signs(rng, truth, groups, ratio) for _ in range(sets)])
            alike = truth[np.triu_indices(tasks, 1)]
            wrong = ((signs != 0) & (signs != np.sign(alike))).any(1)
            right = (signs == np.sign(cosine))[:, (alike != 0) | (cosine == 0)]
            heading = f"tasks: {tasks}, pairs {name}, {groups} groups each, norms 1 : {ratio:g} (wrong: any pair)"
            yield heading, share(right), share(~right) if cosine else "", share(wrong)
    for name, batch in (("gradients of 16 samples", 16), ("along the two leading directions", 0)):
        above, less = (part[: 12 * (len(part) // 12)] for part in concentrated(rng, 12 * sets, batch))
        for steps in (1, 3, 12):
            count = above.reshape(-1, steps).sum(1)
            claimed = count > (0 if steps == 1 else chance_steps(steps))
            denied = less.reshape(-1, steps)[:, -1] | ((count <= chance_steps(steps)) & (steps >= 10))
            right, wrong = (denied & ~claimed, claimed) if batch else (claimed, denied & ~claimed)
            heading = f"concentration: {counted(steps, 'update')}, {name}"
            yield heading, share(right), share(~right & ~wrong), share(wrong)


def true_cosines(cosine: float, tasks: int) -> np.ndarray:
    """Cosines of the tasks' means: this one of the first two and of the next two, else 0."""
    return np.kron(np.eye(tasks // 2), np.array([[1.0, cosine], [cosine, 1.0]]))


def claimed_signs(rng: np.random.Generator, truth: np.ndarray, groups: int, ratio: float) -> np.ndarray:
    """1 for pairs of tasks that are said to share directions, −1 to fight, else 0."""
    tasks = len(truth)
    size = np.geomspace(1, ratio, tasks)
    means = np.zeros((tasks, 100))
    means[:, 2 : 2 + tasks] = 3 * np.linalg.cholesky(truth)
    rows = np.repeat(means, groups, axis=0) + gradients(rng, 1, tasks * groups, 4 * power_law(100))[0]
    rows *= np.repeat(size, groups)[:, None]
    task = np.repeat(np.arange(tasks), groups)
    labels = SampleGroups(np.arange(len(rows)), task[:, None] == np.arange(tasks))
    test = cosines(grams(rows)[None], labels).cosine
    first, second = np.triu_indices(tasks, 1)
    ends = np.stack([part[0, first, second] for part in (test.estimate, test.low, test.high)], 1)
    known = np.isfinite(ends).all(1)
    signs = np.zeros(len(first))
    for pair in np.flatnonzero(known):
        low, high = simultaneous_interval(*ends[pair].tolist(), groups, int(known.sum()))
        signs[pair] = float(low > 0) - float(high < 0)
    return signs


def concentrated(rng: np.random.Generator, sets: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether updates are called concentrated, and no more so than chance; of no batch, they are planted."""
    spectrum, samples, k = power_law(100), 32, 8
    above, less = [], []
    for _ in range(max(sets // 200, 1)):
        rows = gradients(rng, 200, samples, spectrum)
        update = rng.standard_normal((200, 100)) * np.sqrt(spectrum / max(batch, 1))
        if not batch:
            update = 0.05 * update + rng.standard_normal((200, 100)) * (np.arange(100) < 2)
        product, size = np.einsum("bnd,bd->bn", rows, update), np.linalg.norm(update, axis=1)
        gram = stacked(grams(rows), product, size, batch_size=batch or 16)
        plain, centred = matched_gain(gram, (k,)), matched_gain(gram, (k,), centre=True)
        above.append(((plain.low > 1) & (centred.low > 1))[:, 0])
        less.append((plain.high < ABOUT)[:, 0])
    return np.concatenate(above), np.concatenate(less)


def checkpoint_choices(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How near the choice is to the oracle's, and how often what is reported of it holds, beside the naive report."""
    yield (
        "trainings on quadratics: groups, noise",
        "near",
        "95 % interval of the value holds",
        "those of both tasks hold",
        "reported value − true",
        "value on the samples that chose − true",
    )
    for groups, noise, unequal in product((12, 24, 48), (0.6, 1.2), (False, True)):
        training = Training(groups=groups, noise=noise, unequal=unequal)
        errors = paired_errors(training, rng)
        numbers = np.array([checkpoint_choice(training, errors, rng) for _ in range(sets // 5)])
        near, holds, together, error, naive_error = numbers.mean(0)
        sizes = "unequal" if unequal else "alike"
        yield (
            f"{groups} {sizes}, {noise}",
            f"{near:.3f}",
            f"{holds:.3f}",
            f"{together:.3f}",
            f"{error:+.4f}",
            f"{naive_error:+.4f}",
        )


def paired_errors(training: Training, rng: np.random.Generator) -> np.ndarray:
    """Standard errors of differences in value between candidates, over half of the groups, from 4,000 groups."""
    data = replace(training, groups=4000).draw(rng)
    losses = np.concatenate([data["sample_loss"].values, data["scaled_loss"].values])
    tasks = data["task"].values.tolist()
    grouped = GroupedLosses.of(losses, data["sample_task"].values, data["sample_group"].values, tasks)
    covariance = grouped.covariance(np.ones(len(tasks))) * 4000 / (training.groups / 2)
    variance = np.diag(covariance)
    return np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0.0))


def checkpoint_choice(training: Training, errors: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Whether the choice is near the oracle's, whether intervals hold, and two errors of its value."""
    choice = choose_checkpoint(training.draw(rng))
    names = [candidate["name"] for candidate in choice["candidates"]]
    best, oracle = names.index(choice["best"]), int(np.argmax(training.value))
    reported, truth = choice["reported"], training.value[best]
    tasks = zip(reported["tasks"], training.improvement[best], strict=True)
    gap = training.value[oracle] - truth
    return [
        gap <= errors[best, oracle],
        reported["low"] <= truth <= reported["high"],
        all(task["low"] <= value <= task["high"] for task, value in tasks),
        reported["value"] - truth,
        choice["candidates"][best]["value"] - truth,
    ]


def verdict_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often an answer is right: its verdict, and the intervals of its sentence."""
    sets //= 5
    yield "answer", "simulated", *VERDICTS[:4], "right"
    run = example_tree(steps=[step for step in STEPS if step], matrices=2)
    for name, training in test_checkpoint.KINDS.items():
        verdicts, right = zip(
            *(test_checkpoint.checkpoint_answer(run, training, rng) for _ in range(sets)), strict=True
        )
        yield (
            "checkpoint",
            name,
            *(share(np.array(verdicts) == verdict) for verdict in VERDICTS[:4]),
            share(np.array(right)),
        )
    for sizes in ((3, 3), (3, 4), (5, 5), (8, 8)):
        for spread, shift in ((1.0, 0.0), (5.0, 0.0), (1.0, 2.0)):
            found = [test_recipe.recipe_answer(rng, sizes, spread=spread, shift=shift) for _ in range(sets)]
            verdicts = np.array([answer.verdict for answer in found])
            wrong = [answer.verdict in ("yes", "mixed") and answer.sure == 0.95 for answer in found]
            if shift:
                wrong = [answer.answer.startswith("dmax is better") for answer in found]
            kind = (
                f"{sizes[0]} + {sizes[1]} runs, {f'{shift:g} SD apart' if shift else f'alike, spread {spread:g} : 1'}"
            )
            yield "recipe", kind, *(share(verdicts == verdict) for verdict in VERDICTS[:4]), share(~np.array(wrong))


def rank_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """What is said of the rank of an adapter that learns a teacher of known rank."""
    yield "adapter and teacher", *(f"{state}, right" for state in STATES[:-1]), STATES[-1]
    for pair in ((4, 1), (4, 2), (8, 3), (8, 6), (4, 4), (8, 8), (4, 8), (8, 16)):
        told = claims(rng, [pair], settings=max(1, sets // 10), draws=10)
        total = sum(said for _, said in told.values())
        cells = [f"{said / total:.2f}, {right:,} of {said:,}" for right, said in (told[state] for state in STATES[:-1])]
        yield f"r = {pair[0]}, r* = {pair[1]}", *cells, f"{told['unclear'][1] / total:.2f}"


def trained_rates(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Faults that are found in one of 56 matrices, and healthy runs that raise an alarm."""
    yield "run", "share with a fault told", "verdict"
    tree = example_tree(steps=2, matrices=56)
    for name, (scatter, change) in _RUNS.items():
        verdicts = Counter(_trained_verdict(tree, scatter(rng, 56), change) for _ in range(sets))
        yield name, f"{1 - verdicts['yes'] / sets:.3f}", verdicts.most_common(1)[0][0]


def _trained_verdict(tree: xr.DataTree, sizes: np.ndarray, change: Mapping[int, float]) -> str:
    """Return the verdict on a result with these sizes, one of which is changed in proportion to its role's median."""
    update = tree["update"].to_dataset()[["count", "frobenius_norm", "quantisation_noise_share"]].copy(deep=True)
    roles = update["role"].values
    for matrix, factor in change.items():
        sizes[matrix] = factor * np.median(sizes[roles == roles[matrix]])
    update["frobenius_norm"].values[-1, 0] = sizes
    other = xr.DataTree.from_dict({"/": xr.Dataset(attrs=tree.attrs), "/update": update})
    return did_it_train(other, {"segments": [0]}).verdict


def _gaussian(spread: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Return sizes whose logarithms have a standard deviation within a role."""
    return lambda rng, count: np.exp(spread * rng.normal(size=count))


def _heavy(spread: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Return sizes whose logarithms have heavy tails: Student's t of 4 degrees of freedom."""
    return lambda rng, count: np.exp(spread * rng.standard_t(4, size=count))


_RUNS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], Mapping[int, float]]] = {
    **{f"healthy, ln size scatters by {spread}": (_gaussian(spread), {}) for spread in (0.2, 0.5, 0.8)},
    **{f"healthy, by {spread} with heavy tails": (_heavy(spread), {}) for spread in (0.2, 0.5)},
    **{
        f"one at {factor:g} of its role's median, by {spread}": (_gaussian(spread), {9: factor})
        for factor in (0.0, 1e-3, 1e-2, 1e2, 1e3)
        for spread in (0.2, 0.5)
    },
}
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
    "trained": trained_rates,
    "rank": rank_rates,
    "checkpoints": checkpoint_choices,
    "answers": answer_rates,
    "verdicts": verdict_rates,
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
