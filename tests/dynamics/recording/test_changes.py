"""What is trained changes in the middle: what is new is taken up before it moves, what is frozen ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import dynamics
from dynamics import Recorder
from dynamics.recording.changes import Change, ModelState
from probes import Task
from probes.watched import find
from tests.records import records_of
from tests.runs import VOCABULARY, llama

QUERY = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
HALF = 4  # steps before the change


def model(**changes) -> nn.Module:
    """LoRA that is not zero at the start, so that a wrong start is a wrong number."""
    torch.manual_seed(1)
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(llama(), LoraConfig(**{**lora, **changes})).double().eval()


def rows(seed: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Each watched matrix multiplied out."""
    matrices = {each.name: each.read() for each in find(model).watched}
    return {name: (m if isinstance(m, Tensor) else m.to_dense()).detach().clone() for name, m in matrices.items()}


def train(
    run: Path,
    model: nn.Module,
    change: Callable[[nn.Module], None],
    *,
    every: int = 1,
    steps: int = 8,
    late: bool = False,
    tasks: bool = True,
    preset: str = "standard",
    **options,
) -> tuple[Recorder, dict[int, dict[str, Tensor]]]:
    """Steps with a change after :data:`HALF` of them, and the watched matrices after each; in ``HALF + 0.5`` after it.

    Args:
        late: Whether the change comes between the optimizer's step and the record.
    """
    samples = [{"input_ids": row, "labels": row} for row in rows(5)]
    kept: dict = {0: weights(model)}
    with Recorder(
        run, model, tasks=[Task("a", samples)] if tasks else None, every=every, preset=preset, strict=True, **options
    ) as recorder:
        for step in range(1, steps + 1):
            with recorder.step(step):
                model(input_ids=rows(), labels=rows()).loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None and parameter.requires_grad:
                            parameter -= 0.5 * parameter.grad
                        parameter.grad = None
                kept[step] = weights(model)
                if step == HALF and late:
                    change(model)
            if step == HALF and not late:
                change(model)
            if step == HALF:
                kept[step + 0.5] = weights(model)
    return recorder, kept


def norm(tree: xr.DataTree, kind: str, matrix: str) -> dict[int, float]:
    found = tree["update"]["frobenius_norm"].sel(kind=kind, matrix=matrix)
    return dict(zip(found["step"].values.tolist(), found.values.tolist(), strict=True))


def distance(one: Tensor, other: Tensor) -> object:
    return pytest.approx(float((one - other).norm()), rel=1e-6)


def unfreeze(model: nn.Module) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


def test_a_change_is_told_with_what_changed():
    change = Change(began=("e",), partly=("a", "b", "c", "d"), others=("norm.weight",))
    (finding,) = change.findings(step=3, recorded=3)
    assert finding.message == (
        "The set of trained parameters changed after step 3: training began for 1 matrix (e), whose totals count from "
        "step 3, or from the first step that trained them; other factors of 4 matrices (a, b, c and 1 more) are "
        "trained; training began or ended for 1 parameter (norm.weight) outside the watched matrices."
    )


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_a_weight_that_is_unfrozen(tmp_path, every, late):
    preset = "full" if late else "standard"
    recorder, kept = train(tmp_path, model(), unfreeze, every=every, late=late, preset=preset)
    assert [finding.code for finding in recorder.findings].count("OD313") == 1
    start = kept[HALF + 0.5][EMBEDDING]
    tree = dynamics.open_run(tmp_path)
    total, increment = (norm(tree, kind, EMBEDDING) for kind in ("total", "increment"))
    last = HALF
    for step in [step for step in recorder.steps if step > HALF]:
        assert total[step] == distance(kept[step][EMBEDDING], start)
        assert increment[step] == distance(kept[step][EMBEDDING], start if last == HALF else kept[last][EMBEDDING])
        last = step
    assert all(np.isnan(total[step]) for step in recorder.steps if step <= HALF)
    fisher = tree["fisher"].to_dataset()
    assert fisher["step"].values.tolist() == recorder.steps
    moved = fisher["update_norm_squared"].sel(block=EMBEDDING, step=recorder.steps[-1]).item()
    assert moved == pytest.approx(increment[recorder.steps[-1]] ** 2, rel=1e-6)
    unknown = np.isnan(fisher["update_norm_squared"].sel(block="global")).values
    assert fisher["step"].values[unknown].tolist() == ([HALF] if late and every == 1 else [])
    assert "OD402" not in tree.attrs["findings"]


