"""Arms are what they are said to be: projections, remainders, controls, in the space of K."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import dynamics
from dynamics.intervention.counterfactuals import ALL_ARMS, Arms
from dynamics.intervention.update_vectors import energy, inner, weighted_sum
from probes import LowRankMatrix, ProbeGram, Task, gradient_gram, watched_matrices
from probes.blocks import find_blocks, trained_parameters
from probes.weighted_gradients import weighted_gradients
from tests.families import FAMILIES
from tests.runs import lora_llama
from tests.updates import adapted_model, dense_model, probe_tasks, trained

SAMPLES = 16


def explicit(model, tasks, change, space: str = "tangent") -> tuple[Tensor, Tensor]:
    """G ``(N, d)`` in orthonormal coordinates of the space, and δ in them."""
    ones = torch.eye(sum(map(len, tasks)), dtype=torch.float64)
    gradients = weighted_gradients(model, tasks, ones, space=space)
    blocks = {block.name: block for block in find_blocks(model, space).chosen}

    def vector(matrices) -> Tensor:
        parts = []
        for name in gradients[0]:
            tangent = blocks[name].tangent if name in blocks else None
            matrix = matrices[name]
            parts.append(matrix.double().flatten() if tangent is None else tangent.of_change(matrix))
        return torch.cat(parts)

    return torch.stack([vector(gradient) for gradient in gradients]), vector(change)


@pytest.fixture(scope="module")
def adapter():
    """Model, tasks, update, K and b: LoRA in float64."""
    model, tasks = adapted_model(layers=2), probe_tasks()
    change, _, _ = trained(model)
    return model, tasks, change, gradient_gram(model, tasks, update=change)


def counterfactuals(adapter, **options) -> dynamics.intervention.counterfactuals.Counterfactuals:
    model, tasks, change, gram = adapter
    return dynamics.counterfactuals(model, tasks, gram, change, **{"k": (4, 2), "arms": ALL_ARMS, **options})


@pytest.fixture(scope="module")
def arms(adapter):
    return counterfactuals(adapter)


@pytest.fixture(scope="module")
def vectors(adapter) -> tuple[Tensor, Tensor]:
    """G and δ of the adapter, explicitly."""
    model, tasks, change, _ = adapter
    return explicit(model, tasks, change)


def coordinates(model, change) -> Tensor:
    """A change of the adapter in the orthonormal coordinates of ``explicit``."""
    blocks = find_blocks(model, "tangent").chosen
    return torch.cat([block.tangent.of_change(change[block.name]) for block in blocks])


def test_groups_are_never_shared(adapter, arms) -> None:
    assert len(arms.folds) == 4
    for fit, held_out, _ in arms.folds:
        assert not {*fit} & {*held_out}
        assert {*fit} | {*held_out} == {f"image-{number}" for number in range(8)}
    assert {*arms.folds[0].fit} == {*arms.folds[1].held_out}


@pytest.mark.parametrize("k", [4, 2])
def test_on_is_the_projection_on_the_leading_directions(adapter, arms, vectors, k: int) -> None:
    model, _, change, _ = adapter
    g, delta = vectors
    for _, _, parts in (arms.folds[0], (None, None, arms.whole)):
        _, _, v = torch.linalg.svd(g[parts.rows], full_matrices=False)
        expected = v[:k].mT @ (v[:k] @ delta)
        on = coordinates(model, parts[f"on({k})"])
        torch.testing.assert_close(on, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))
        share = float(expected.square().sum()) / energy(change)
        assert parts.captured("on", k) == pytest.approx(share, rel=1e-10)
        assert parts.deviation < 1e-10


def test_bottom_and_random_are_projections_too(adapter, arms, vectors) -> None:
    model, parts = adapter[0], arms.folds[0].arms
    g, delta = vectors
    _, _, v = torch.linalg.svd(g[parts.rows], full_matrices=False)
    bottom = coordinates(model, parts["bottom"])
    torch.testing.assert_close(bottom, v[-4:].mT @ (v[-4:] @ delta), rtol=1e-5, atol=1e-8 * float(delta.norm()))
    random = coordinates(model, parts["random"])
    # In the span, and orthogonal to what it leaves: ⟨Πδ, δ − Πδ⟩ = 0.
    torch.testing.assert_close(v.mT @ (v @ random), random, rtol=1e-6, atol=1e-9 * float(delta.norm()))
    assert float(random @ (delta - random)) == pytest.approx(0, abs=1e-9 * float(delta @ delta))
    assert float(random.square().sum()) == pytest.approx(parts.parts["random", 4].energy, rel=1e-8)


def test_on_and_off_are_the_update(arms, adapter) -> None:
    *_, change, _ = adapter
    for k in (4, 2):
        parts = arms.folds[1].arms
        rest = weighted_sum([(1.0, parts[f"on({k})"]), (1.0, parts[f"off({k})"]), (-1.0, change)])
        assert abs(energy(rest)) < 1e-15 * energy(change)
        assert inner(parts[f"on({k})"], parts[f"off({k})"]) == pytest.approx(0, abs=1e-10 * energy(change))


def test_matched_arms_have_the_norm_and_the_product_of_on(arms, adapter) -> None:
    *_, change, _ = adapter
    parts = arms.folds[0].arms
    for k in (4, 2):
        norm = energy(parts[f"on({k})"])
        for name in (f"matched+({k})", f"matched-({k})"):
            assert energy(parts[name]) == pytest.approx(norm, rel=1e-9)
            assert inner(parts[name], change) == pytest.approx(norm, rel=1e-9)
        mean = weighted_sum([(0.5, parts[f"matched+({k})"]), (0.5, parts[f"matched-({k})"])])
        half = weighted_sum([(1.0, mean), (-norm / energy(change), change)])
        assert abs(energy(half)) < 1e-15 * energy(change)


def test_singular_directions(arms, adapter) -> None:
    *_, change, _ = adapter
    parts, name = arms.folds[0].arms, "model.layers.1.mlp.up_proj"
    u, s, vt = torch.linalg.svd(change[name].to_dense())
    expected = u[:, :2] * s[:2] @ vt[:2]
    torch.testing.assert_close(parts["sigma_top(2)"][name].to_dense(), expected, rtol=1e-10, atol=1e-12)
    both = parts["sigma_top(2)"][name].to_dense() + parts["sigma_tail(2)"][name].to_dense()
    torch.testing.assert_close(both, change[name].to_dense(), rtol=1e-10, atol=1e-12)


def test_layers(adapter) -> None:
    arms = counterfactuals(adapter, arms=["layer:1", "without_layer:1", "layer:model.layers.0.mlp.up_proj"])
    parts = arms.folds[0].arms
    assert {name.split(".")[2] for name in parts["layer:1"]} == {"1"}
    assert {name.split(".")[2] for name in parts["without_layer:1"]} == {"0"}
    assert list(parts["layer:model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="layer among 0, 1"):
        counterfactuals(adapter, arms=["layer:7"]).folds[0].arms["layer:7"]


def test_ranks(arms) -> None:
    """2r along gradients; the rest has the update's own columns beside them."""
    parts = arms.folds[0].arms
    name = "model.layers.0.self_attn.q_proj"
    assert np.linalg.matrix_rank(parts["on"][name].to_dense(), tol=1e-9) <= 6
    assert np.linalg.matrix_rank(parts["off"][name].to_dense(), tol=1e-9) <= 9


