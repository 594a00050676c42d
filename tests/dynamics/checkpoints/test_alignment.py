"""Base and run meet under every spelling of one model's names, by name and shape, and what does not meet is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.alignment import aligned
from tests.runs import adapter_config, random_factors, write_adapter
from tests.whole_models import write_model

#: One model's matrices in memory, and how their names begin in other spellings.
PARTS = {
    "model.language_model.layers.0.self_attn.q_proj": (8, 6),
    "model.language_model.layers.0.mlp.up_proj": (10, 6),
    "model.language_model.embed_tokens": (20, 6),
    "model.visual.blocks.0.attn.qkv": (12, 4),
    "model.visual.layers.0.self_attn.q_proj": (8, 6),
    "model.multi_modal_projector.linear_1": (6, 4),
    "lm_head": (20, 6),
}
SPELLINGS = {
    "in memory": {},
    "on the hub": {"model.language_model.": "model.", "model.visual.": "visual.", "model.multi": "multi"},
    "LLaVA": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "vision_tower.",
        "model.multi": "multi",
        "lm_head": "language_model.lm_head",
    },
    "towers in the model": {"model.visual.": "model.vision_tower.vision_model."},
    "a thinker": {
        "model.language_model.": "thinker.model.",
        "model.visual.": "thinker.visual.",
        "lm_head": "thinker.lm_head",
    },
}


def spelled(name: str, spelling: str) -> str:
    return next(
        (new + name.removeprefix(old) for old, new in SPELLINGS[spelling].items() if name.startswith(old)), name
    )


def numbers(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in PARTS.items()}


def codes(trajectory: Any, code: str) -> list[Any]:
    return [finding for finding in trajectory.findings if finding.code == code]


@pytest.mark.parametrize("run", SPELLINGS)
@pytest.mark.parametrize("base", SPELLINGS)
def test_every_spelling_meets_every_other(run: str, base: str, tmp_path: Path) -> None:
    before = numbers(0)
    folder = write_model(tmp_path / "run", {f"{spelled(name, run)}.weight": one for name, one in numbers(1).items()})
    start = write_model(tmp_path / "base", {f"{spelled(name, base)}.weight": one for name, one in before.items()})
    trajectory = open_trajectory(folder, base=start)
    assert trajectory.base is not None
    with trajectory.base.open() as matrices:
        assert {*matrices} == {spelled(name, run) for name in PARTS}
        for name, matrix in before.items():
            assert torch.equal(matrices[spelled(name, run)], matrix)
    assert not codes(trajectory, "OD124")


def test_two_candidates_of_one_size_are_both_left() -> None:
    held = {"model.layers.0.q": (4, 4), "language_model.model.layers.0.q": (4, 4)}
    assert aligned({"model.language_model.layers.0.q": (4, 4)}, held) == {}
    held["model.layers.0.q"] = (4, 5)
    assert aligned({"model.language_model.layers.0.q": (4, 4)}, held) == {
        "model.language_model.layers.0.q": "language_model.model.layers.0.q"
    }


def test_a_vision_tower_is_no_language_model() -> None:
    assert aligned({"vision_tower.encoder.layers.0.q": (4, 4)}, {"text_model.encoder.layers.0.q": (4, 4)}) == {}


def test_adapters_of_one_matrix_have_one_base() -> None:
    wanted = {"model.language_model.q@a": (4, 4), "model.language_model.q@b": (4, 4)}
    assert aligned(wanted, {"model.q": (4, 4)}) == dict.fromkeys(wanted, "model.q")


# --- experts -------------------------------------------------------------------------------------

MIXTRAL = ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2")
QWEN = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")


def experts(hidden: int, intermediate: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)]  # type: ignore[misc]


def single(names: tuple[str, str, str], weights: list[Any]) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.0.{name.format(index)}.weight": tensor
        for index, expert in enumerate(weights)
        for name, tensor in zip(names, expert, strict=True)
    }


def stack(weights: list[Any], *, is_turned: bool) -> dict[str, torch.Tensor]:
    pairs = [(torch.cat([gate, up]), down) for gate, up, down in weights]
    turned = [(up.T, down.T) if is_turned else (up, down) for up, down in pairs]
    return {
        f"model.layers.0.mlp.experts.{role}": torch.stack([pair[i] for pair in turned]).contiguous()
        for i, role in enumerate(("gate_up_proj", "down_proj"))
    }


@pytest.mark.parametrize("names", [QWEN, MIXTRAL], ids=["Qwen", "Mixtral"])
@pytest.mark.parametrize("is_turned", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(6, 5), (6, 3), (4, 4)], ids=["plain", "square up", "square down"]
)
def test_single_experts_meet_stacks(
    names: tuple[str, str, str], is_turned: bool, hidden: int, intermediate: int, tmp_path: Path
) -> None:
    before = experts(hidden, intermediate)
    one, other = single(names, before), stack(before, is_turned=is_turned)
    for run, base in ((one, other), (other, one)):
        folder = write_model(tmp_path / f"run{len(run)}", {key: tensor + 1 for key, tensor in run.items()})
        start = write_model(tmp_path / f"base{len(base)}", base)
        trajectory = open_trajectory(folder, base=start)
        assert trajectory.base is not None
        assert not codes(trajectory, "OD124")
        with trajectory.base.open() as matrices, trajectory.checkpoints[0].open() as now:
            assert {*matrices} == {*now}
            for name in now:
                assert torch.equal(now[name], matrices[name] + 1)


# --- what does not meet --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "adapter"])
def test_what_is_not_compared_is_counted(kind: str, tmp_path: Path) -> None:
    names = tuple(f"model.layers.{layer}.q_proj" for layer in range(3))
    if kind == "dense":
        run = write_model(tmp_path / "run", {f"{name}.weight": torch.randn(12, 10) for name in names})
    else:
        run = write_adapter(tmp_path / "run", random_factors(names), adapter_config())
    packed = torch.ones(60, 1, dtype=torch.uint8)
    base = {f"{names[0]}.weight": torch.randn(12, 10), f"{names[1]}.weight": packed}
    trajectory = open_trajectory(run, base=write_model(tmp_path / "base", base))
    assert trajectory.base is not None
    assert tuple(trajectory.base.shapes) == names[:1]
    lacking = {finding.matrix: finding for finding in codes(trajectory, "OD124")}
    assert set(lacking) == set(names[1:])
    assert all("1 of 3 matrices are compared with the base." in finding.message for finding in lacking.values())
    assert "Weights stored as U8 (packed)" in lacking[names[1]].message
    assert "Pass the 16-bit original" in lacking[names[1]].remedy
    assert lacking[names[2]].evidence == {"matrices": [names[2]], "compared": 1, "of": 3}


def test_weights_that_were_not_gathered_are_not_called_quantised(tmp_path: Path) -> None:
    """The remedy is that of the fault: of a shard's empty tensors no 16-bit original is asked for."""
    run = write_adapter(tmp_path / "run", random_factors(("a.q", "a.v")), adapter_config())
    empty = {"a.q.weight": torch.zeros(12, 0)}
    some = write_model(tmp_path / "some", {**empty, "a.v.weight": torch.randn(12, 10)})
    (lacking,) = codes(open_trajectory(run, base=some), "OD124")
    assert "not gathered before saving" in lacking.message
    assert lacking.remedy == "Gather sharded parameters (ZeRO-3, FSDP) before saving."
    with pytest.raises(ValueError, match=r"not gathered before saving.*Gather sharded parameters"):
        open_trajectory(run, base=write_model(tmp_path / "none", empty))
    magnitude = {"base_model.model.a.q.lora_magnitude_vector": torch.ones(12)}
    config = adapter_config(use_dora=True)
    dora = write_adapter(tmp_path / "dora", random_factors(("a.q",)), config, extra=magnitude)
    with pytest.raises(ValueError, match=r"DoRA magnitude.*not gathered before saving.*Gather sharded parameters"):
        open_trajectory(dora, base=some)


