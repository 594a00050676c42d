"""How often answers are right where the truth is known: simulated trainings, results and studies of each kind.

python -m tests.benchmarks.answer_rates [--sets 2000] [--table checkpoints]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import xarray as xr

from dynamics.fisher.concentration import matched_gains
from dynamics.fisher.samples import SampleGroups
from dynamics.fisher.task_structure import cosines, simultaneous_interval
from dynamics.relate import choose_checkpoint
from dynamics.relate.group_losses import GroupedLosses
from dynamics.relate.stability import course_of
from dynamics.report.answers.answer import VERDICTS
from dynamics.report.answers.concentrated import ABOUT, chance_steps
from dynamics.report.answers.trained import did_it_train
from dynamics.spectra.training_noise import STATES
from dynamics.text import counted
from tests.adapters import claims
from tests.benchmarks.calibration import Row, Table, main, share
from tests.dynamics.fisher.simulated import gradients, grams, power_law, stacked
from tests.dynamics.relate.simulated_trainings import STEPS, Training
from tests.dynamics.report.answers import test_kept_checkpoint, test_recipe
from tests.trainings import KINDS, trainings
from tests.trees import example_tree


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
        cosine, low, high = ends[pair].tolist()
        low, high = simultaneous_interval(cosine, low, high, groups, int(known.sum()))
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
        plain, centred = (matched_gains(gram, (k,), centre=centre)[0] for centre in (False, True))
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
    for name, training in test_kept_checkpoint.KINDS.items():
        verdicts, right = zip(
            *(test_kept_checkpoint.checkpoint_answer(run, training, rng) for _ in range(sets)), strict=True
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
    "trained": trained_rates,
    "rank": rank_rates,
    "checkpoints": checkpoint_choices,
    "answers": answer_rates,
    "verdicts": verdict_rates,
}


if __name__ == "__main__":
    main(TABLES, __doc__, sets=2000)
