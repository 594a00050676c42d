"""Read files from runs, whatever is wrong with them: weight files one tensor at a time, and JSON files.

safetensors headers are checked here, so that each defect has its own message, and the file is then mapped: it may be
larger than memory. ``.bin`` files are read with ``weights_only=True``: no object in them is ever built.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.names import shown
from dynamics.text import first_line

_AGAIN = "Save or copy the file again."
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_LFS_REMEDY = "Run `git lfs pull` in the clone, then copy the file itself."
#: Bytes; configurations and training states are smaller.
_JSON_LIMIT = 256 * 2**20
#: Limits to the memory that a parsed JSON file takes: a log has one object for each entry, so these allow a million
#: entries of ten numbers.
_MOST_OBJECTS = 1_000_000
_MOST_VALUES = 10_000_000


def read_head(path: Path, code: str, count: int = 64) -> tuple[int, bytes]:
    """Return the size and the first bytes of a regular file that is not a Git-LFS pointer.

    Args:
        path: The file; links are followed.
        code: Code of the finding if it cannot be read (a pointer is always ``OD107``).
        count: How many bytes to return.

    Raises:
        UnreadableFile: If it is absent, not a regular file, unreadable, empty or a Git-LFS pointer.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(code, "It is not a regular file.", "Replace it by the file itself.")
        with path.open("rb") as file:
            start = file.read(max(count, len(_LFS_HEAD)))
    except FileNotFoundError:
        raise UnreadableFile(code, "The file does not exist.", "Copy it again.") from None
    except PermissionError:
        raise UnreadableFile(code, "Permission denied.", "Make it readable (chmod u+r) and run again.") from None
    except UnreadableFile:
        raise
    except OSError as error:
        raise UnreadableFile(code, f"It cannot be read: {first_line(error)}.", "Copy it again.") from error
    if status.st_size == 0:
        raise UnreadableFile(code, "It is empty (zero bytes).", _AGAIN)
    if start.startswith(_LFS_HEAD):
        problem = f"It is a Git-LFS pointer ({status.st_size} bytes), not the file itself."
        raise UnreadableFile("OD107", problem, _LFS_REMEDY)
    return status.st_size, start[:count]


