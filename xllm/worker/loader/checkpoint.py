"""The safetensors files of a model directory: which tensors there are, and their bytes.

Only safetensors is read; a directory with pickled weights alone is refused. The headers are read
by hand (names, types, shapes, extents: checked against the file before anything is allocated) and
make up the model's revision; the bytes come through the safetensors library, memory-mapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xllm.errors import ConfigError, DependencyError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_MAX_HEADER_BYTES = 100 << 20
_PROBE_BYTES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a checkpoint, as its file's header describes it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int


class Checkpoint:
    """The tensors of a model directory by name; opened with `open_checkpoint`."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self.files = tuple(sorted({entry.file for entry in entries.values()}))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def dtype(self) -> str:
        """Torch's name of the first tensor's type: the checkpoint's type where config.json
        does not say."""
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for entry in self.entries.values():
            return names.get(entry.dtype, entry.dtype)
        raise ConfigError("the checkpoint holds no tensor")

    def tensors(self) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """Every tensor, file by file, mapped from its file. The consumer copies what it needs
        and drops the tensor; each file is unmapped when its last one was given."""
        for file in self.files:
            with _mapped(file) as source:
                for entry in self.entries.values():
                    if entry.file == file:
                        yield entry, source.get_tensor(entry.name)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values."""
        one, two = self.entries[first], self.entries[second]
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        with contextlib.ExitStack() as stack:
            values = [
                stack.enter_context(_mapped(entry.file)).get_tensor(entry.name)
                for entry in (one, two)
            ]
            return torch.equal(values[0], values[1])

    def revision(self, directory: Path) -> str:
        """SHA-256 (hex) over config.json, the names, types and shapes of all tensors, and 64
        bytes from the middle of each: a fine-tuned model has its parent's headers."""
        digest = hashlib.sha256()
        config = (directory / "config.json").read_bytes()
        digest.update(len(config).to_bytes(8, "little") + config)
        for name in sorted(self.entries):
            entry = self.entries[name]
            line = json.dumps([name, entry.dtype, entry.shape, entry.num_bytes])
            digest.update(line.encode() + b"\n")
            with entry.file.open("rb") as file:
                file.seek(entry.first_byte + max(entry.num_bytes - _PROBE_BYTES, 0) // 2)
                digest.update(file.read(min(_PROBE_BYTES, entry.num_bytes)))
        return digest.hexdigest()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Find and check the safetensors files: one `model.safetensors`, or an index with shards.

    Raises ConfigError for pickled weights, broken headers and indexes that do not agree with
    their shards; DependencyError where there are no weights at all or a shard is absent.
    """
    if (directory / _SINGLE).is_file():
        return Checkpoint(_read_header(directory / _SINGLE))
    index = directory / _INDEX
    if index.is_file():
        return Checkpoint(_read_shards(directory, index))
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ConfigError(
            f"{pickled[0]}: pickled weights can run code and are never read; "
            "convert the model to safetensors",
            param="model.path",
        )
    raise DependencyError(
        f"model.path: {directory} has neither {_SINGLE} nor {_INDEX}", param="model.path"
    )


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[Any]:
    """A file as the library has it; ConfigError where it sees what the headers do not tell, such
    as bytes of no tensor or of two."""
    try:
        source = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ConfigError(f"{file.name}: broken safetensors file: {error}") from error
    with source:
        yield source


def _read_shards(directory: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_INDEX} has no readable weight_map: {error!r}") from error
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(placed.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{_INDEX} names {file!r}, which is no safetensors file beside it")
        if not (directory / file).is_file():
            raise DependencyError(f"{_INDEX} names {file}, which is absent", param="model.path")
        found = _read_header(directory / file)
        entries.update((name, entry) for name, entry in found.items() if placed.get(name) == file)
    absent = sorted(placed.keys() - entries.keys())
    if absent:
        raise ConfigError(f"{_INDEX} places {absent[0]} in {placed[absent[0]]}: it is not there")
    return entries


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The entries of one file: 8 bytes of header length, little-endian, a JSON header, data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ConfigError(f"{path.name}: broken safetensors file (header of {length} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name}: broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path.name}: broken safetensors header")
    start = 8 + length
    return {
        name: _read_entry(path, name, fields, start, size)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _read_entry(path: Path, name: str, fields: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype = str(fields["dtype"])
        shape = tuple(int(length) for length in fields["shape"])
        first, last = (start + int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path.name}: broken entry of {name}: {error!r}") from error
    if dtype not in _ITEM_BYTES:
        raise ConfigError(f"{path.name}: {name} has type {dtype}; F32, F16 and BF16 are read")
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if not start <= first <= last <= size or last - first != num_bytes:
        raise ConfigError(f"{path.name}: {name} does not lie in the file: it is cut or broken")
    return TensorEntry(name, path, dtype, shape, first, num_bytes)
