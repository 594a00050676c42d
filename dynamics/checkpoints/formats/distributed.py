"""Distributed checkpoints of torch (``.metadata`` beside ``__0_0.distcp``), as FSDP and DTensor trainings write them.

``.metadata`` is a pickle, and a pickle can call any function by its name. This reader replaces the names that torch
writes there by inert records, which only keep their arguments; any other name ends the reading. The numbers are in
``.distcp`` files, one record of ``torch.save`` for each chunk, and are read with ``weights_only=True``, one tensor at
a time. No model, no process group and no class of torch.distributed is needed.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import TORCH_DTYPES, TORCH_NAMES, Loader, TensorInfo, read_head
from dynamics.checkpoints.names import shown
from dynamics.text import first_line

METADATA = ".metadata"
#: The metadata of the largest trainings take some ten megabytes.
_LIMIT = 256 * 2**20
#: Most bytes of a record beside its numbers; torch needs one or two thousand.
_OVERHEAD = 2**20
_AGAIN = "Save or copy the checkpoint again."
_CONVERT = "Convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin"
#: First words of the paths of what is saved beside a model.
_NOT_THE_MODEL = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state", "rng")


class _Record:
    """Stands for one object of the pickle: keeps its state, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None

    state: object


class _Tensor(_Record):
    pass


class _Index(_Record):
    pass