def test_what_is_frozen_is_measured_once_more_and_ends(tmp_path):
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.requires_grad_(False)

    recorder, kept = train(tmp_path, model(), freeze, every=3)
    assert recorder.steps == [3, 6]
    tree = dynamics.open_run(tmp_path)
    increment = norm(tree, "increment", QUERY)
    assert increment[6] == distance(kept[HALF][QUERY], kept[3][QUERY])  # nothing after the fourth step
    trained = records_of(tmp_path).records[6]["gradient"]["matrix"].values
    assert QUERY not in trained
    assert [finding.code for finding in recorder.findings] == ["OD313"]
    assert recorder.findings[0].evidence["ended"] == [QUERY]
    assert tree["fisher"]["step"].values.tolist() == [3, 6]


def test_a_phase_that_comes_back_keeps_its_start(tmp_path):
    """Frozen after four steps, trained again by the sixth."""
    trained, moments = model(), []

    def toggle(on: bool) -> None:
        for name, parameter in trained.named_parameters():
            if "lora" in name and "q_proj" in name:
                parameter.requires_grad_(on)

    start = weights(trained)[QUERY]
    with Recorder(tmp_path, trained, every=1, strict=True) as recorder:
        for step in range(1, 8):
            toggle(not 4 < step < 6)
            with recorder.step(step):
                trained(input_ids=rows(), labels=rows()).loss.backward()
                with torch.no_grad():
                    for parameter in trained.parameters():
                        if parameter.grad is not None and parameter.requires_grad:
                            parameter -= 0.5 * parameter.grad
                        parameter.grad = None
            moments.append(weights(trained).get(QUERY))
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[7] == distance(moments[6], start)
    assert np.isnan(norm(tree, "total", QUERY)[5])
    assert norm(tree, "increment", QUERY)[6] == distance(moments[5], moments[3])


def two_adapters() -> nn.Module:
    trained = model()
    torch.manual_seed(9)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    trained.add_adapter("second", config)
    return trained.double()


@pytest.mark.parametrize("every", [1, 3])
def test_an_adapter_that_is_switched(tmp_path, every):
    recorder, kept = train(tmp_path, two_adapters(), lambda model: model.set_adapter("second"), every=every)
    after = kept[HALF + 0.5]
    last = recorder.steps[-1]
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[last] == distance(kept[last][QUERY], after[QUERY])
    key = QUERY.replace("q_proj", "k_proj")
    assert norm(tree, "total", key)[last] == distance(kept[last][key], after[key])
    assert tree["fisher"]["step"].values.tolist() == recorder.steps


def test_an_adapter_that_is_added_beside(tmp_path):
    """The total is that of both, each since it was trained first."""

    def beside(model: nn.Module) -> None:
        model.base_model.set_adapter(["default", "second"])

    _, kept = train(tmp_path, two_adapters(), beside, tasks=False, preset="full")
    change = kept[8][QUERY] - kept[HALF + 0.5][QUERY] + kept[HALF][QUERY] - kept[0][QUERY]
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[8] == pytest.approx(float(change.norm()), rel=1e-6)
    assert norm(tree, "increment", QUERY)[5] == distance(kept[5][QUERY], kept[HALF + 0.5][QUERY])
    second = f"{QUERY}@second"
    assert norm(tree, "total", second)[8] == distance(kept[8][second], kept[HALF + 0.5][second])