def test_the_same_for_every_gauge(adapter) -> None:
    """B M and M⁻¹A are the same adapter: on is the same change of the matrix."""
    _model, tasks, change, _ = adapter
    expected = counterfactuals(adapter).folds[0].arms["on"]
    turned = adapted_model(layers=2)
    generator = torch.Generator().manual_seed(3)
    modules = [module for module in turned.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
    for module in modules:
        m = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)
        b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
        b.data, a.data = b.data @ m, torch.linalg.solve(m, a.data)
    gram = gradient_gram(turned, tasks, update=change)
    on = counterfactuals((turned, tasks, change, gram)).folds[0].arms["on"]
    for name in expected:
        torch.testing.assert_close(on[name].to_dense(), expected[name].to_dense(), rtol=1e-6, atol=1e-10)


def test_an_update_in_the_span_has_no_rest() -> None:
    model, tasks = adapted_model(), probe_tasks()
    weights = torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (change,) = weighted_gradients(model, tasks, weights)
    gram = gradient_gram(model, tasks, update=change)
    whole = dynamics.counterfactuals(model, tasks, gram, change, k=SAMPLES).whole
    assert energy(whole["off"]) < 1e-16 * energy(change)


def test_factor_space() -> None:
    """The projection is of the factors; it acts on the matrices as changed factors do."""
    model, tasks = adapted_model(), probe_tasks()
    _, moved, after = trained(model)
    gram = gradient_gram(model, tasks, update=moved, space="factor")
    arms = dynamics.counterfactuals(model, tasks, gram, moved, k=4)
    g, delta = explicit(model, tasks, moved, space="factor")
    parts = arms.folds[0].arms
    _, _, v = torch.linalg.svd(g[parts.rows], full_matrices=False)
    _, on = explicit(model, tasks, parts.change("on", 4), space="factor")
    torch.testing.assert_close(on, v[:4].mT @ (v[:4] @ delta), rtol=1e-7, atol=1e-10)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    start = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    end = after[f"{name}.lora_B.default.weight"] @ after[f"{name}.lora_A.default.weight"]
    full = parts["full"][name]
    assert isinstance(full, LowRankMatrix)
    torch.testing.assert_close(full.to_dense(), 2.0 * (end - start).detach(), rtol=1e-9, atol=1e-13)
    assert full.rank == 6


