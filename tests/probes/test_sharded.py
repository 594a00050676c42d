"""On a model that FSDP 2 has split, the leading rank measures what one process does; the others hand over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from dynamics.recording.meeting import Meeting
from dynamics.recording.probing_ranks import ProbingRanks
from probes import gradient_gram
from probes.additions import added
from probes.blocks import trained_parameters
from probes.scores import evaluate
from probes.sharded import ShardedModel
from probes.undisturbed import swapped
from probes.watched import find, whole
from tests.distributed import RANKS, Ranks
from tests.one_training import sharded
from tests.runs import llama
from tests.updates import adapted_model, probe_tasks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=120) as processes:
        yield processes


# ---- models ----


def lora() -> nn.Module:
    return adapted_model(torch.float32, layers=2)


def dense() -> nn.Module:
    return llama(num_hidden_layers=2).eval()


def partly_dense() -> nn.Module:
    """Some dense weights and a norm are trained."""
    model = dense().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "layers.0.input_layernorm" in name or "embed" in name)
    return model


def mixed() -> nn.Module:
    """LoRA, of which some right factors are frozen, and a head that is trained whole."""
    model = lora()
    model.get_output_embeddings().weight.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name:
            parameter.requires_grad_(False)
    return model


# ---- what is measured, on one rank of two as in one process ----


def elsewhere(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Other values of trained parameters."""
    generator = torch.Generator().manual_seed(3)
    parameters = trained_parameters(model).values()
    return [(p, (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)) for p in parameters]


def measured(model: nn.Module) -> dict[str, Any]:
    """K in tangent space here and in factor space elsewhere, and scores with a change of each matrix and vector."""
    tasks = probe_tasks(2, batch_size=3)
    here = gradient_gram(model, tasks)
    pairs = elsewhere(model)
    with swapped([p for p, _ in pairs], [value for _, value in pairs]):
        there = gradient_gram(model, tasks, space="factor")
        moved = {name: whole(p).clone() for name, p in trained_parameters(model).items()}
    shapes = {matrix.name: matrix.read(lambda p: p.detach()).shape for matrix in find(model).watched}
    shapes |= {name: p.shape for name, p in trained_parameters(model).items() if p.ndim == 1}
    generator = torch.Generator().manual_seed(4)
    with added(model, {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}):
        scores = [score.score for score in evaluate(model, tasks)]
    return {"here": here.gram, "there": there.gram, "moved": moved, "losses": here.losses, "scores": scores}


def passed(model: nn.Module) -> None:
    """One forward and backward pass, of other tokens on each rank."""
    batch = torch.arange(12).view(2, 6) + dist.get_rank()
    model(input_ids=batch, labels=batch).loss.backward()


def is_as(model: nn.Module, twin: nn.Module) -> bool:
    """Whether another pass finds the same weights, and leaves the same gradients."""
    for one in (model, twin):
        passed(one)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    same = [torch.equal(p.to_local(), q.to_local()) for p, q in pairs]
    gradients = [(p.grad, q.grad) for p, q in pairs if p.grad is not None or q.grad is not None]
    return bool(gradients) and all([*same, *(torch.equal(p.to_local(), q.to_local()) for p, q in gradients)])


def ranks_of(model: nn.Module) -> ProbingRanks:
    probing = ProbingRanks.of(model, Meeting.of_all_ranks())
    assert probing is not None
    return probing


def on_leader(build: Callable[[], nn.Module], **options: Any) -> tuple[dict[str, Any] | None, bool]:
    """What the first rank measures before the first pass and after it, and whether training goes on as without that."""
    model, twin = sharded(build(), **options), sharded(build(), **options)
    probing = ranks_of(model)
    probing.together(lambda: measured(model))
    for one in (model, twin):
        passed(one)
    return probing.together(lambda: measured(model)), is_as(model, twin)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for kind in ("here", "there", "moved"):
        assert list(found[kind]) == list(expected[kind])
        for name, values in expected[kind].items():
            difference = float((found[kind][name].double() - values.double()).abs().max())
            assert difference <= tolerance * float(values.abs().max()), (kind, name)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=0)
    assert found["scores"] == pytest.approx(expected["scores"], rel=tolerance)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lora, {}),
        (dense, {"reshard_after_forward": False}),
        (partly_dense, {"reshard_after_forward": True}),
        (mixed, {"reshard_after_forward": False}),
    ],
)
def test_the_leading_rank_measures_what_one_process_does(ranks, build, options):
    (found, same), (nothing, other_same) = ranks(on_leader, build, **options)
    assert nothing is None
    assert (same, other_same) == (True, True)
    assert_same(found, measured(build()))


def in_half() -> tuple[dict[str, Tensor] | None, bool]:
    model, twin = (sharded(dense(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)) for _ in range(2))
    k = ranks_of(model).together(lambda: gradient_gram(model, probe_tasks(2)).gram)
    return k, is_as(model, twin)


def test_layers_that_are_gathered_in_half_precision(ranks):
    (found, same), (_, other_same) = ranks(in_half)
    assert (same, other_same) == (True, True)
    for block, k in gradient_gram(dense(), probe_tasks(2)).gram.items():
        assert float((found[block] - k).abs().max()) <= 0.05 * float(k.abs().max()), block


