"""Records have the routing of captured steps; what goes wrong with it costs neither the record nor the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.recording.routing import Exchange, RoutingRecorder, routing_numbers
from dynamics.routing.dataset import routing_record
from tests.mixtures import batch, loss, mixture
from tests.probes.test_routers import Connector
from tests.runs import VOCABULARY, trainer

STEPS = 3


def train(model: nn.Module, run: Path | None, **options: Any) -> Recorder | None:
    """Steps of two micro-batches each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = None if run is None else Recorder(run, model, **{"every": 1, **options})
    for step in range(1, STEPS + 1):
        if recorder is not None:
            recorder.before_backward(step)
        for micro in range(2):
            loss(model, batch(model, seed=10 * step + micro)).backward()
        if recorder is not None:
            recorder.before_optimizer_step(optimizer)
        optimizer.step()
        if recorder is not None:
            recorder.after_optimizer_step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return recorder


def chosen(model: nn.Module, words: dict[str, Tensor]) -> np.ndarray:
    """The slow twin, (layer, expert), from the router logits that the model itself returns."""
    mask = words["attention_mask"].flatten().bool()
    with torch.no_grad():
        logits = model(**words, output_router_logits=True).router_logits
    return np.stack([np.bincount(one[mask].topk(2, -1).indices.flatten(), minlength=5) for one in logits])


def test_a_record_has_the_loads_of_all_micro_batches_of_the_step(tmp_path: Path) -> None:
    model, twin = mixture("mixtral"), mixture("mixtral")
    train(model, tmp_path)
    expected, optimizer = [], torch.optim.SGD(twin.parameters(), lr=0.05)
    for step in range(1, STEPS + 1):
        parts = [batch(twin, seed=10 * step + micro) for micro in range(2)]
        expected.append(sum(chosen(twin, words) for words in parts))
        for words in parts:
            loss(twin, words).backward()
        optimizer.step()
        optimizer.zero_grad()
    routing = dynamics.open_run(tmp_path)["routing"]
    np.testing.assert_array_equal(routing["assigned"], expected)
    assert routing["layer"].values.tolist() == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (routing["tokens"] == 24).all()
    assert routing["held_in"].values.tolist() == ["experts", "experts"]


def test_each_experts_increment_and_gradient_stand_beside_its_load(tmp_path: Path) -> None:
    train(mixture("mixtral"), tmp_path)
    tree = dynamics.open_run(tmp_path)
    norms, gradients = tree["update"]["frobenius_norm"].sel(kind="increment"), tree["gradient"]["norm_before_clip"]
    names = [f"model.layers.1.mlp.experts.{name}[3]" for name in ("gate_up_proj", "down_proj")]
    for variable, array in (("update_norm", norms), ("gradient_norm", gradients)):
        expected = np.sqrt((array.sel(matrix=names).values ** 2).sum(-1))
        np.testing.assert_allclose(tree["routing"][variable].values[:, 1, 3], expected, rtol=1e-12)
        assert np.isfinite(tree["routing"][variable]).all()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "switch_transformers"])
def test_training_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    plain, recorded = mixture(family), mixture(family)
    train(plain, None)
    state = torch.get_rng_state()
    train(recorded, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), recorded.parameters(), strict=True))


