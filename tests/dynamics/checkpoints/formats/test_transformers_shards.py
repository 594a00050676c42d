"""Indexes of shards: whatever they say, nothing outside the checkpoint is read, and each lie is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.transformers import read_sharded
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model, write_shards

FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def problem(index: Path) -> str:
    with pytest.raises(UnreadableFile) as raised:
        read_sharded(index)
    assert "\n" not in str(raised.value)
    return raised.value.problem


def edit(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("binary", [False, True])
def test_shards_hold_what_one_file_would(binary: bool, tmp_path: Path) -> None:
    tensors = model_tensors()
    sharded = read_sharded(write_shards(tmp_path, tensors, binary=binary))
    assert {key: info.shape for key, info in sharded.tensors.items()} == {k: tuple(t.shape) for k, t in tensors.items()}
    with sharded.open() as load:
        assert all(torch.equal(load(key), tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "..",
        ".safetensors",
        "",
        "model.pkl",
        "a\0.safetensors",
    ],
)
def test_names_that_are_no_file_beside_the_index(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(model_tensors(), tmp_path / "model.safetensors")
    index = write_shards(folder, model_tensors())
    edit(index, lambda content: content["weight_map"].update({"lm_head.weight": name}))
    assert "is not the name of a weight file beside it" in problem(index)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, model_tensors())
    (tmp_path / FIRST).unlink()
    assert problem(index) == f"It names a shard that is not there: {FIRST}."
    (tmp_path / SECOND).unlink()
    assert problem(index) == f"It names 2 shards that are not there: {FIRST}, {SECOND}."


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, model_tensors())
    (tmp_path / SECOND).write_bytes((tmp_path / SECOND).read_bytes()[:-8])
    assert problem(index).startswith(f"Its shard {SECOND}: It is truncated or its header is wrong")


def test_a_shard_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, model_tensors())
    (tmp_path / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert problem(index).startswith(f"Its shard {SECOND}: It is a Git-LFS pointer")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    """Also where the two have different shapes."""
    index = write_shards(tmp_path, model_tensors())
    twice = next(iter(load_file(tmp_path / FIRST)))
    save_file({**load_file(tmp_path / SECOND), twice: torch.ones(3, 3)}, tmp_path / SECOND)
    assert problem(index) == f"The tensor {twice!r} is in two shards, {FIRST} and {SECOND}."


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    index = write_shards(tmp_path, model_tensors())
    edit(index, lambda content: content["weight_map"].update({"ghost.weight": FIRST}))
    assert problem(index) == f"It places the tensor 'ghost.weight' in {FIRST}, which does not hold it."


def test_a_tensor_twice_in_the_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path, model_tensors())
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}')
    assert problem(index) == "It is not a valid JSON index: 'a' occurs twice."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "It is empty"),
        ("{", "It is not a valid JSON index"),
        ("[" * 100_000, "It is not a valid JSON index"),
        ("[]", "It has no weight_map"),
        ("{}", "It has no weight_map"),
        ('{"weight_map": []}', "It has no weight_map"),
        ('{"weight_map": {}}', "It has no weight_map"),
        ('{"weight_map": {"a": 3}}', "It has no weight_map"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "It is a Git-LFS pointer"),
    ],
)
def test_texts_that_are_no_index(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert problem(tmp_path / "model.safetensors.index.json").startswith(said)


def test_an_index_too_large_is_not_read(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse
    assert "too large" in problem(index)


def test_an_index_of_very_many_shards(tmp_path: Path) -> None:
    listed = {f"t{i}": f"model-{i}.safetensors" for i in range(10_001)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    assert problem(index) == "It names 10001 shards; expected at most 10000."


def test_a_broken_index_costs_one_checkpoint(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20, 30), "sharded")
    (tmp_path / "checkpoint-20" / FIRST).unlink()
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 30)
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD101"]
    assert (error.file, error.step) == ("checkpoint-20/model.safetensors.index.json", 20)


def test_linked_shards_are_read_as_hubs_store_them(tmp_path: Path) -> None:
    """A hub's cache keeps the files elsewhere, under their hashes."""
    blobs = tmp_path / "blobs"
    base = write_model(tmp_path / "snapshot", style="sharded")
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert open_trajectory(base, base=base).matrices == MATRICES
    findings = [finding.code for finding in open_trajectory(base, base=base).findings]
    assert findings.count("OD122") == 3