def test_dense_weights_and_vectors() -> None:
    model, tasks = dense_model(), probe_tasks()
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change, k=4)
    g, delta = explicit(model, tasks, change)
    parts = arms.folds[0].arms
    _, _, v = torch.linalg.svd(g[parts.rows], full_matrices=False)
    _, on = explicit(model, tasks, parts["on"])
    torch.testing.assert_close(on, v[:4].mT @ (v[:4] @ delta), rtol=1e-7, atol=1e-10)
    assert {*parts["off"]} == {*change}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norms_hold_in_lower_precision(dtype: torch.dtype, limit: float) -> None:
    model, tasks = adapted_model(torch.float32), probe_tasks()
    change, _, _ = trained(model)
    model = model.to(dtype)
    gram = gradient_gram(model, tasks, update=change)
    parts = dynamics.counterfactuals(model, tasks, gram, change, k=2).folds[0].arms
    assert parts.deviation < limit
    on = parts["on"]["model.layers.0.self_attn.q_proj"]
    assert isinstance(on, LowRankMatrix)
    assert on.left_factor.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_resolves_directions(dtype: torch.dtype) -> None:
    """Rounding of gradients is noise, far below the eigenvalues of what they have in common."""
    model, tasks = adapted_model(), probe_tasks()
    change, _, _ = trained(model)
    exact = counterfactuals((model, tasks, change, gradient_gram(model, tasks, update=change)), k=4)
    model = adapted_model().to(dtype)
    coarse = counterfactuals((model, tasks, change, gradient_gram(model, tasks, update=change)), k=4)
    for (*_, expected), (*_, parts) in zip(exact.folds, coarse.folds, strict=True):
        assert parts.parts["on", 4].directions == 4
        assert parts.captured("on", 4) == pytest.approx(expected.captured("on", 4), rel=0.1)
        assert parts.deviation < 2e-2


def test_autocast_within_the_forward_counts(adapter) -> None:
    """As accelerate has it: the weights alone do not tell in which format gradients are."""
    model, tasks, change, _ = adapter
    model = adapted_model(torch.float32, layers=2)
    forward = model.forward

    def autocast(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **options)

    gram = gradient_gram(model, tasks, update=change)
    assert dynamics.counterfactuals(model, tasks, gram, change).update.tolerance == 1e-5
    model.forward = autocast
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change)
    assert arms.update.tolerance == 2e-2
    assert 0 < arms.folds[0].arms.deviation < 2e-2


def test_shorter_products_of_single_precision_count(adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, as a Trainer's ``tf32=True`` sets it."""
    _, tasks, change, gram = adapter
    tolerances = []
    for precision in ("high", "highest"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        models = adapted_model(layers=2), adapted_model(torch.float32, layers=2)
        tolerances.append([dynamics.counterfactuals(m, tasks, gram, change).update.tolerance for m in models])
    assert tolerances == [[1e-5, 2e-2], [1e-5, 1e-5]]


def test_changes_of_dense_weights_may_be_products() -> None:
    model, tasks = dense_model(), probe_tasks()
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change)
    products = {
        name: LowRankMatrix(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype)) if matrix.ndim == 2 else matrix
        for name, matrix in change.items()
    }
    for arm in ("off", "matched+", "sigma_tail"):
        expected = dynamics.counterfactuals(model, tasks, gram, change, k=2, arms=ALL_ARMS).whole[arm]
        matrices = dynamics.counterfactuals(model, tasks, gram, products, k=2, arms=ALL_ARMS).whole[arm]
        assert energy(weighted_sum([(1.0, expected), (-1.0, matrices)])) < 1e-18 * energy(expected)