def in_other_groups() -> tuple[Any, bool]:
    """Norm and head as one group, layers checkpointed, factors of one layer not split at all."""
    models = []
    for _ in range(2):
        model = lora()
        base = model.base_model.model
        first, second = base.model.layers
        whole_here = {p for p in first.parameters() if p.requires_grad}
        fully_shard(first, ignored_params=whole_here)
        fully_shard(second)
        fully_shard([base.model.norm, base.lm_head])
        fully_shard(model, ignored_params=whole_here)
        second.mlp.forward = _checkpointed(second.mlp)
        models.append(model)
    model, twin = models
    numbers = ranks_of(model).together(lambda: measured(model))
    return numbers, all(_gradients(model) == _gradients(twin) for _ in range(2))


def _checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    return lambda tensor: checkpoint(forward, tensor, use_reentrant=False)  # pyright: ignore[reportReturnType]


def _gradients(model: nn.Module) -> list[list[float]]:
    passed(model)
    return [
        getattr(p.grad, "_local_tensor", p.grad).flatten().tolist() for p in model.parameters() if p.grad is not None
    ]


def test_groups_of_layers_checkpoints_and_factors_that_are_whole(ranks):
    (found, same), (_, other_same) = ranks(in_other_groups)
    assert (same, other_same) == (True, True)
    assert_same(found, measured(lora()))


# ---- one layer at a time ----


def most_at_once() -> tuple[int, int]:
    """The most bytes of whole layers at once while K is measured, and of the model."""
    model = sharded(llama(num_hidden_layers=6).eval())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fill, peak = ShardedModel._fill, [0]

    def noted(self: ShardedModel, group: Any) -> None:
        fill(self, group)
        parts = [part for group in self._groups for part in group.fsdp_params if hasattr(part, "_unsharded_param")]
        peak.append(sum(part._unsharded_param.untyped_storage().nbytes() for part in parts))

    ShardedModel._fill = noted
    try:
        ranks_of(model).together(lambda: gradient_gram(model, probe_tasks(2)))
    finally:
        ShardedModel._fill = fill
    return max(peak), size


def test_two_layers_at_most_are_whole_beside_the_root(ranks):
    (peak, size), (others_peak, _) = ranks(most_at_once)
    layer = sum(p.numel() * p.element_size() for p in llama().model.layers[0].parameters())
    root = size - 6 * layer
    assert root + layer <= peak <= root + 2 * layer  # backward, FSDP gathers one layer ahead
    assert others_peak == 0


# ---- errors ----


def broken_probe(model: nn.Module, where: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError(where)

    layer = model.model.layers[1].mlp
    if where == "forward":
        handle = layer.register_forward_hook(fail)
    else:
        handle = layer.register_forward_hook(lambda module, inputs, output: output.register_hook(fail) and None)
    try:
        gradient_gram(model, probe_tasks(2))
    finally:
        handle.remove()


def measured_after_error(where: str) -> tuple[dict[str, Any] | None, bool]:
    """What is measured beside a probe that fails, as at a captured step, where one that fails costs nothing else."""
    model, twin = sharded(dense()), sharded(dense())
    for one in (model, twin):
        passed(one)

    def probe() -> dict[str, Any]:
        with pytest.raises(ZeroDivisionError):
            broken_probe(model, where)
        return measured(model)

    return ranks_of(model).together(probe), is_as(model, twin)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_pass_costs_nothing_of_what_is_measured_next(ranks, where):
    (found, same), (_, other_same) = ranks(measured_after_error, where)
    assert_same(found, measured(dense()))
    assert (same, other_same) == (True, True)


def with_errors(where: str) -> tuple[list[str], bool]:
    """What is raised on this rank, and whether training goes on as without that."""
    model, twin = sharded(dense()), sharded(dense())
    probing = ranks_of(model)
    errors = []

    for _ in range(2):
        for one in (model, twin):
            passed(one)
        try:
            probing.together(lambda: broken_probe(model, where))
        except (ZeroDivisionError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors, is_as(model, twin)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_pass_is_raised_on_all_and_the_training_goes_on(ranks, where):
    (errors, same), (other_errors, other_same) = ranks(with_errors, where)
    assert errors == [f"ZeroDivisionError: {where}"] * 2
    assert other_errors == [f"RuntimeError: rank 0: ZeroDivisionError: {where}"] * 2
    assert (same, other_same) == (True, True)


# ---- refusals ----


def refused(kind: str) -> str:
    model = dense()
    mesh = init_device_mesh("cpu", (RANKS,))
    if kind == "tensor parallel":
        head = model.lm_head
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        fully_shard(model.model.layers[0])
    elif kind == "offloaded":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    try:
        ShardedModel.of(model)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "tensor parallel",
            "Expected parameters that FSDP 2 alone has split, got some under tensor or expert parallelism, or ZeRO-3, "
            "whose layers are never whole. Leave tasks out, and probe checkpoints: "
            "python -m dynamics.analyze RUN --probe module:function",
        ),
        (
            "offloaded",
            "Expected shards on the device that computes, got those of CPUOffloadPolicy. Leave it out, or leave tasks "
            "out and probe checkpoints.",
        ),
        ("plain", "not refused"),
    ],
)
def test_what_cannot_be_gathered_is_refused(ranks, kind, message):
    assert ranks(refused, kind) == [message] * RANKS