def read_text(path: Path, code: str) -> str:
    """Read the text of a JSON file without its byte-order mark.

    Args:
        path: The file.
        code: Code of the finding if it cannot be read.

    Raises:
        UnreadableFile: With ``code`` if it is too large, not UTF-8 or cannot be read; ``OD107`` for a Git-LFS pointer.
    """
    size, _ = read_head(path, code)
    if size > _JSON_LIMIT:
        problem = f"It is too large for a JSON file of its kind: {size:,} bytes, at most {_JSON_LIMIT:,}."
        raise UnreadableFile(code, problem, "Check the file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise UnreadableFile(code, f"It is not valid JSON: {first_line(error)}.", _AGAIN) from error
    except OSError as error:
        raise UnreadableFile(code, f"It cannot be read: {first_line(error)}.", "Copy it again.") from error
    # Counted before parsing, so that signs within texts count, too; a log has few.
    objects, values = text.count("{") + text.count("["), text.count(",")
    if objects > _MOST_OBJECTS or values > _MOST_VALUES:
        problem = (
            f"It has about {objects:,} objects and lists and {values:,} values; expected at most {_MOST_OBJECTS:,} "
            f"objects and lists and {_MOST_VALUES:,} values."
        )
        raise UnreadableFile(code, problem, "Check the file.")
    return text


def read_json(path: Path, code: str) -> dict[str, Any]:
    """Read a JSON object from a file; bare ``NaN`` and ``Infinity``, as Python writes them, are accepted.

    Args:
        path: The file.
        code: Code of the finding if it cannot be read.

    Raises:
        UnreadableFile: With ``code`` if it is not a JSON object, ``OD107`` if it is a Git-LFS pointer.
    """
    text = read_text(path, code)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(code, f"It is not valid JSON: {first_line(error)}.", _AGAIN) from error
    if not isinstance(content, dict):
        raise UnreadableFile(code, f"Expected a JSON object, got {type(content).__name__}.", _AGAIN)
    return content


# --- weight files --------------------------------------------------------------------------------

#: Bits of each dtype, by its name in safetensors.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
TORCH_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
#: Bytes read at once when a checksum is compared.
_BLOCK = 2**22
#: The limit of the safetensors format, in bytes.
_HEADER_LIMIT = 100_000_000
#: Torch's words about a pickle that would build an object, as opposed to a damaged one.
_OBJECTS = re.compile(r"GLOBAL|unrecognized function|Trying to (call|instantiate|load)|Can only (create|build)")

Loader = Callable[[str], Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (as safetensors names it) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@runtime_checkable
class Weights(Protocol):
    """Named tensors on disk, not yet opened: one file, the shards of an index, or a distributed checkpoint.

    ``path`` is the file that lists them, ``parts`` are the files that hold them; for the rest see :class:`WeightFile`.
    """

    @property
    def path(self) -> Path: ...
    @property
    def bytes(self) -> int: ...
    @property
    def header_sha256(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def tied(self) -> Mapping[str, str]: ...
    @property
    def parts(self) -> Sequence[Weights]: ...
    def open(self) -> AbstractContextManager[Loader]: ...


@dataclass(frozen=True)
class WeightFile:
    """A readable weight file, not yet opened.

    Args:
        path: The file.
        bytes: Its size.
        header_sha256: Hash of its header (safetensors) or of its list of tensors (``.bin``).
        tensors: Key → dtype and shape.
        metadata: The ``__metadata__`` of a safetensors file.
        tied: Key → first key with the same tensor in the same memory (``.bin``).
        spans: Key → first byte and the byte after the last, counted from the end of the header (safetensors).
    """

    path: Path
    bytes: int
    header_sha256: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def parts(self) -> tuple[WeightFile]:
        """The files that hold its tensors: the file itself."""
        return (self,)

    @contextmanager
    def open(self) -> Iterator[Loader]:
        """Map the file into memory, and yield a loader of tensors that are views of the mapping.

        Raises:
            UnreadableFile: If the file has gone or changed since its header was read. The loader raises it, too, if
                the size of the file has changed since it was opened.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self.path.open("rb"))
                if self.path.suffix == ".safetensors":
                    content, start = self._mapped(file)
                    file.close()  # the map keeps a descriptor of its own: one a checkpoint, not two
                    load, size = partial(_view, content, start, self.tensors, self.spans), content.size
                else:
                    state = _load_pickle(self.path)
                    stack.callback(state.clear)
                    load, size = state.__getitem__, partial(_size, file.fileno())
            except UnreadableFile:
                raise
            except FileNotFoundError as error:
                raise UnreadableFile("OD101", "It was removed after its header was read.", _AGAIN) from error
            except (OSError, ValueError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
                raise UnreadableFile("OD101", f"It cannot be opened: {reason}.", _AGAIN) from error
            yield _guarded(load, size)

    def _mapped(self, file: BinaryIO) -> tuple[mmap.mmap, int]:
        """Return the bytes of the file, and the position of its first number."""
        length = int.from_bytes(file.read(8), "little")
        same_size = os.fstat(file.fileno()).st_size == self.bytes and 8 + length <= self.bytes
        if not same_size or hashlib.sha256(file.read(length)).hexdigest() != self.header_sha256:
            problem = "It has changed since its header was read."
            raise UnreadableFile("OD101", problem, "Analyse the run again when it is saved.")
        return _map(file.fileno()), 8 + length


def _map(descriptor: int) -> mmap.mmap:
    """Return the bytes of a file that may be larger than memory; writing to them does not change the file.

    A private writable mapping counts as memory that may be needed, and is refused beyond the memory there is;
    ``MAP_NORESERVE`` declares that it will not be needed, and a read-only mapping needs none.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        try:
            return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            pass
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _view(
    content: mmap.mmap, start: int, tensors: Mapping[str, TensorInfo], spans: Mapping[str, tuple[int, int]], key: str
) -> Tensor:
    """Return one tensor as a view of the mapped file; dtypes that are never analysed as bytes."""
    info, (begin, end) = tensors[key], spans[key]
    dtype = TORCH_DTYPES.get(info.dtype, torch.uint8)
    shape = info.shape if info.dtype in TORCH_DTYPES else (end - begin,)
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(content)
    if view.readonly or (start + begin) % dtype.itemsize:  # torch may write, and needs alignment
        return torch.frombuffer(bytearray(view[start + begin : start + end]), dtype=dtype).reshape(shape)
    return torch.frombuffer(content, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin).reshape(
        shape
    )


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _guarded(load: Loader, size_now: Callable[[], int]) -> Loader:
    """Return a loader that checks the file's size first: reading a mapping beyond the file's end kills the process."""
    size = size_now()

    def load_checked(key: str) -> Tensor:
        now = size_now()
        if now != size:
            problem = f"Its size changed from {size} to {now} bytes after it was opened."
            raise UnreadableFile("OD101", problem, "Analyse the run again when it is saved.")
        return load(key)

    return load_checked


def read_weight_file(path: Path) -> WeightFile:
    """Read the header of a ``.safetensors`` file, or the list of tensors of a ``.bin`` file.

    Args:
        path: The file.

    Raises:
        UnreadableFile: ``OD101`` or ``OD107``, with what is wrong with it.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> WeightFile:
    size, start = read_head(path, "OD101", count=8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > _HEADER_LIMIT:
        raise UnreadableFile("OD101", "Expected a safetensors file; its first bytes are not those of one.", _AGAIN)
    if 8 + length > size:
        problem = f"It is truncated: its header alone needs {8 + length} bytes, the file has {size}."
        raise UnreadableFile("OD101", problem, _AGAIN)
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("OD101", f"Its header is not valid JSON: {first_line(error)}.", _AGAIN) from error
    if not isinstance(entries, dict):
        raise UnreadableFile("OD101", "Its header is not a JSON object.", _AGAIN)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        problem = f"Its header's __metadata__ is {shown(repr(metadata))}; expected an object with text values."
        raise UnreadableFile("OD101", problem, _AGAIN)
    tensors, spans = _checked(entries, size - 8 - length)
    return WeightFile(path, size, hashlib.sha256(header).hexdigest(), tensors, metadata, spans=spans)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _checked(entries: Mapping[str, Any], room: int) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Return the entries of a header and their offsets, which must tile the ``room`` bytes of data exactly."""
    tensors: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for key, entry in entries.items():
        try:
            key.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: JSON can write it, safetensors refuses the file
            problem = f"Its header names a tensor {key!r}, which is not valid Unicode."
            raise UnreadableFile("OD101", problem, _AGAIN) from error
        dtype, shape, (begin, end) = _fields(key, entry)
        tensors[key] = TensorInfo(dtype, shape)
        if not 0 <= begin <= end:
            raise UnreadableFile(
                "OD101", f"Its header places {key!r} at the impossible bytes {begin} to {end}.", _AGAIN
            )
        if end > room:
            problem = f"It is truncated or its header is wrong: {key!r} ends at byte {end} of {room} bytes of data."
            raise UnreadableFile("OD101", problem, _AGAIN)
        if (end - begin) * 8 != tensors[key].count * _BITS[dtype]:
            problem = f"Its header is wrong: {key!r}, {dtype} of shape {list(shape)}, cannot take {end - begin} bytes."
            raise UnreadableFile("OD101", problem, _AGAIN)
        spans[key] = (begin, end)
    position = 0
    for begin, end in sorted(spans.values()):
        if begin != position:
            raise UnreadableFile("OD101", "Its header is wrong: tensors overlap or leave gaps.", _AGAIN)
        position = end
    if position != room:
        problem = f"Its header is wrong: the tensors take {position} bytes, the file has {room} bytes of data."
        raise UnreadableFile("OD101", problem, _AGAIN)
    return tensors, spans


def _whole(numbers: object) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)  # a bool is not a size


def _fields(key: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if isinstance(entry, dict):
        dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
        if _whole(shape) and min(shape, default=0) >= 0 and _whole(offsets) and len(offsets) == 2:
            if not isinstance(dtype, str) or dtype not in _BITS:
                raise UnreadableFile("OD101", f"Its header gives {key!r} the unknown dtype {dtype!r}.", _AGAIN)
            return dtype, tuple(shape), (offsets[0], offsets[1])
    raise UnreadableFile("OD101", f"Its header does not describe {key!r} (dtype, shape, data_offsets).", _AGAIN)


def _read_pickle(path: Path) -> WeightFile:
    size, _ = read_head(path, "OD101")
    _verify(path, size)
    state = _load_pickle(path)
    tensors = {
        key: TensorInfo(TORCH_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for key, tensor in state.items()
    }
    listing = json.dumps([[key, info.dtype, info.shape] for key, info in tensors.items()])
    return WeightFile(path, size, hashlib.sha256(listing.encode()).hexdigest(), tensors, {}, _tied(state))


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each repeated key → the first key with the same view of the same memory; empty tensors share none."""
    first: dict[object, str] = {}
    tied = {}
    for key, tensor in state.items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(view, key) != key:
            tied[key] = first[view]
    return tied


def _verify(path: Path, size: int) -> None:
    """Compare the numbers of a ``.bin`` file with its checksums, which torch does not do; some files have none."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                return  # not written by torch, so that reading may take any time: leave it to torch
            for entry in entries:
                if entry.CRC:
                    with archive.open(entry) as record:
                        while record.read(_BLOCK):
                            pass
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            problem = "It is damaged: its numbers do not match a checksum in it."
            raise UnreadableFile("OD101", problem, _AGAIN) from error
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError):
        pass  # other defects are reported when torch reads the file


def _load_pickle(path: Path) -> dict[str, Tensor]:
    # Files in torch's first format cannot be mapped; they are read whole.
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything at all; nothing in it is executed
        problem = f"It cannot be read: {first_line(error)}"
        raise _not_tensors(error) or UnreadableFile("OD101", problem, _AGAIN) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise UnreadableFile("OD101", "It does not hold a dictionary of tensors.", _AGAIN)
    return {key: tensor.detach() for key, tensor in state.items()}


def _not_tensors(error: Exception) -> UnreadableFile | None:
    """Return the refusal of a pickle with objects in it, which torch did not load; ``None`` for other errors."""
    if not _OBJECTS.search(str(error)):
        return None
    problem = "It holds Python objects, not only tensors. They could run code and were not loaded."
    remedy = "Save it as safetensors (save_pretrained(..., safe_serialization=True))."
    return UnreadableFile("OD101", problem, remedy)