def test_a_base_that_is_quantised_throughout_says_so(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "run", random_factors(("a.q",)), adapter_config())
    base = write_model(tmp_path / "base", {"a.q.weight": torch.ones(60, 1, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"a\.q: Weights stored as U8 \(packed\).*Pass the 16-bit original"):
        open_trajectory(run, base=base)


def test_repeated_layers_meet_the_layer_they_were_made_of(tmp_path: Path) -> None:
    names = tuple(f"model.layers.{layer}.q_proj" for layer in range(4))
    config = adapter_config(layer_replication=[[0, 2], [1, 3]])
    run = write_adapter(tmp_path / "run", random_factors(names), config)
    base = {f"model.layers.{layer}.q_proj.weight": torch.full((12, 10), float(layer)) for layer in range(3)}
    trajectory = open_trajectory(run, base=write_model(tmp_path / "base", base))
    assert trajectory.base is not None
    with trajectory.base.open() as matrices:
        assert [float(matrices[name][0, 0]) for name in names] == [0.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("ranges", ["0-3", [[0]], [[0, -1]], [[0, 10**9]], [["a", 2]]])
def test_layers_that_are_no_ranges_are_refused(ranges: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(layer_replication=ranges))
    with pytest.raises(ValueError, match="Its layer_replication is"):
        open_trajectory(tmp_path)