def restart(model: nn.Module) -> None:
    """As ReLoRA does."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            layer.merged_adapters.clear()
            nn.init.zeros_(layer.lora_B["default"].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("every", "late"), [(1, False), (1, True), (3, False)])
def test_an_adapter_that_is_merged_and_started_again(tmp_path, dtype, every, late):
    trained = model()
    for layer in trained.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().to(dtype)
    if dtype == torch.bfloat16:
        trained.to(dtype)
    recorder, kept = train(tmp_path, trained, restart, every=every, late=late, tasks=False, preset="full")
    found = [finding for finding in recorder.findings if finding.code == "OD314"]
    assert len(found) == 1
    begun = HALF + 0.5 if every == 1 else 5  # noticed when the sixth step begins
    last = recorder.steps[-1]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    expected = float((kept[last][QUERY] - kept[begun][QUERY]).norm())
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[last] == pytest.approx(expected, rel=tolerance)
    if every == 3:
        assert np.isnan(norm(tree, "increment", QUERY)[6])  # from before the restart to after it
    if late:
        assert np.isnan(norm(tree, "total", QUERY)[HALF])


def test_merging_and_unmerging_is_no_restart(tmp_path):
    def cycle(model: nn.Module) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    recorder, _ = train(tmp_path, model().to(torch.bfloat16), cycle, tasks=False)
    assert not [finding for finding in recorder.findings if finding.code.startswith("OD31")]


@pytest.mark.parametrize("every", [1, 3])
def test_a_scale_that_changes(tmp_path, every):
    def scale(model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(2.0)

    recorder, kept = train(tmp_path, model(), scale, every=every)
    assert [finding.code for finding in recorder.findings] == ["OD315"]
    last = recorder.steps[-1]
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[last] == distance(kept[last][QUERY], kept[0][QUERY])
    increment = norm(tree, "increment", QUERY)
    b = tree["fisher"]["update_norm_squared"].sel(block="global")
    if every == 1:
        assert increment[5] == distance(kept[5][QUERY], kept[HALF + 0.5][QUERY])
        assert np.isfinite(b).all()
    else:
        assert np.isnan(increment[6])
        assert np.isnan(b.sel(step=6))  # not zero


def test_a_new_adapter_after_merging_and_unloading(tmp_path):
    """In place of the old one, in the same base model."""

    def renew(model: nn.Module) -> None:
        base = model.merge_and_unload()
        torch.manual_seed(3)
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).double()

    recorder, kept = train(tmp_path, model(), renew, tasks=False)
    assert [finding.code for finding in recorder.findings] == ["OD313"]
    tree = dynamics.open_run(tmp_path)
    assert norm(tree, "total", QUERY)[8] == distance(kept[8][QUERY], kept[HALF + 0.5][QUERY])


@pytest.mark.parametrize("at", [2, 6])
def test_resuming_before_and_after_a_change(tmp_path, at):
    """Totals count from where they did in the training that was not interrupted."""
    states = {}
    trained = two_adapters()
    with Recorder(tmp_path, trained, every=1, strict=True) as recorder:
        for step in range(1, 8):
            with recorder.step(step):
                trained(input_ids=rows(), labels=rows()).loss.backward()
                with torch.no_grad():
                    for parameter in trained.parameters():
                        if parameter.grad is not None and parameter.requires_grad:
                            parameter -= 0.5 * parameter.grad
                        parameter.grad = None
            states[step] = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
            if step == HALF:
                trained.set_adapter("second")
    before = norm(dynamics.open_run(tmp_path), "total", QUERY)
    resumed = two_adapters()
    if at > HALF:
        resumed.set_adapter("second")
    resumed.load_state_dict(states[at])
    with Recorder(tmp_path, resumed, every=1, resume_from=at, strict=True) as recorder:
        resumed.load_state_dict(states[at + 1])
        assert recorder.record(at + 1)
        codes = [finding.code for finding in recorder.findings]
    assert norm(dynamics.open_run(tmp_path), "total", QUERY)[at + 1] == pytest.approx(before[at + 1], rel=1e-6)
    assert codes.count("OD313") == (at > HALF)


def test_looking_whether_something_changed_runs_no_operation():
    trained = model()
    state = ModelState(trained)

    class Refused(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            raise AssertionError(function)

    with Refused():
        assert not state.has_changed()


def test_a_sparse_gradient_is_measured(tmp_path):
    """In place of all gradients missing; entries that are there twice count together."""
    torch.manual_seed(0)
    trained = nn.ModuleDict({"e": nn.Embedding(20, 4, sparse=True), "l": nn.Linear(4, 3, bias=False)})
    tokens = torch.tensor([[1, 1, 2], [3, 1, 2]])
    with Recorder(tmp_path, trained, every=1, strict=True) as recorder, recorder.step(1):
        trained["l"](trained["e"](tokens).mean(1)).square().sum().backward()
        recorder.before_optimizer_step()
        truth = {name: trained[name].weight.grad.to_dense() for name in ("e", "l")}
    gradient = dynamics.open_run(tmp_path)["gradient"]
    for name, value in truth.items():
        assert gradient["norm_before_clip"].sel(matrix=name).item() == pytest.approx(float(value.norm()), rel=1e-6)
        found = gradient["singular_value"].sel(matrix=name).values.ravel()[: min(value.shape)]
        np.testing.assert_allclose(found, torch.linalg.svdvals(value.double()), atol=1e-6)


def test_a_gradient_that_cannot_be_measured_costs_its_matrix(tmp_path, monkeypatch):
    from dynamics.recording import live

    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    values_of = live._gradient_values

    def refuse(batch, *arguments):
        if batch[0].sources[0].shape == (3, 4):
            raise NotImplementedError("no SVD today")
        return values_of(batch, *arguments)

    monkeypatch.setattr(live, "_gradient_values", refuse)
    with Recorder(tmp_path, trained, every=1, strict=True) as recorder:
        recorder.before_backward(1)
        trained(torch.ones(2, 4)).square().sum().backward()
        recorder.before_optimizer_step()
        with pytest.warns(UserWarning, match=r"OD317 1: .*first at step 1 \(NotImplementedError: no SVD today\)"):
            recorder.after_optimizer_step()
    gradient = dynamics.open_run(tmp_path)["gradient"].isel(step=0)
    assert np.isfinite(gradient["norm_after_clip"]).all()
    assert np.isfinite(gradient["singular_value"].sel(matrix="0")).all()
    assert np.isnan(gradient["singular_value"].sel(matrix="1")).all()


# ---- an interrupted training in a notebook ----


def test_a_second_recorder_of_the_process_takes_the_records_over(tmp_path):
    trained = nn.Sequential(nn.Linear(4, 4, bias=False))
    first = Recorder(tmp_path, trained, every=1, strict=True)
    trained[0].weight.data += 1
    first.record(1)
    with pytest.raises(dynamics.store.RecordsExist, match="Resume that training, or choose another folder"):
        Recorder(tmp_path, trained, every=1)
    assert first.is_open  # what is refused closes nothing
    with pytest.warns(UserWarning, match="An earlier recorder of this process had"):
        second = Recorder(tmp_path, trained, every=1, resume_from=1, strict=True)
    trained[0].weight.data += 1
    assert not first.record(2)
    assert second.record(2)
    second.close()
    assert dynamics.open_run(tmp_path)["update"]["from_step"].values.tolist() == [0, 1]


def test_a_recorder_without_records_gives_way(tmp_path):
    trained = nn.Linear(4, 4)
    first = Recorder(tmp_path, trained, every=1)
    with pytest.warns(UserWarning, match="An earlier recorder of this process had"):
        Recorder(tmp_path, trained, every=1).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.close()
        Recorder(tmp_path, trained, every=1).close()


def test_a_compiled_script_inside_the_model_is_followed_too() -> None:
    """Its modules and parameters are in no dictionary of Python."""
    whole = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    state = ModelState(whole)
    assert not state.has_changed()
    whole[1].weight.requires_grad_(False)
    assert state.has_changed()
