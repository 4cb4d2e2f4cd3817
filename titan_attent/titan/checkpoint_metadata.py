"""Reads the metadata and single values of a checkpoint without running code that it contains.

Checkpoints of torch.distributed.checkpoint are Python pickles: opening one runs any code that its writer put there. The
checks before a run read only ``.metadata`` and single values, and this module unpickles only the classes of
:data:`ALLOWED`. Loading the checkpoint itself has no such guard: :data:`TRUSTED`.

Cost: one file, about 300 bytes per parameter tensor and shard.
"""

import importlib
import io
import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

TRUSTED = "checkpoints are Python pickles, which can run arbitrary code: open only those of people that you trust"

ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", "device"}),  # and dtypes, layouts, memory formats
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
    "collections": frozenset({"OrderedDict"}),
    "builtins": frozenset({"set"}),
}
METADATA_FILE = ".metadata"
_PLAIN = (torch.dtype, torch.layout, torch.memory_format)
_MAX_VALUE_BYTES = 2**24
"""Upper bound on the size of one value; the values that are read have a few hundred bytes."""
_MAX_HEADER_BYTES = 10**8
"""Upper bound on the header of a safetensors file, as in the format's own reader."""


Value = TypeVar("Value")


class _Refused(Exception):
    """Raised for a class that a checkpoint's metadata does not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # Python 3.13's name of it
        if name in ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(constant := getattr(torch, name, None), _PLAIN):
            return constant
        raise _Refused(f"{module}.{name}")


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of the checkpoint in the folder ``path``; ValueError as :func:`parse_metadata`."""
    try:
        content = (Path(path) / METADATA_FILE).read_bytes()
    except OSError as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}") from None
    return parse_metadata(content, path)


def parse_metadata(content: bytes, path: str | Path) -> Metadata:
    """The metadata in ``content``, the bytes of the file ``.metadata`` of the checkpoint ``path``.

    Raises:
        ValueError: the metadata is damaged, was written by a later torch that this one cannot read, or contains a class
            outside :data:`ALLOWED`.
    """
    file = f"{path}/{METADATA_FILE}"
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except _Refused as refused:
        raise ValueError(
            f"{file} contains {refused}, which does not belong in a checkpoint's metadata: it was tampered with, or "
            f"written by a later torch than {torch.__version__}. Do not open it unless you know who wrote it; {TRUSTED}"
        ) from None
    except Exception as error:  # unpickling damaged bytes can raise any exception
        raise ValueError(_unreadable(path, error)) from None
    if not _has_valid_types(metadata):
        raise ValueError(
            f"{file} is not the metadata of a checkpoint: it is damaged; restore it, or give another checkpoint"
        )
    return metadata


def _has_valid_types(metadata: Any) -> bool:
    """Whether the fields have the types that a checkpoint's metadata requires."""
    try:
        names, storage = metadata.state_dict_metadata, metadata.storage_data or {}
        sizes = [entry.size for entry in names.values() if isinstance(entry, TensorStorageMetadata)]
        return (
            isinstance(metadata, Metadata)
            and all(isinstance(name, str) for name in names)
            and all(isinstance(size, torch.Size) for size in sizes)
            and all(isinstance(index, MetadataIndex) for index in storage)
            and all(isinstance(entry, _StorageInfo) and _has_valid_location(entry) for entry in storage.values())
        )
    except (AttributeError, TypeError):
        return False


def _has_valid_location(entry: _StorageInfo) -> bool:
    return isinstance(entry.relative_path, str) and type(entry.offset) is int and type(entry.length) is int


def _unreadable(path: str | Path, error: Exception) -> str:
    if isinstance(error, (ValueError, AttributeError)) and ("to unpack" in str(error) or "attribute" in str(error)):
        return (
            f"the checkpoint {path} was written by a later torch than this one, {torch.__version__}, which cannot read "
            f"it ({error}): torch 2.14 and older cannot read checkpoints of 2.15. Resume under the torch that wrote "
            "it, or give another checkpoint"
        )
    return (
        f"the checkpoint {path} is damaged: its .metadata cannot be read ({type(error).__name__}: {error}). Restore "
        "it, or give another checkpoint with checkpoint.load_step"
    )


