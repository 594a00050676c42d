"""Weight files that are larger than memory, damaged, or not what their header says."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import read_weight_file
from dynamics.text import first_line
from tests.runs import random_factors, write_adapter, write_run

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def write_sparse(path: Path, header: dict[str, Any], size: int) -> Path:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return path


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(30).reshape(5, 6).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "fp8": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with read_weight_file(tmp_path / "x.safetensors").open() as load:
        for key, tensor in load_file(tmp_path / "x.safetensors").items():
            assert (load(key).dtype, load(key).shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(load(key).flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "numbers": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write_sparse(tmp_path / "x.safetensors", header, 9)
    content = bytearray(path.read_bytes())
    content[-8:] = struct.pack("<2f", 1.5, -2.0)
    path.write_bytes(content)
    with read_weight_file(path).open() as load:
        assert load("numbers").tolist() == [1.5, -2.0]


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with read_weight_file(tmp_path / "x.safetensors").open() as load:
        load("a").zero_()
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1.0, 1.0, 1.0]


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    rows = 4 * memory * 1024 // 4 // 1024
    size = rows * 1024 * 4
    header = {
        "large": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, size]},
        "last": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    try:
        path = write_sparse(tmp_path / "x.safetensors", header, size + 8)
    except OSError:
        pytest.skip("the file system has no files that large")
    with path.open("r+b") as file:
        file.seek(-8, io.SEEK_END)
        file.write(struct.pack("<2f", 1.0, 2.0))
    with read_weight_file(path).open() as load:
        assert load("last").tolist() == [1.0, 2.0]
        assert float(load("large")[rows // 2].sum()) == 0.0


def test_a_file_that_cannot_be_mapped_costs_only_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = open_trajectory(write_run(tmp_path))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with trajectory.checkpoints[0].open() as matrices:
        assert len([matrices[name] for name in matrices]) == 4
    monkeypatch.setattr("dynamics.checkpoints.files.mmap.mmap", refuse)
    with (
        trajectory.checkpoints[1].open() as matrices,
        pytest.raises(ValueError, match=r"It cannot be opened: .*Cannot allocate"),
    ):
        matrices[next(iter(matrices))]


def test_a_file_that_another_one_replaced_is_not_read(tmp_path: Path) -> None:
    first = write_adapter(tmp_path, random_factors(seed=1)) / "adapter_model.safetensors"
    opened = read_weight_file(first)
    tensors = dict(reversed(load_file(first).items()))
    save_file({f"x{key[1:]}": tensor for key, tensor in tensors.items()}, first, metadata={"format": "pt"})
    with pytest.raises(UnreadableFile, match="It has changed since its header was read"), opened.open():
        pass


@pytest.mark.parametrize("metadata", [None, "text", ["a"], {"format": 1}, {"format": None}])
def test_metadata_that_is_no_object_of_texts(metadata: Any, tmp_path: Path) -> None:
    header = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(UnreadableFile, match=r"Its header's __metadata__ is .*; expected an object with text values"):
        read_weight_file(write_sparse(tmp_path / "x.safetensors", header, 4))


# --- pickles -------------------------------------------------------------------------------------


def damaged(path: Path) -> Path:
    """One bit of the numbers turned, where the archive's checksum alone can tell."""
    with zipfile.ZipFile(path) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
        position = entry.header_offset + len(entry.FileHeader()) + 200
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)
    return path


def test_numbers_that_do_not_fit_their_checksum_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(500)}, tmp_path / "x.bin")
    assert read_weight_file(tmp_path / "x.bin").tensors
    with pytest.raises(UnreadableFile, match="do not match a checksum in it"):
        read_weight_file(damaged(tmp_path / "x.bin"))


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(500)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weight_file(tmp_path / "x.bin").tensors


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00a\xffstuff.", "It cannot be read: Unsupported operand 255"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR.", "It holds Python objects, not only tensors"),
    ],
)
def test_the_advice_to_load_a_pickle_all_the_same_is_not_passed_on(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UnreadableFile) as raised:
        read_weight_file(tmp_path / "x.bin")
    assert problem in str(raised.value)
    assert "weights_only" not in str(raised.value)
    with pytest.raises(Exception, match="weights_only") as from_torch:
        torch.load(io.BytesIO(content), weights_only=True)
    assert "weights_only" not in first_line(from_torch.value)
    assert "torch." not in first_line(from_torch.value)
