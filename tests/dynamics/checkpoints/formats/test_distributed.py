"""Distributed checkpoints: the same tensors as torch reads, and nothing of them is executed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, MetadataIndex

from dynamics.checkpoints import UnreadableMatrix, open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.distributed import read_distributed
from tests.whole_models import model_tensors, write_dense_run, write_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def problem(folder: Path) -> str:
    with pytest.raises(UnreadableFile) as raised:
        read_distributed(folder)
    assert "\n" not in str(raised.value)
    return raised.value.problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_tensors_as_torch_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = model_tensors(dtype=dtype)
    write_distributed(tmp_path, {"model": tensors, "optim": {"state": torch.ones(3)}, "step": 7})
    twin = {"model": {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}}
    dcp.load(twin, checkpoint_id=tmp_path, no_dist=True)
    weights = read_distributed(tmp_path)
    assert set(weights.tensors) == set(tensors)
    with weights.open() as load:
        assert all(torch.equal(load(key), twin["model"][key]) for key in tensors)


def test_a_model_at_the_top_beside_its_optimizer(tmp_path: Path) -> None:
    write_distributed(
        tmp_path, {**model_tensors(), "optimizer": {"exp_avg": torch.ones(8, 8)}, "train_state": {"s": 1}}
    )
    assert set(read_distributed(tmp_path).tensors) == set(model_tensors())


def cut_in_two(folder: Path, key: str, tensor: torch.Tensor) -> None:
    """Stores one tensor as two chunks of rows, as two processes would."""
    path = folder / "__1_0.distcp"
    chunks, places = [], {}
    with path.open("wb") as file:
        for rows in (slice(0, 3), slice(3, len(tensor))):
            start = file.tell()
            torch.save(tensor[rows].clone(), file)
            chunks.append(ChunkStorageMetadata(torch.Size((rows.start, 0)), tensor[rows].shape))
            index = MetadataIndex(key, torch.Size((rows.start, 0)), len(chunks) - 1)
            places[index] = _StorageInfo(path.name, start, file.tell() - start)

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key].chunks = chunks
        metadata.storage_data.update(places)

    edit(folder, change)


def test_chunks_are_put_together(tmp_path: Path) -> None:
    tensor = torch.randn(7, 4)
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    cut_in_two(tmp_path, "q.weight", tensor)
    with read_distributed(tmp_path).open() as load:
        assert torch.equal(load("q.weight"), tensor)


def test_enums_as_some_pythons_pickle_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.11.2, for one, writes ``getattr(class, name)``; the reader looks nothing up."""
    write_distributed(tmp_path, model_tensors())
    expected = read_distributed(tmp_path).tensors
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    edit(tmp_path, lambda metadata: None)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert read_distributed(tmp_path).tensors == expected


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_the_metadata_is_not_executed(protocol: int, tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(), protocol))
    assert "was not loaded: it names" in problem(tmp_path)
    assert "exec" in problem(tmp_path)


def test_code_in_a_record_is_not_executed(tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    content = pickle.dumps(Bomb()).ljust((tmp_path / "__0_0.distcp").stat().st_size, b"\0")
    (tmp_path / "__0_0.distcp").write_bytes(content)
    with read_distributed(tmp_path).open() as load, pytest.raises(UnreadableFile, match=r"A record of __0_0\.distcp"):
        load("q.weight")


@pytest.mark.parametrize("name", ["../x.distcp", "/etc/x.distcp", "a\\x.distcp", "model.bin", ""])
def test_files_outside_the_folder(name: str, tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    edit(tmp_path, lambda m: [setattr(record, "relative_path", name) for record in m.storage_data.values()])
    assert "is not the name of a .distcp file beside it" in problem(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: setattr(record, "offset", -1), "It places a record at bytes -1"),
        (lambda record: setattr(record, "length", 10**9), "It places a record at bytes 0 to 0+1000000000"),
        (lambda record: setattr(record, "length", 10), "does not match the size of its record"),
        (lambda record: setattr(record, "transform_descriptors", ["zstd"]), "Its records are compressed"),
    ],
)
def test_places_that_lie(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    edit(tmp_path, lambda metadata: [change(record) for record in metadata.storage_data.values()])
    assert message in problem(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: setattr(entry, "size", torch.Size((10**6, 10**6))), "do not fill its shape"),
        (lambda entry: setattr(entry, "size", (7, "4")), "Expected a shape or offset of whole numbers"),
        (lambda entry: setattr(entry, "chunks", []), "do not fill its shape"),
        (lambda entry: setattr(entry.chunks[0], "sizes", torch.Size((70, 4))), "lies outside the shape"),
        (lambda entry: setattr(entry.chunks[0], "offsets", torch.Size((1, 0))), "lies outside the shape"),
    ],
)
def test_shapes_that_lie(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    edit(tmp_path, lambda metadata: change(metadata.state_dict_metadata["q.weight"]))
    assert message in problem(tmp_path)


def test_a_chunk_that_no_file_holds(tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    edit(tmp_path, lambda metadata: metadata.storage_data.clear())
    assert problem(tmp_path) == "No .distcp file holds this chunk of 'q.weight': [0, 0]."


def test_two_chunks_of_one_record(tmp_path: Path) -> None:
    """Or a small file would fill the memory."""
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["q.weight"]
        entry.size = torch.Size((14, 4))
        entry.chunks.append(ChunkStorageMetadata(torch.Size((7, 0)), torch.Size((7, 4))))
        (record,) = metadata.storage_data.values()
        metadata.storage_data[MetadataIndex("q.weight", torch.Size((7, 0)), 1)] = record

    edit(tmp_path, change)
    assert problem(tmp_path) == "Two chunks of 'q.weight' share one record."


def test_a_record_of_another_shape(tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["q.weight"]
        entry.size = torch.Size((4, 7))
        entry.chunks[0].sizes = torch.Size((4, 7))

    edit(tmp_path, change)
    with (
        read_distributed(tmp_path).open() as load,
        pytest.raises(UnreadableFile, match="has another shape or dtype than"),
    ):
        load("q.weight")


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({}), pickle.dumps(None)])
def test_metadata_that_is_none(content: bytes, tmp_path: Path) -> None:
    write_distributed(tmp_path, {"q.weight": torch.zeros(7, 4)})
    (tmp_path / ".metadata").write_bytes(content)
    assert problem(tmp_path)


def test_a_missing_file_costs_one_checkpoint(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20, 30), "distributed")
    (tmp_path / "checkpoint-20" / "pytorch_model_fsdp_0" / "__0_0.distcp").unlink()
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 30)
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD101"]
    assert error.file == "checkpoint-20/pytorch_model_fsdp_0/.metadata"
    assert error.message == "Its file __0_0.distcp: The file does not exist."


def test_a_file_that_goes_after_opening(tmp_path: Path) -> None:
    write_dense_run(tmp_path, (10, 20), "distributed")
    trajectory = open_trajectory(tmp_path)
    (tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0" / "__0_0.distcp").unlink()
    with trajectory.checkpoints[0].open() as matrices, pytest.raises(UnreadableMatrix, match="cannot be read"):
        matrices["lm_head"]