def test_one_task_needs_no_list(adapter) -> None:
    model, (task, _), change, _ = adapter
    gram = gradient_gram(model, task, update=change)
    arms = dynamics.counterfactuals(model, task, gram, change, k=2)
    effects = dynamics.intervene(model, task, arms)
    assert effects.identical(dynamics.intervene(model, [task], arms))
    assert [*effects["task"].values] == ["all", "report"]


def test_an_update_beside_all_gradients_is_all_rest() -> None:
    layer = torch.nn.Linear(2, 1, bias=False).double()
    samples = [{"x": [1.0 + number, 0.0]} for number in range(8)]
    task = Task("line", samples, loss=lambda model, batch: model(batch["x"].double())[:, 0] ** 2)
    change = {"weight": torch.tensor([[0.0, 1.0]], dtype=torch.float64)}
    arms = dynamics.counterfactuals(layer, task, gradient_gram(layer, task, update=change), change, k=1)
    assert energy(arms.whole["on"]) == 0
    assert torch.equal(arms.whole["off"]["weight"], change["weight"])
    assert dynamics.intervene(layer, task, arms)["captured"].values.tolist() == [[[0.0, 0.0]]]


def test_chosen_blocks(adapter) -> None:
    model, tasks, change, _ = adapter
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    part = {name: change[name] for name in names}
    gram = gradient_gram(model, tasks, update=part, blocks=names)
    arms = dynamics.counterfactuals(model, tasks, gram, part, k=2)
    assert [*arms.folds[0].arms["on"]] == names
    together = gradient_gram(model, tasks, update=change, blocks=["global"])
    arms = dynamics.counterfactuals(model, tasks, together, change, k=2)
    assert {*arms.folds[0].arms["on"]} == {*change}


def test_broken_samples_have_no_part() -> None:
    model, tasks = adapted_model(), probe_tasks()
    broken = dict(tasks[0].samples[3])
    broken["labels"] = torch.full_like(broken["labels"], -100)
    samples = [*tasks[0].samples[:3], broken, *tasks[0].samples[4:]]
    tasks = [Task("report", samples, group="image", loss="mean"), tasks[1]]
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change, skip_broken=True)
    assert gram.left_out == (3,)
    arms = dynamics.counterfactuals(model, tasks, gram, change, k=2)
    assert all(parts.deviation < 1e-9 for _, _, parts in arms.folds)


def test_the_headline_is_fixed_before_looking(adapter) -> None:
    assert counterfactuals(adapter, k=None).k == (2,)  # a quarter of the 8 samples of a fold


def test_an_arm_is_made_when_asked_for_and_let_go(adapter) -> None:
    parts = counterfactuals(adapter).folds[0].arms
    first = parts["on"]["model.layers.0.self_attn.q_proj"].to_dense()
    parts.release()
    torch.testing.assert_close(parts["on"]["model.layers.0.self_attn.q_proj"].to_dense(), first, rtol=0, atol=0)


def test_a_model_that_moved_is_refused() -> None:
    model, tasks = adapted_model(), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    parameter.data += 0.01
    for arm in ("on", "full"):  # made, or not
        with pytest.raises(ValueError, match="where the update began"):
            arms.folds[0].arms[arm]


def test_an_arm_made_before_the_model_moved_is_refused() -> None:
    """In factor space it is another change of the matrix then; and what is exported begins elsewhere."""
    model, tasks = adapted_model(), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    assert arms.whole["on"]
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data += 0.01
    with pytest.raises(ValueError, match="where the update began"):
        arms.whole["on"]


def test_effects_are_of_the_model_and_the_tasks_behind_the_arms(adapter, arms) -> None:
    model, tasks, *_ = adapter
    other = adapted_model(layers=2)
    next(parameter for parameter in other.parameters() if parameter.requires_grad).data += 0.01
    with pytest.raises(ValueError, match="where the update began"):
        dynamics.intervene(other, tasks, arms)
    with pytest.raises(ValueError, match="tasks behind K"):
        dynamics.intervene(model, tasks[::-1], arms)