class Operations(TorchDispatchMode):
    """The operations on tensors while this is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_that_is_not_captured_runs_no_operation_of_its_own(tmp_path: Path) -> None:
    model = mixture("mixtral")
    words = batch(model)
    with Operations() as plain:
        loss(model, words).backward()
    with Recorder(tmp_path, model, at=[2]) as recorder:
        counts = []
        for step in (1, 2, 3):
            with Operations() as operations, recorder.step(step):
                loss(model, words).backward()
            counts.append(operations.count)
    assert counts[0] == counts[2] == plain.count
    assert counts[1] > plain.count


def test_few_numbers_are_logged_whatever_the_number_of_layers(tmp_path: Path) -> None:
    assigned = np.array([4.0, 0.0, 2.0, 2.0])
    layers = {f"layers.{row}": (assigned, 4.0, 0.5 + row) for row in range(300)}
    about = {"routing": ["top-k"] * 300, "held_in": ["experts"] * 300}
    numbers = routing_numbers(routing_record(7, layers, about))
    entropy = 0.5 * np.log(2) + 0.5 * np.log(4)
    assert numbers == {
        "routing/effective_experts_share": pytest.approx(np.exp(entropy) / 4),
        "routing/effective_experts_share_worst": pytest.approx(np.exp(entropy) / 4),
        "routing/largest_load": 2.0,
        "routing/largest_load_worst": 2.0,
        "routing/dead_experts": 300.0,
        "routing/dead_experts_worst": 1.0,
        "routing/margin": 150.0,
        "routing/margin_worst": 0.5,
    }
    assert routing_numbers(None) == {}


def test_the_callback_logs_them(tmp_path: Path) -> None:
    model = mixture("mixtral", vocab_size=VOCABULARY)
    callback = DynamicsCallback(tmp_path, at=[2])
    training = trainer(tmp_path, [callback], model, max_steps=3, save_strategy="no")
    training.train()
    logged = {name for entry in training.state.log_history for name in entry if "routing/" in name}
    assert len(logged) == 8
    assert {name.split("/")[0] for name in logged} == {"dynamics"}
    assert dynamics.open_run(tmp_path)["routing"]["step"].values.tolist() == [2]


def test_experts_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="OD332") as told:
        recorder = train(mixture("doge"), tmp_path)
    assert recorder is not None
    (finding,) = [finding for finding in recorder.findings if finding.code == "OD332"]
    assert finding.message == (
        "The routing of 2 blocks with experts is not recorded: model.layers.0.mlp, model.layers.1.mlp; nothing that "
        "passes through it tells which experts were chosen."
    )
    assert sum("OD332" in str(warning.message) for warning in told) == 1
    assert "routing" not in dynamics.open_run(tmp_path).children


def test_a_model_without_experts_has_no_routing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with Recorder(tmp_path, model, every=1) as recorder, recorder.step(1):
        model(torch.ones(2, 3)).sum().backward()
    assert "routing" not in dynamics.open_run(tmp_path).children
    assert RoutingRecorder(model).is_empty


def test_what_goes_wrong_is_a_gap_beside_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.routers.sums_of", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="Routing was not counted"):
        recorder = train(mixture("mixtral"), tmp_path)
    assert recorder is not None
    assert recorder.steps == [1, 2, 3]
    assert "routing" not in dynamics.open_run(tmp_path).children


def test_an_adapter_that_is_added_later_does_not_lose_the_routers(tmp_path: Path) -> None:
    model = mixture("mixtral")
    routing = RoutingRecorder(model)
    model.model.layers[0].mlp.gate = nn.Sequential(model.model.layers[0].mlp.gate)
    routing.arm(1)
    loss(model, batch(model)).backward()
    record = routing.record()
    assert record is not None
    assert record["layer"].values.tolist() == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_another_adapter_is_looked_at_anew() -> None:
    """Which module computes is a setting of PEFT's wrapper; the modules stay."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"])
    model = peft.get_peft_model(mixture("mixtral"), config)
    model.add_adapter("other", config)
    routing = RoutingRecorder(model)
    model.set_adapter("other")
    routing.arm(1)
    loss(model, batch(model)).backward()
    assert routing.record() is not None
    (saved,) = {type(m): m for m in routing._routing.mixtures[0].holders.values()}.values()
    assert saved is model.base_model.model.model.layers[0].mlp.experts.modules_to_save["other"]


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_soft_routing_that_is_not_finite_is_a_record_without_a_load(logit: float, tmp_path: Path) -> None:
    model = Connector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path, model, every=1) as recorder:
        for step in (1, 2):
            with recorder.step(step, optimizer):
                model(torch.randn(4, 4)).sum().backward()
            model.router[2].bias.data[1] = logit
    routing = dynamics.open_run(tmp_path)["routing"]
    assert routing["load"].sel(step=1).sum() == pytest.approx(1)
    assert routing["tokens"].values.tolist() == [[4], [4]]
    assert routing["load"].sel(step=2).isnull().all()


