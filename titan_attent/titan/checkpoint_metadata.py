"""A look at a checkpoint without running what is in it.

Checkpoints of torch.distributed.checkpoint are Python pickles: opening one runs what its writer put there. The checks
before a run look at ``.metadata`` and at single values only, and here an allowed list decides which classes these may
be made of. Loading the checkpoint itself has no such guard: :data:`TRUSTED`.

Cost: one file, some 300 bytes per parameter tensor and shard.
"""

import importlib
import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

TRUSTED = (
    "checkpoints are Python pickles, which can run any program of whoever wrote them: open only those of people that "
    "you trust"
)

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
_PLAIN = (torch.dtype, torch.layout, torch.memory_format)
_MOST_BYTES = 2**24
"""Of one value: those that are looked at are a few hundred."""


Kind = TypeVar("Kind")


class _Refused(Exception):
    """A class that metadata has no use for."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # Python 3.13's name of it
        if name in ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), _PLAIN):
            return found
        raise _Refused(f"{module}.{name}")


def read_metadata(path: str | Path) -> Metadata:
    """What the checkpoint in the folder ``path`` holds.

    Raises:
        ValueError: it has no metadata, is damaged, is of a torch that this one cannot read, or holds a class that no
            checkpoint has.
    """
    file = Path(path) / ".metadata"
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except OSError as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}") from None
    except _Refused as refused:
        raise ValueError(
            f"{file} holds {refused}, which is no part of a checkpoint's metadata: it was tampered with, or written by "
            f"a later torch than {torch.__version__}. Do not open it unless you know who wrote it; {TRUSTED}"
        ) from None
    except Exception as error:  # whatever unpickling runs into
        raise ValueError(_unreadable(path, error)) from None
    if not _is_whole(metadata):
        raise ValueError(f"{file} is no checkpoint's metadata: it is damaged; restore it, or give another checkpoint")
    return metadata


def _is_whole(metadata: Any) -> bool:
    """Whether its fields are of the types that they have in a checkpoint's metadata."""
    try:
        names, places = metadata.state_dict_metadata, metadata.storage_data or {}
        sizes = [entry.size for entry in names.values() if isinstance(entry, TensorStorageMetadata)]
        return (
            isinstance(metadata, Metadata)
            and all(isinstance(name, str) for name in names)
            and all(isinstance(size, torch.Size) for size in sizes)
            and all(isinstance(place, MetadataIndex) for place in places)
            and all(isinstance(entry, _StorageInfo) and _is_place(entry) for entry in places.values())
        )
    except (AttributeError, TypeError):
        return False


def _is_place(entry: _StorageInfo) -> bool:
    return isinstance(entry.relative_path, str) and type(entry.offset) is int and type(entry.length) is int


def _unreadable(path: str | Path, error: Exception) -> str:
    if isinstance(error, (ValueError, AttributeError)) and ("to unpack" in str(error) or "attribute" in str(error)):
        return (
            f"the checkpoint {path} was written by a later torch than this one, {torch.__version__}, which cannot read "
            f"it ({error}): what torch 2.15 writes, 2.14 and older do not know. Go on under the torch that wrote it, "
            "or give another checkpoint"
        )
    return (
        f"the checkpoint {path} is damaged: its .metadata cannot be read ({type(error).__name__}: {error}). Restore "
        "it, or give another checkpoint with checkpoint.load_step"
    )


def shapes_of(metadata: Metadata, *, modules: Iterable[str]) -> dict[str, list[int]]:
    """name -> shape of the tensors below the names of ``modules``."""
    wanted = set(modules)
    return {
        name: list(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if name.partition(".")[0] in wanted and isinstance(entry, TensorStorageMetadata)
    }


def read_value(path: str | Path, metadata: Metadata, name: str, kind: type[Kind]) -> Kind:
    """A number or string of the checkpoint ``path`` by its name; ValueError if it is not there, not readable, or not of
    its ``kind``."""
    entry = (metadata.storage_data or {}).get(MetadataIndex(name))
    damaged = f"the checkpoint {path} is damaged: its {name} cannot be read"
    mend = "restore it, or give another checkpoint with checkpoint.load_step"
    if entry is None:
        raise ValueError(f"{damaged} (it is not there); {mend}")
    file, length = Path(path) / str(entry.relative_path), int(entry.length)
    if file.parent != Path(path) or not 0 <= length <= _MOST_BYTES or entry.offset < 0:
        raise ValueError(f"{damaged} (it would be {length} bytes of {file}); {mend}")
    try:
        with file.open("rb") as stream:
            stream.seek(entry.offset)
            value = torch.load(io.BytesIO(stream.read(length)), weights_only=True)
        if type(value) is not kind:
            raise TypeError(f"a {type(value).__name__} where {kind.__name__} is expected")
        return value
    except Exception as error:  # whatever unpickling runs into
        what = str(error).partition("\n")[0]
        raise ValueError(f"{damaged} ({type(error).__name__}: {what}); {mend}") from None