def test_a_part_of_small_share_is_not_refused_for_its_rounding() -> None:
    """⟨on, δ⟩ of nearly orthogonal on and δ is rounded relative to ‖on‖‖δ‖: in single precision, by more than ‖on‖²."""
    model, batch = FAMILIES["vit"].model_and_batch()
    generator = torch.Generator().manual_seed(1)
    samples = [
        {
            name: values[number % 2]
            + (0.3 * torch.randn(values.shape[1:], generator=generator) if name != "labels" else 0)
            for name, values in batch.items()
        }
        for number in range(12)
    ]
    task = Task(
        "images",
        samples,
        collate=lambda parts: {name: torch.stack([part[name] for part in parts]) for name in parts[0]},
    )
    change = {name: torch.randn(m.shape, generator=generator) for name, m in watched_matrices(model).items()}
    gram = gradient_gram(model.eval(), task, update=change)
    arms = dynamics.counterfactuals(model, task, gram, change, k=3)
    assert max(parts.deviation for *_, parts in arms.folds) < 1e-5
    assert arms.whole.captured("on", 3) < 0.01
    wrong = {name: values * 1.001 for name, values in change.items()}
    with pytest.raises(ValueError, match="gradients as those behind K"):
        dynamics.counterfactuals(model, task, gram, wrong, k=3).whole["on"]


def test_a_gram_of_other_gradients_is_refused(adapter) -> None:
    model, tasks, change, _ = adapter
    other = gradient_gram(
        model, [Task("report", tasks[0].samples, group="image", loss="mean"), tasks[1]], update=change
    )
    arms = dynamics.counterfactuals(model, tasks, other, change, k=2)
    with pytest.raises(ValueError, match="gradients as those behind K"):
        arms.folds[0].arms["on"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"arms": ["of"]}, "arms among"),
        ({"arms": "on"}, "list of arms"),
        ({"k": 0}, "from 1 to the number of probe samples, got 0"),
        ({"k": []}, "from 1 to the number of probe samples, got none"),
        ({"k": (4, SAMPLES + 1)}, f"at most the number of probe samples, {SAMPLES}, got {SAMPLES + 1}"),
        ({"splits": 0}, "one split"),
    ],
)
def test_bad_choices_are_refused(adapter, options: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        counterfactuals(adapter, **options)


def test_what_cannot_be_taken_apart_is_refused(adapter) -> None:
    model, tasks, change, gram = adapter
    zero = {
        name: LowRankMatrix(torch.zeros(matrix.shape[0], 1), torch.zeros(1, matrix.shape[1]))
        for name, matrix in change.items()
    }
    cases = [
        (tasks, ProbeGram({"global": np.eye(SAMPLES)}), change, "update=change"),
        (tasks, gradient_gram(model, tasks), change, "update=change"),
        (tasks[:1], gram, change, "tasks behind K"),
        (tasks, gradient_gram(model, tasks, update=zero), zero, "other than zero"),
        (tasks, gradient_gram(model, tasks, update=change, fisher="sampled"), change, "empirical"),
        (tasks, gradient_gram(model, tasks, update=change, space="weight"), change, "tangent or factor"),
        (tasks, gradient_gram(model, tasks, update=change, projection=64), change, "whole gradients"),
    ]
    for of_tasks, of_gram, of_change, what in cases:
        with pytest.raises(ValueError, match=what):
            dynamics.counterfactuals(model, of_tasks, of_gram, of_change, k=2)
    few = [Task("report", tasks[0].samples[:3])]
    with pytest.raises(ValueError, match="at least 4 groups"):
        dynamics.counterfactuals(model, few, gradient_gram(model, few, update=change), change)


def test_a_model_at_the_end_of_its_first_update_is_refused() -> None:
    """From B = 0 the adapter at the end is the update: K and arms of there would be those of another increment."""
    model, tasks = lora_llama(lora_dropout=0.0).double().eval(), probe_tasks()
    change, _, after = trained(model)
    at_start = gradient_gram(model, tasks, update=change)
    dynamics.counterfactuals(model, tasks, at_start, change, k=2)
    for name, parameter in trained_parameters(model).items():
        parameter.data.copy_(after[name])
    at_the_end = gradient_gram(model, tasks, update=change)
    with pytest.raises(ValueError, match="adapters that are the update"):
        dynamics.counterfactuals(model, tasks, at_the_end, change, k=2)


def test_an_unknown_arm_is_named(arms) -> None:
    assert isinstance(arms.whole, Arms)
    with pytest.raises(KeyError, match="one of the arms full, on"):
        arms.whole["of"]