def test_a_closed_recorder_counts_no_more() -> None:
    model = mixture("mixtral")
    routing = RoutingRecorder(model)
    routing.arm(1)
    routing.close()
    routing.arm(2)
    assert routing.record() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- ranks ---


def exchanges(store: Any, patience: float = 15.0) -> tuple[Exchange, Exchange]:
    return Exchange(store, 0, 2, patience), Exchange(store, 1, 2, patience)


def test_counts_of_ranks_are_summed() -> None:
    first, second = exchanges(dist.HashStore())
    models = [mixture("mixtral"), mixture("mixtral")]
    recorders = [RoutingRecorder(model, one) for model, one in zip(models, (first, second), strict=True)]
    parts = [batch(models[0], seed=seed) for seed in (1, 2)]
    for recorder, model, words in zip(recorders, models, parts, strict=True):
        recorder.arm(5)
        loss(model, words).backward()
    recorders[1].send()
    record = recorders[0].record()
    assert record is not None
    np.testing.assert_array_equal(record["assigned"][0], sum(chosen(models[0], words) for words in parts))
    assert (record["tokens"] == 24).all()


def test_a_rank_that_does_not_come_costs_its_patience_once() -> None:
    first, _ = exchanges(dist.HashStore(), patience=0.2)
    message = r"^a rank did not send what its routers chose within 0\.2 s$"
    with pytest.raises(RuntimeError, match=message):
        first.receive(1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        first.receive(2)
    assert time.monotonic() - begin < 0.2


def test_once_a_rank_is_missing_nothing_is_counted_or_left_in_the_store() -> None:
    store = dist.HashStore()
    first, second = exchanges(store, patience=0.05)
    model = mixture("mixtral")
    recorder = RoutingRecorder(model, first)
    recorder.arm(1)
    loss(model, batch(model)).backward()
    with pytest.raises(RuntimeError, match="a rank did not send"):
        recorder.record()
    second.send(1, lambda: b"late")
    assert store.num_keys() == 1  # which says that it is over
    recorder.arm(2)
    assert recorder.record() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_rank_hands_over_even_where_it_has_found_no_mixture() -> None:
    """One rank may learn from its batch what another does not; the first one waits for all."""
    first, second = exchanges(dist.HashStore())
    models = [mixture("mixtral"), mixture("mixtral")]
    recorders = [RoutingRecorder(model, one) for model, one in zip(models, (first, second), strict=True)]
    recorders[1]._routing.mixtures = []
    for step in (1, 2):
        for recorder, model in zip(recorders, models, strict=True):
            recorder.arm(step)
            loss(model, batch(model)).backward()
        recorders[1].send()
        record = recorders[0].record()
        assert record is not None
        assert (record["tokens"] == 12).all()


def test_a_store_that_is_gone_costs_nothing() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Broken pipe")

        def set(self, key: str, message: bytes) -> None:
            raise RuntimeError("Broken pipe")

    Exchange(Gone(), 1, 2).send(1, lambda: b"")


def test_a_rank_that_failed_says_why() -> None:
    first, second = exchanges(dist.HashStore())
    second.send(3, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match=r"^rank 1: division by zero$"):
        first.receive(3)
    second.send(4, lambda: b"")
    assert first.receive(4) == [b""]  # and goes on


def test_nothing_stays_in_the_store() -> None:
    store = dist.HashStore()
    first, second = exchanges(store)
    second.send(3, lambda: b"counts")
    first.receive(3)
    assert store.num_keys() == 0
