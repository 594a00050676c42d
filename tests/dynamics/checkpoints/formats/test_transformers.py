"""Whole models: which tensors are matrices, under which names, and the numbers they hold."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, UnreadableMatrix, open_trajectory
from tests.runs import random_factors, write_adapter, write_state
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model, write_shards

STYLES = ("safetensors", "bin", "sharded", "sharded bin", "distributed")


def own_memory() -> float:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the memory of a process cannot be asked for here")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    return 1024.0 * int(line.split()[1])


def only_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Any:
    """The matrices of one whole model, which is its own base."""
    write_model(folder, tensors, **config)
    return open_trajectory(folder, base=folder)


@pytest.mark.parametrize("style", STYLES)
def test_each_format_gives_the_weights_as_stored(style: str, tmp_path: Path, codes: Any) -> None:
    tensors = {step: model_tensors(seed=step, dtype=torch.bfloat16) for step in (10, 20)}
    trajectory = open_trajectory(write_dense_run(tmp_path, tensors, style))
    assert trajectory.steps == (10, 20)
    assert trajectory.matrices == MATRICES
    assert codes(trajectory.findings) == ["OD109", "OD123"]
    for checkpoint in trajectory.checkpoints:
        with checkpoint.open() as matrices:
            for name, matrix in matrices.items():
                assert isinstance(matrix, torch.Tensor)
                assert matrix.dtype == torch.bfloat16
                assert torch.equal(matrix, tensors[checkpoint.step][f"{name}.weight"])
        shape = checkpoint.shapes["model.layers.0.mlp.up_proj"]
        assert (shape.out, shape.in_, shape.rank, shape.dtype, shape.holds) == (12, 8, 0, "BF16", "weight")


@pytest.mark.parametrize("style", ["safetensors", "bin", "sharded"])
def test_weights_are_views_of_the_file(style: str, tmp_path: Path) -> None:
    big = {"layer.weight": torch.ones(2000, 4000), "other.weight": torch.ones(2000, 4000)}
    trajectory = open_trajectory(write_model(tmp_path, big, style), base=tmp_path)
    del big
    before = own_memory()
    with trajectory.checkpoints[0].open() as matrices:
        assert sum(float(matrix.sum()) for matrix in matrices.values()) == 16e6
        assert own_memory() - before < 8e6  # of 64 MB that were read


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    write_model(tmp_path / "checkpoint-1", {"layer.weight": torch.zeros(2000, 1000)})
    write_model(tmp_path / "checkpoint-2", {"layer.weight": torch.ones(2000, 1000)})
    tracemalloc.start()
    open_trajectory(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_updates_are_counted_from_the_first_checkpoint_without_a_base(tmp_path: Path) -> None:
    trajectory = open_trajectory(write_dense_run(tmp_path, (10, 20, 30)))
    assert trajectory.base is None
    assert [trajectory.start_of(one) for one in trajectory.checkpoints] == [None, *trajectory.checkpoints[:1] * 2]
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD123"]
    assert note.message == (
        "Updates of dense weights are counted from the first checkpoint of training 0, step 10, not from the start of "
        "training."
    )
    assert note.remedy == "Pass the weights before training (--base)."


def test_a_single_checkpoint_needs_a_base(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10,))
    with pytest.raises(NotARun, match=r"has one checkpoint \(step 10\): its dense weights have no update") as raised:
        open_trajectory(tmp_path)
    assert "--base" in str(raised.value)


def test_a_final_model_like_the_last_checkpoint_is_left_out(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20))
    write_model(tmp_path, model_tensors(seed=20))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD110"]
    assert note.message == (
        "The model saved beside the checkpoints is left out: it holds the same weights as the last checkpoint."
    )
    assert note.file == "model.safetensors"


def test_a_final_model_with_a_step_of_its_own_is_used(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20))
    write_state(write_model(tmp_path, model_tensors(seed=25)), 25)
    assert open_trajectory(tmp_path).steps == (10, 20, 25)


def test_equal_checkpoints_are_duplicates(tmp_path: Path, codes: Any) -> None:
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: model_tensors(), 20: model_tensors()}))
    assert "OD114" in codes(trajectory.findings)


def test_a_merged_model_beside_adapters_is_not_taken_for_a_checkpoint(tmp_path: Path, codes: Any) -> None:
    for step in (10, 20):
        write_state(write_adapter(tmp_path / f"checkpoint-{step}", random_factors(seed=step)), step)
    write_model(tmp_path)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert all(shape.rank == 4 for shape in trajectory.checkpoints[0].shapes.values())


# --- which tensors are matrices ------------------------------------------------------------------


def test_kernels_are_flattened(tmp_path: Path) -> None:
    kernel, line = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 5)
    trajectory = only_checkpoint(tmp_path, {"conv.weight": kernel, "conv1d.weight": line})
    with trajectory.checkpoints[0].open() as matrices:
        assert torch.equal(matrices["conv"], kernel.reshape(6, 12))
        assert torch.equal(matrices["conv1d"], line.reshape(6, 15))


@pytest.mark.parametrize(
    "key", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj.weight", "block_sparse_moe.w.weight"]
)
def test_experts_are_one_matrix_each(key: str, tmp_path: Path) -> None:
    stack = torch.randn(3, 6, 4)
    trajectory = only_checkpoint(tmp_path, {key: stack})
    name = key.removesuffix(".weight")
    assert trajectory.matrices == tuple(f"{name}[{index}]" for index in range(3))
    with trajectory.checkpoints[0].open() as matrices:
        assert all(torch.equal(matrices[f"{name}[{index}]"], stack[index]) for index in range(3))


def test_a_position_embedding_of_one_is_one_matrix(tmp_path: Path) -> None:
    table = torch.randn(1, 7, 4)
    trajectory = only_checkpoint(tmp_path, {"vit.position_embeddings": table})
    assert trajectory.matrices == ("vit.position_embeddings",)
    with trajectory.checkpoints[0].open() as matrices:
        assert torch.equal(matrices["vit.position_embeddings"], table[0])


def test_what_is_no_matrix_is_listed(tmp_path: Path) -> None:
    others = {
        "norm.weight": torch.ones(4),
        "q.bias": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "position_ids": torch.arange(4)[None],
    }
    trajectory = only_checkpoint(tmp_path, {"q.weight": torch.randn(4, 4), **others})
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD109"]
    assert note.evidence["counts"] == {"bias": 1, "buffer": 2, "vector or scalar": 1}
    assert note.message == (
        "Not analysed: 4 stored tensors, h.0.attn.bias, position_ids, norm.weight and 1 more "
        "(bias: 1, buffer: 2, vector or scalar: 1)."
    )
    assert trajectory.matrices == ("q",)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    trajectory = only_checkpoint(tmp_path, {"q.weight": torch.randn(4, 4), "v.weight": packed})
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD103"]
    assert (error.matrix, error.message) == (
        "v",
        "Weights stored as U8 (packed) are quantised, and not analysed.",
    )


def test_a_very_deep_stack_is_refused_by_name(tmp_path: Path) -> None:
    trajectory = only_checkpoint(tmp_path, {"q.weight": torch.randn(4, 4), "table": torch.zeros(5000, 1, 1)})
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD104"]
    assert (error.matrix, "a stack of more than 4096 matrices" in error.message) == ("table", True)


def test_weights_that_were_not_gathered_are_refused_by_name(tmp_path: Path) -> None:
    trajectory = only_checkpoint(tmp_path, {"q.weight": torch.randn(4, 4), "v.weight": torch.zeros(0, 4)})
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD104"]
    assert (error.matrix, "not gathered before saving" in error.message) == ("v", True)


def test_tied_weights_of_a_pickle_occur_once(tmp_path: Path) -> None:
    shared = torch.randn(9, 4)
    torch.save(
        {"embed.weight": shared, "head.weight": shared, "q.weight": torch.randn(9, 4)}, tmp_path / "pytorch_model.bin"
    )
    trajectory = open_trajectory(tmp_path, base=tmp_path)
    assert trajectory.matrices == ("embed", "q")
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD135"]
    assert note.evidence == {"tied": {"head": "embed"}}


# --- names ---------------------------------------------------------------------------------------


def test_what_accelerate_gathers_under_fsdp(tmp_path: Path) -> None:
    torch.save(model_tensors(), tmp_path / "pytorch_model_fsdp.bin")
    assert open_trajectory(tmp_path, base=tmp_path).matrices == MATRICES


def test_endless_wrappers_are_not_taken_off(tmp_path: Path) -> None:
    """Each costs a copy of the name."""
    endless = "module." * 200_000
    write_model(tmp_path, {f"{endless}v.weight": torch.randn(4, 4), f"{endless}q.weight": torch.randn(4, 4)})
    with pytest.raises(NotARun, match="holds no weight matrix that can be read"):
        open_trajectory(tmp_path, base=tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_around_the_model(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}{key}": tensor for key, tensor in model_tensors().items()}
    assert only_checkpoint(tmp_path, tensors).matrices == MATRICES


def test_a_module_called_module_keeps_its_name(tmp_path: Path) -> None:
    tensors = {"module.q.weight": torch.randn(4, 4), "head.weight": torch.randn(4, 4)}
    assert only_checkpoint(tmp_path, tensors).matrices == ("head", "module.q")


def test_names_that_would_merge_stay_apart(tmp_path: Path) -> None:
    tensors = {"a._checkpoint_wrapped_module.q.weight": torch.randn(4, 4), "a.q.weight": torch.randn(4, 4)}
    assert set(only_checkpoint(tmp_path, tensors).matrices) == set(tensors)


def test_only_watched_matrices(tmp_path: Path) -> None:
    trajectory = open_trajectory(write_dense_run(tmp_path), matrices="q_proj")
    assert trajectory.matrices == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


# --- refused and broken --------------------------------------------------------------------------


def test_factors_inside_a_whole_model_need_their_configuration(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20))
    write_model(
        tmp_path / "checkpoint-30", {"q.base_layer.weight": torch.ones(4, 4), "q.lora_A.weight": torch.ones(1, 4)}
    )
    trajectory = open_trajectory(tmp_path)
    (error,) = [finding for finding in trajectory.findings if finding.severity == "error"]
    assert (error.code, error.file) == ("OD102", "checkpoint-30/model.safetensors")
    assert error.message == "There is no adapter_config.json beside it: rank and scale are unknown."
    assert trajectory.steps == (10, 20)


def test_a_model_without_matrices_is_refused(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20))
    write_model(tmp_path / "checkpoint-30", {"norm.weight": torch.ones(4)})
    (error,) = [finding for finding in open_trajectory(tmp_path).findings if finding.code == "OD106"]
    assert error.message == "Expected weight matrices, got 1 other tensors."


def test_shards_without_an_index_are_refused_by_name(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20), "sharded")
    (tmp_path / "checkpoint-20" / "model.safetensors.index.json").unlink()
    write_model(tmp_path / "checkpoint-30")
    trajectory = open_trajectory(tmp_path)
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD106"]
    assert error.file == "checkpoint-20/model-00001-of-00003.safetensors"
    assert error.message == "The index of this shard is missing (3 shards in the folder)."


def test_a_shard_that_changes_after_opening_costs_its_matrices(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir(parents=True)
    write_shards(folder, model_tensors(), 2)
    write_model(tmp_path / "checkpoint-20")
    trajectory = open_trajectory(tmp_path)
    save_file({"nothing": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    with trajectory.checkpoints[0].open() as matrices:
        with pytest.raises(UnreadableMatrix, match="Analyse the run again"):
            matrices["model.embed_tokens"]
        assert matrices["lm_head"].shape == (20, 8)