def check_files(path: str | Path, metadata: Metadata, *, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose files lack the tensors ``names``, as after a copy that was cut short; ValueError."""
    wanted, needed = set(names), dict[str, int]()
    for index, entry in (metadata.storage_data or {}).items():
        if index.fqn in wanted:
            file = str(entry.relative_path)
            needed[file] = max(needed.get(file, 0), entry.offset + entry.length)
    for file, size in sorted(needed.items()):
        found = Path(path) / file
        num_bytes = found.stat().st_size if found.is_file() else -1
        if num_bytes < size:
            what = "missing" if num_bytes < 0 else f"shorter, {num_bytes:,} bytes, than the {size:,} that it needs"
            raise ValueError(f"the checkpoint {path} is damaged: {file} is {what}. Copy it again, or give another one")


def shapes_of(metadata: Metadata, *, modules: Iterable[str]) -> dict[str, list[int]]:
    """name -> shape of the tensors whose names begin with one of ``modules``."""
    prefixes = set(modules)
    return {
        name: list(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if name.partition(".")[0] in prefixes and isinstance(entry, TensorStorageMetadata)
    }


def safetensors_shapes(path: str | Path) -> dict[str, list[int]]:
    """name -> shape of the weights in the ``*.safetensors`` files of the folder ``path``, from their headers.

    Raises:
        ValueError: a file is damaged.
    """
    return {name: list(entry.shape) for name, entry in safetensors_entries(path).items()}


class SafetensorsEntry(NamedTuple):
    """Where a tensor lies in a safetensors file, in row-major order.

    Attributes:
        file: the file's name in its folder.
        dtype: as the format names it, such as "BF16".
        start, stop: the bytes in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def safetensors_entries(path: str | Path) -> dict[str, SafetensorsEntry]:
    """name -> entry of the weights in the ``*.safetensors`` files of the folder ``path``, from their headers.

    A header is 8 bytes of length and JSON: {name: {"dtype": .., "shape": [..], "data_offsets": [..]}, ..}.

    Raises:
        ValueError: a file is damaged.
    """
    entries: dict[str, SafetensorsEntry] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > _MAX_HEADER_BYTES:
                    raise ValueError(f"its header would have {length} bytes")
                header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
                    shape = tuple(int(size) for size in entry["shape"])
                    entries[name] = SafetensorsEntry(file.name, str(entry["dtype"]), shape, start, stop)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            raise ValueError(f"{file} is damaged: its header cannot be read ({error}). Download it again") from None
    return entries


def read_value(path: str | Path, metadata: Metadata, name: str, value_type: type[Value]) -> Value:
    """The number or string ``name`` of the checkpoint ``path``; ValueError if it is missing, unreadable or not of
    ``value_type``."""
    entry = (metadata.storage_data or {}).get(MetadataIndex(name))
    damaged = f"the checkpoint {path} is damaged: its {name} cannot be read"
    fix = "restore it, or give another checkpoint with checkpoint.load_step"
    if entry is None:
        raise ValueError(f"{damaged} (it is missing); {fix}")
    file, length = Path(path) / str(entry.relative_path), int(entry.length)
    if file.parent != Path(path) or not 0 <= length <= _MAX_VALUE_BYTES or entry.offset < 0:
        raise ValueError(f"{damaged} (its location is invalid: {length} bytes of {file}); {fix}")
    try:
        with file.open("rb") as stream:
            stream.seek(entry.offset)
            value = torch.load(io.BytesIO(stream.read(length)), weights_only=True)
        if type(value) is not value_type:
            raise TypeError(f"a {type(value).__name__} where {value_type.__name__} is expected")
        return value
    except Exception as error:  # unpickling damaged bytes can raise any exception
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{damaged} ({type(error).__name__}: {reason}); {fix}") from None
