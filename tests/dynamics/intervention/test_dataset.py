"""Effects are differences of held-out losses with the arm in the weights; the dataset says what it holds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import dynamics
from dynamics.fisher.samples import SampleGroups
from dynamics.intervention.counterfactuals import ALL_ARMS, Counterfactuals
from dynamics.intervention.effects import effects
from dynamics.schema import INTERVENTION
from probes import LowRankMatrix, Task, gradient_gram
from tests.updates import adapted_model, dense_model, probe_tasks, texts, trained


@pytest.fixture(scope="module")
def run() -> tuple[nn.Module, list[Task], Counterfactuals, xr.Dataset, list[tuple[int, int]]]:
    """A model at the start of an update, its tasks and arms, the effects, and the progress told meanwhile."""
    model, tasks = adapted_model(layers=2), probe_tasks()
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change, k=(4, 2), arms=(*ALL_ARMS, "layer:0"))
    told: list[tuple[int, int]] = []
    result = dynamics.intervene(model, tasks, arms, step=30, progress=lambda done, total: told.append((done, total)))
    return model, tasks, arms, result, told


def merged(model: nn.Module, change) -> nn.Module:
    """A copy with a change in its base weights."""
    changed = copy.deepcopy(model)
    for name, matrix in change.items():
        layer = changed.get_submodule(f"base_model.model.{name}")
        layer.base_layer.weight.data += matrix.to_dense() if isinstance(matrix, LowRankMatrix) else matrix
    return changed


def losses(model: nn.Module, tasks: list[Task]) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([task.losses(model, batch) for task in tasks for batch in task.batches()]).numpy()


def by_hand(run, arm: str, scale: float = 1.0) -> np.ndarray:
    """Fall of each sample's loss in each split, the arm merged into the weights."""
    model, tasks, arms, *_ = run
    falls, base = np.zeros((arms.splits, 16)), losses(model, tasks)
    groups = np.array([group for task in tasks for group in task.groups()])
    for number, (_, held_out, parts) in enumerate(arms.folds):
        change = {name: LowRankMatrix(matrix.left, matrix.right, scale) for name, matrix in parts[arm].items()}
        fall = base - losses(merged(model, change), tasks)
        falls[number // 2] += np.where(np.isin(groups, held_out), fall, 0.0)
    return falls


def means(falls: np.ndarray) -> np.ndarray:
    """D for all samples and for each task."""
    values = falls.mean(0)
    return np.array([values.mean(), values[:8].mean(), values[8:].mean()])


@pytest.mark.parametrize(
    ("arm", "name", "k", "scale"),
    [
        ("on", "on", 4, 1.0),
        ("on(2)", "on", 2, 1.0),
        ("on", "on", 4, 0.25),
        ("off", "off", 4, 1.0),
        ("full", "full", 2, 0.5),
        ("random", "random", 4, 1.0),
        ("bottom(2)", "bottom", 2, 1.0),
        ("sigma_top", "sigma_top", 4, 1.0),
        ("layer:0", "layer:0", 2, 1.0),
    ],
)
def test_effects_are_those_of_weights_with_the_arm_in_them(run, arm: str, name: str, k: int, scale: float) -> None:
    effects = run[3]
    stored = effects["effect"].sel(step=30, arm=name, k=k, scale=scale)
    assert stored["task"].values.tolist() == ["all", "report", "vqa"]
    np.testing.assert_allclose(stored, means(by_hand(run, arm, scale)), rtol=1e-9, atol=1e-13)


def test_intervals_are_those_of_the_effects_of_each_split(run) -> None:
    falls = by_hand(run, "on")
    groups = np.array([group for task in run[1] for group in task.groups()])
    expected = effects(falls[:, None], SampleGroups.of_one_task(np.unique(groups, return_inverse=True)[1]))
    stored = run[3].sel(step=30, arm="on", k=4, scale=1.0, task="all")
    np.testing.assert_allclose(stored["effect_low"], expected.low.item(), rtol=1e-9)
    np.testing.assert_allclose(stored["effect_high"], expected.high.item(), rtol=1e-9)
    assert np.abs(falls[0] - falls[1]).max() > 1e-6


def test_the_matched_pair_is_averaged(run) -> None:
    pair = means((by_hand(run, "matched+") + by_hand(run, "matched-")) / 2)
    np.testing.assert_allclose(
        run[3]["effect"].sel(step=30, arm="matched", k=4, scale=1.0), pair, rtol=1e-9, atol=1e-13
    )


def test_to_first_order_effects_are_those_of_k_and_b(run) -> None:
    """At a fiftieth of the length; norms are computed in single precision in this model."""
    model, tasks, arms, *_ = run
    small = dynamics.intervene(model, tasks, arms, scales=(0.02,)).sel(step=0, scale=0.02)
    for arm in ("full", "on", "off"):
        effect, predicted = (small[name].sel(arm=arm) for name in ("effect", "predicted_effect"))
        np.testing.assert_allclose(effect, predicted, rtol=0.15, atol=1e-5)
    assert np.abs(small["predicted_effect"].sel(arm="on")).max() > 1e-4
    for arm in ("random", "bottom"):
        assert np.isfinite(run[3]["predicted_effect"].sel(arm=arm, scale=1.0)).all()
    assert np.isnan(run[3]["predicted_effect"].sel(arm="sigma_top")).all()
    matched, full = (run[3]["predicted_effect"].sel(arm=arm, scale=1.0) for arm in ("matched", "full"))
    assert np.abs(matched).max() < np.abs(full).max()


def test_parts_add_up(run) -> None:
    """The interaction is what the parts do only together; shares of the two parts add to one."""
    effects = run[3].sel(step=30, scale=1.0)
    d = {arm: effects["effect"].sel(arm=arm) for arm in ("full", "on", "off")}
    np.testing.assert_allclose(effects["interaction"], d["full"] - d["on"] - d["off"], rtol=1e-9, atol=1e-14)
    paid = (d["on"] + d["full"] - d["off"]) / 2
    assert (np.abs(effects["excess"] - (paid - effects["captured"] * d["full"])) < 0.05 * np.abs(paid).max()).all()
    separable = np.abs(effects["interaction"]) <= np.abs(d["full"]) / 2
    assert (effects["separable"] == separable).all()
    assert (effects["share"].notnull() == (effects["separable"].astype(bool) & effects["resolved"].astype(bool))).all()


def test_the_schema_has_every_variable(run) -> None:
    effects = run[3]
    for name, variable in effects.data_vars.items():
        assert variable.dims == INTERVENTION[name].dims, name
        assert variable.attrs["units"] == INTERVENTION[name].units
    assert {*INTERVENTION} - {*effects.data_vars} == {"score_effect", "score_effect_low", "score_effect_high"}
    assert effects.attrs["splits"] == 2
    assert effects.attrs["groups"] == 8
    assert effects.attrs["repeat_deviation"] == 0.0
    assert effects.attrs["norm_deviation"] < 1e-10
    assert effects["headline"].values.tolist() == [[False, True]]  # k = 2, 4
    for end, side in (("low", -1), ("high", 1)):
        assert (side * (effects[f"effect_{end}"] - effects["effect"]).sel(arm="full") > 0).all()


def test_what_was_not_run_is_missing(run) -> None:
    effects = run[3]["effect"]
    assert np.isnan(effects.sel(arm="random", scale=0.5)).all()
    assert effects.sel(arm="full").notnull().all()


def test_progress_is_told(run) -> None:
    *_, told = run
    totals = {total for _, total in told}
    assert len(totals) == 1
    done = [done for done, _ in told]
    assert done[0] == 0
    assert done == sorted(done)
    assert max(done) <= totals.pop()


def test_the_default_costs_25_forward_passes() -> None:
    """Four of the base, 3 of the whole update, 18 of arms; directions take one pass forward and backward a split."""
    model, tasks = adapted_model(), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    rows: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(0 if torch.is_grad_enabled() else len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    dynamics.intervene(model, tasks, arms)
    handle.remove()
    assert sum(rows) == 25 * 16


class Offset(nn.Linear):
    """A loss that is larger where more samples are in the batch, as padding and kernels make it."""

    offset = 0.0

    def of(self, model: nn.Module, batch) -> torch.Tensor:
        return (model(batch["x"]) - 1).square().sum(1) + self.offset * len(batch["x"])


def intervened(model: Offset, tasks: list[Task], change: dict[str, torch.Tensor], offset: float) -> xr.Dataset:
    model.offset = offset
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    return dynamics.intervene(model, tasks, arms)


def test_what_a_batch_does_to_its_losses_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Offset(4, 2, bias=False).double()
    rows = [{"x": row} for row in torch.randn(10, 4, generator=generator, dtype=torch.float64)]
    task = Task("x", rows, loss=model.of, batch_size=3)
    change = {"weight": 0.1 * torch.randn(2, 4, generator=generator, dtype=torch.float64)}
    plain, shifted = (intervened(model, [task], change, offset) for offset in (0.0, 1e-3))
    np.testing.assert_allclose(shifted["effect"], plain["effect"], rtol=0, atol=1e-12)
    assert shifted.attrs["repeat_deviation"] == 0.0


def test_the_model_is_left_as_it_was() -> None:
    model, tasks = adapted_model(torch.float32).train(), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    dynamics.intervene(model, tasks, arms, scales=(1.0,))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_move_with_the_arms() -> None:
    """A score of one task: it is measured for each arm at full length; the other task has none."""

    def likelihood(model: nn.Module, batch) -> torch.Tensor:
        return -2.0 * Task("x", [0]).losses(model, batch)

    model, plain = adapted_model(), probe_tasks()
    tasks = [Task("report", plain[0].samples, group="image", score=likelihood), plain[1]]
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    effects = dynamics.intervene(model, tasks, arms, scales=(1.0,)).sel(step=0, k=2)
    of_report = effects.sel(task="report")
    for arm in ("full", "on", "off"):
        value = of_report["score_effect"].sel(arm=arm)
        assert float(value) == pytest.approx(2 * float(of_report["effect"].sel(arm=arm, scale=1.0)), rel=1e-9)
        assert float(of_report["score_effect_low"].sel(arm=arm)) < float(value)
    assert np.isnan(effects["score_effect"].sel(task=["all", "vqa"])).all()


def test_a_task_without_a_score_has_none_where_a_half_is_one_task() -> None:
    """Its samples are held out together, without any task that has a score."""

    def squares(model: nn.Module, batch) -> torch.Tensor:
        return (model(batch["x"].double())[:, 0] - 1) ** 2

    tasks = [
        Task(name, [{"x": [1.0, 0.1 * number]} for number in range(2)], loss=squares, score=score)
        for name, score in (("scored", squares), ("plain", None))
    ]
    layer = nn.Linear(2, 1, bias=False).double()
    change = {"weight": torch.tensor([[0.3, 0.2]], dtype=torch.float64)}
    gram = gradient_gram(layer, tasks, update=change)
    seeds = (dynamics.counterfactuals(layer, tasks, gram, change, k=1, splits=1, seed=seed) for seed in range(50))
    apart = next(arms for arms in seeds if len({name.split("/")[0] for name in arms.folds[0].fit}) == 1)
    effects = dynamics.intervene(layer, tasks, apart)["score_effect"].sel(step=0, k=1, arm="on")
    assert np.isfinite(effects.sel(task="scored"))
    assert np.isnan(effects.sel(task=["plain", "all"])).all()


def test_each_further_k_costs_18_forward_passes(run) -> None:
    model, tasks, arms, *_ = run

    def stop(done: int, total: int) -> None:
        raise InterruptedError(total)

    for k, passes in (((2,), 25), ((2, 4), 43), ((2, 4, 6), 61)):
        some = dynamics.counterfactuals(model, tasks, arms.gram, arms.whole["full"], k=k)
        with pytest.raises(InterruptedError, match=f"^{passes * 16}$"):
            dynamics.intervene(model, tasks, some, progress=stop)


def test_dense_weights_and_vectors() -> None:
    model, tasks = dense_model(), probe_tasks()
    change, _, after = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    effects = dynamics.intervene(model, tasks, arms, scales=(1.0,)).sel(step=0)
    base = losses(model, tasks)
    trained_model = copy.deepcopy(model)
    for name, value in after.items():
        trained_model.get_parameter(name).data.copy_(value)
    expected = (base - losses(trained_model, tasks)).mean()
    assert float(effects["effect"].sel(arm="full", k=2, scale=1.0, task="all")) == pytest.approx(expected, rel=1e-9)


def test_samples_of_the_same_names_with_other_losses_are_refused(run) -> None:
    model, tasks, arms, *_ = run
    others = [Task(task.name, texts(16, seed=7)[first::2], group="image") for first, task in enumerate(tasks)]
    assert [task.sample_ids() for task in others] == [task.sample_ids() for task in tasks]
    with pytest.raises(ValueError, match="samples behind K"):
        dynamics.intervene(model, others, arms)


def test_bad_lengths_are_refused(run) -> None:
    model, tasks, arms, *_ = run
    with pytest.raises(ValueError, match="positive lengths"):
        dynamics.intervene(model, tasks, arms, scales=(0.0,))