class _Inert(pickle.Unpickler):
    """Unpickles records and nothing else."""

    _MODULES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "torch.distributed.checkpoint.metadata": {
            "TensorStorageMetadata": _Tensor,
            "MetadataIndex": _Index,
            **dict.fromkeys(
                ("Metadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata", "StorageMeta"), _Record
            ),
            "_MEM_FORMAT_ENCODING": _Record,
        },
        "torch.distributed._shard.sharded_tensor.metadata": {
            "TensorProperties": _Record,
            "MEM_FORMAT_ENCODING": _Record,
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo": _Record},
        "torch.serialization": {"_get_layout": _Record},
        "torch": {"Size": tuple, **{str(dtype).removeprefix("torch."): dtype for dtype in TORCH_NAMES}},
        "pathlib": dict.fromkeys(("PosixPath", "WindowsPath", "PurePosixPath", "Path"), _Record),
        "pathlib._local": dict.fromkeys(("PosixPath", "WindowsPath", "PurePosixPath", "Path"), _Record),
        "collections": {"OrderedDict": dict},
        "builtins": {"getattr": _Record},  # how enums are pickled by some Pythons (3.11.2); nothing is looked up
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._MODULES[module_name][global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {shown(f'{module_name}.{global_name}')}") from None


#: File, first byte and number of bytes.
_Span = tuple[Path, int, int]


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class DistributedWeights:
    """The model's tensors of a distributed checkpoint, not yet opened.

    Args:
        path: Its ``.metadata``.
        bytes: Size of all its files together.
        header_sha256: Hash of ``.metadata``.
        tensors: Key to dtype and shape.
        chunks: Key to the blocks that the tensor consists of.
        tied: Empty: the metadata do not say which tensors share memory.
    """

    path: Path
    bytes: int
    header_sha256: str
    tensors: Mapping[str, TensorInfo]
    chunks: Mapping[str, tuple[_Chunk, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[DistributedWeights]:
        """The files that hold its tensors, as one: each alone is of no use."""
        return (self,)

    @contextmanager
    def open(self) -> Iterator[Loader]:
        """Give a loader that puts together one tensor at a time.

        Raises:
            UnreadableFile: By the loader, if a file has gone or does not hold what the metadata says.
        """

        def load(key: str) -> Tensor:
            info = self.tensors[key]
            # What no chunk covers stays NaN, which is reported as such.
            tensor = torch.full(info.shape, math.nan, dtype=TORCH_DTYPES[info.dtype])
            for chunk in self.chunks[key]:
                block = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                tensor[block] = _read(chunk, tensor.dtype)
            return tensor

        yield load


def _read(chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    try:
        with chunk.file.open("rb") as file:
            file.seek(chunk.start)
            tensor = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything at all; nothing in them is executed
        problem = f"A record of {shown(chunk.file.name)} cannot be read: {first_line(error)}"
        raise UnreadableFile("OD101", problem, _AGAIN) from error
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
        problem = f"A record of {shown(chunk.file.name)} has another shape or dtype than .metadata says."
        raise UnreadableFile("OD101", problem, _AGAIN)
    return tensor


def read_distributed(folder: Path) -> DistributedWeights:
    """Read ``.metadata`` of a distributed checkpoint, as far as it describes the model's tensors.

    Raises:
        UnreadableFile: If it names anything that torch does not write there, files outside the folder, or bytes that
            the files do not have.
    """
    path = folder / METADATA
    size, _ = read_head(path, "OD101")
    if size > _LIMIT:
        raise UnreadableFile("OD101", f"It has {size} bytes: too large for the metadata of a checkpoint.", _AGAIN)
    content = path.read_bytes()
    try:
        metadata = _Inert(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise anything at all
        problem = f"It is not the metadata of a distributed checkpoint and was not loaded: {first_line(error)}."
        raise UnreadableFile("OD101", problem, _CONVERT) from error
    entries, storage, plan = (
        metadata.get(name) if isinstance(metadata, _Record) else None
        for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise UnreadableFile("OD101", "It does not list tensors and their places in files.", _AGAIN)
    spans = _spans(folder, storage)
    tensors: dict[str, TensorInfo] = {}
    chunks: dict[str, tuple[_Chunk, ...]] = {}
    for key, name in _model_names(entries, plan if isinstance(plan, dict) else {}).items():
        tensors[name], chunks[name] = _tensor(key, entries[key], spans.get(key, {}))
    files = {chunk.file for of_tensor in chunks.values() for chunk in of_tensor}
    total = size + sum(file.stat().st_size for file in files)
    return DistributedWeights(path, total, hashlib.sha256(content).hexdigest(), tensors, chunks)


def _model_names(entries: Mapping[Any, Any], plan: Mapping[Any, Any]) -> dict[str, str]:
    """Return the name in the model for the key of each of its tensors.

    The Trainer and torchtitan save ``{"model": …, "optim": …}``; the plan has the path of each key in that.
    """
    paths: dict[str, tuple[str, ...]] = {}
    for key, entry in entries.items():
        if isinstance(key, str) and isinstance(entry, _Tensor):
            path = plan.get(key)
            paths[key] = tuple(map(str, path)) if isinstance(path, tuple) and path else (key,)
    if any(path[0] == "model" and len(path) > 1 for path in paths.values()):
        return {key: ".".join(path[1:]) for key, path in paths.items() if path[0] == "model"}
    return {key: key for key, path in paths.items() if not path[0].startswith(_NOT_THE_MODEL)}


def _spans(folder: Path, storage: Mapping[Any, Any]) -> dict[str, dict[tuple[int, ...], _Span]]:
    """Return where each chunk is stored, by the key of its tensor and its offsets in it."""
    sizes: dict[str, int] = {}
    spans: dict[str, dict[tuple[int, ...], _Span]] = defaultdict(dict)
    for index, record in storage.items():
        if not isinstance(index, _Index) or not isinstance(record, _Record) or index.get("offset") is None:
            continue
        name, start, length = (record.get(field) for field in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not name.endswith(".distcp") or any(sign in name for sign in "/\\:\0"):
            problem = f"It names {shown(str(name))!r}, which is not the name of a .distcp file beside it."
            raise UnreadableFile("OD101", problem, "Nothing outside the checkpoint's folder is read. Check the folder.")
        if record.get("transform_descriptors"):
            raise UnreadableFile("OD101", "Its records are compressed or transformed; this is not read.", _CONVERT)
        if name not in sizes:
            try:
                sizes[name], _ = read_head(folder / name, "OD101")
            except UnreadableFile as error:
                problem = f"Its file {shown(name)}: {error.problem}"
                raise UnreadableFile(error.code, problem, error.remedy) from error
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= sizes[name]:
            problem = (
                f"It places a record at bytes {start} to {start}+{length} of {shown(name)}, which has {sizes[name]}."
            )
            raise UnreadableFile("OD101", problem, _AGAIN)
        spans[str(index.get("fqn"))][_sizes(index.get("offset"))] = folder / name, start, length
    return spans


def _tensor(key: str, entry: _Record, spans: Mapping[tuple[int, ...], _Span]) -> tuple[TensorInfo, tuple[_Chunk, ...]]:
    """Return dtype and shape of a tensor, and its chunks."""
    properties, shape, blocks = entry.get("properties"), _sizes(entry.get("size")), entry.get("chunks")
    state = properties.state if isinstance(properties, _Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(blocks, list):
        raise UnreadableFile("OD101", f"It does not describe the tensor {shown(key)!r}.", _AGAIN)
    chunks = []
    for block in blocks:
        offsets, sizes = (_sizes(block.get(field)) for field in ("offsets", "sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(
            o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)
        ):
            raise UnreadableFile("OD101", f"A chunk of {shown(key)!r} lies outside the shape {list(shape)}.", _AGAIN)
        if offsets not in spans:
            raise UnreadableFile(
                "OD101", f"No .distcp file holds this chunk of {shown(key)!r}: {list(offsets)}.", _AGAIN
            )
        chunk = _Chunk(offsets, sizes, *spans[offsets])
        if not 0 <= chunk.length - math.prod(sizes) * dtype.itemsize <= _OVERHEAD:
            problem = f"A chunk of {shown(key)!r} does not match the size of its record."
            raise UnreadableFile("OD101", problem, _AGAIN)
        chunks.append(chunk)
    if len({(chunk.file, chunk.start) for chunk in chunks}) != len(chunks):
        raise UnreadableFile("OD101", f"Two chunks of {shown(key)!r} share one record.", _AGAIN)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise UnreadableFile("OD101", f"The chunks of {shown(key)!r} do not fill its shape {list(shape)}.", _AGAIN)
    return TensorInfo(TORCH_NAMES.get(dtype, str(dtype)), shape), tuple(chunks)


def _sizes(sizes: object) -> tuple[int, ...]:
    """Return a shape or offset, checked."""
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        problem = f"Expected a shape or offset of whole numbers, got {shown(type(sizes).__name__)}."
        raise UnreadableFile("OD101", problem, _AGAIN)
    return sizes
