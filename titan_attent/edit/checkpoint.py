"""The weights of one checkpoint, read box by box: of DCP, whatever number of ranks wrote it, or of safetensors files.

Only the model's tensors are weights: torchtitan puts them at the top level of what it saves, and the optimizer and all
other states below a name of their own, so none of those is ever read.

Cost: the metadata, and five small reads per shard when its tensor is first read.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from titan_attent.data.run_record import read_run_record
from titan_attent.data.text.json_tokenizer import KIND
from titan_attent.edit import stored_tensor
from titan_attent.edit.boxes import Box
from titan_attent.edit.pieces import OpenFiles, Piece, covers, read_box
from titan_attent.edit.storage import Folder, Slice, is_remote
from titan_attent.titan.checkpoint_metadata import METADATA_FILE, parse_metadata

RECORD_FILE = "edit.json"
"""What an edit records in its output (provenance.py)."""
_LEVELS_ABOVE = 3
"""Folders above a step folder in which the record of its run is looked for."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(ABC):
    """Weights that can be read in parts. Picklable.

    Attributes:
        path: as the user gave it.
        weights: name -> shape and dtype, in the order of the names.
        sha256: of the file that identifies the checkpoint: ``.metadata``, or the headers of all safetensors files.
        tokenizer: what its run recorded of its tokenizer, for a comparison; empty if nothing.
    """

    path: str
    weights: Mapping[str, Weight]
    sha256: str
    tokenizer: str

    @abstractmethod
    def read(self, name: str, box: Box) -> Tensor:
        """The elements of ``box``, a run of the tensor in row-major order, in the stored dtype on the CPU."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was read from the system's cache."""


class DcpCheckpoint(Checkpoint):
    """A checkpoint of torch.distributed.checkpoint in the folder ``path``.

    Raises:
        ValueError: it is not a finished checkpoint, holds no weights, is damaged, or was written with an extension.
    """

    def __init__(self, path: str):
        self.path, self._folder = path, Folder(path)
        content = _metadata_bytes(self._folder)
        self.sha256 = hashlib.sha256(content).hexdigest()
        metadata = parse_metadata(content, path)
        self.tokenizer = _tokenizer_of(self._folder)
        entries = _weights_of(metadata, path)
        self.weights = {name: Weight(tuple(one.size), one.properties.dtype) for name, one in sorted(entries.items())}
        self._pieces = {name: _pieces_of(name, one, metadata, path) for name, one in entries.items()}
        self._lengths = _check_files(self._folder, self._pieces, metadata)
        self._files = OpenFiles(path, self._folder.open)

    def __reduce__(self) -> Any:
        return DcpCheckpoint, (self.path,)

    def read(self, name: str, box: Box) -> Tensor:
        if name in self._lengths:  # the shards of this tensor are located at its first box
            lengths = self._lengths[name]
            self._pieces[name] = [self._located(name, *one) for one in zip(self._pieces[name], lengths, strict=True)]
            del self._lengths[name]
        return read_box(self._pieces[name], box, self.weights[name].dtype, self._files)

    def forget(self) -> None:
        self._files.forget()

    def _located(self, name: str, piece: Piece, length: int) -> Piece:
        stored = self._find(name, piece, length)
        weight, shape = self.weights[name], tuple(stop - start for start, stop in piece.box)
        if stored.dtype != weight.dtype or stored.shape != shape:
            raise ValueError(
                f"the checkpoint {self.path} is damaged: {name} is {stored.dtype} {list(stored.shape)} in "
                f"{piece.file}, and {weight.dtype} {list(shape)} in its .metadata. Restore it"
            )
        strides = None if stored.is_row_major else stored.strides
        return replace(piece, start=piece.start + stored.start, strides=strides)

    def _find(self, name: str, piece: Piece, length: int) -> stored_tensor.StoredTensor:
        try:
            return stored_tensor.find(Slice(self._files.stream(piece.file), piece.start, length))
        except ValueError as error:
            raise ValueError(
                f"the checkpoint {self.path} is damaged: {name} cannot be read from {piece.file} ({error}). Restore it"
            ) from None


def _metadata_bytes(folder: Folder) -> bytes:
    try:
        return folder.read(METADATA_FILE)
    except OSError:
        pass
    path, steps = Path(folder.path), []
    if not is_remote(folder.path) and path.is_dir():
        steps = [file.parent for file in (*path.glob("step-*/.metadata"), *path.glob("*/step-*/.metadata"))]
    if steps:
        latest = max(steps, key=lambda step: (len(step.name), step.name))
        raise ValueError(f"{path} contains checkpoints but is not one itself: give one of them, such as {latest}")
    if not is_remote(folder.path) and not path.exists():
        raise ValueError(f"{path} does not exist: {_path_that_is_meant(path)}")
    raise ValueError(
        f"{folder.path} is neither a finished DCP checkpoint (it has no .metadata) nor a folder of *.safetensors: give "
        "a step folder that torchtitan wrote, such as outputs/checkpoint/step-1000"
    )


def _path_that_is_meant(path: Path) -> str:
    """What to do about a missing path: a coefficient may be attached to it, or its run may have saved other steps."""
    attached = re.match(r"([0-9]*[.]?[0-9]+)[*]?\s*(?=[^0-9])(.+)", str(path))
    if attached and Path(attached[2]).exists():
        return f"write the coefficient as an argument of its own, {attached[1]} {attached[2]}"
    beside = sorted(path.parent.glob("step-*/.metadata"), key=lambda file: (len(file.parent.name), file.parent.name))
    names = [file.parent.name for file in beside]
    if not names:
        return "check the path"
    return f"beside it are {', '.join(names if len(names) <= 8 else [*names[:3], '..', *names[-3:]])}"


def _weights_of(metadata: Metadata, path: str) -> dict[str, TensorStorageMetadata]:
    """The tensors at the top level of what was saved."""
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    entries = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and len(paths.get(name, (name,))) == 1
    }
    if not entries:
        below = sorted({str(one[0]) for one in paths.values()})
        found = f"its tensors are below {', '.join(below[:4])}" if below else "it has none"
        raise ValueError(
            f"the checkpoint {path} has no weights at its top level, where torchtitan saves them: {found}. Save the "
            "model's state dict itself"
        )
    return entries


def _pieces_of(name: str, entry: TensorStorageMetadata, metadata: Metadata, path: str) -> list[Piece]:
    """The shards of a tensor, each with the start of its archive."""
    pieces = []
    for chunk in entry.chunks:
        info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise ValueError(f"the checkpoint {path} is damaged: .metadata does not say where {name} is. Restore it")
        if info.transform_descriptors:
            raise ValueError(
                f"the checkpoint {path} was written with the DCP extension {', '.join(info.transform_descriptors)}, "
                "which titan_attent.edit does not read: save it again without extensions"
            )
        box = tuple((start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        pieces.append(Piece(box, info.relative_path, info.offset))
    if not covers(pieces, entry.size):
        raise ValueError(f"the checkpoint {path} is damaged: its shards do not make up {name}. Restore it")
    return pieces


def _check_files(folder: Folder, pieces: Mapping[str, list[Piece]], metadata: Metadata) -> dict[str, list[int]]:
    """Refuse missing and truncated files and paths outside the folder. Returns the lengths of all archives."""
    lengths: dict[str, list[int]] = {}
    needed: dict[str, int] = {}
    for name, of_tensor in pieces.items():
        lengths[name] = []
        for piece in of_tensor:
            info = metadata.storage_data[MetadataIndex(name, [start for start, _ in piece.box])]
            lengths[name].append(info.length)
            needed[piece.file] = max(needed.get(piece.file, 0), info.offset + info.length)
            if info.offset < 0 or info.length < 0 or Path(piece.file).name != piece.file:
                raise ValueError(
                    f"the checkpoint {folder.path} is damaged: the location of {name} is invalid ({info.length} bytes "
                    f"of {piece.file}). Restore it"
                )
    for file, size in needed.items():
        try:
            stored = folder.size(file)
        except OSError as error:
            raise ValueError(f"the checkpoint {folder.path} is damaged: {file} is missing ({error})") from None
        if stored < size:
            raise ValueError(
                f"the checkpoint {folder.path} is damaged: {file} has {stored:,} bytes, and .metadata needs {size:,}"
            )
    return lengths


def _tokenizer_of(folder: Folder) -> str:
    """What the run of a checkpoint, or the edit that wrote it, recorded of its tokenizer."""
    if folder.has(RECORD_FILE):
        try:
            return str(json.loads(folder.read(RECORD_FILE)).get("tokenizer", ""))
        except (OSError, ValueError, AttributeError):
            return ""
    if is_remote(folder.path):
        return ""
    for above in list(Path(folder.path).absolute().parents)[:_LEVELS_ABOVE]:
        recorded = read_run_record(above).measured.get("tokenizer")
        if isinstance(recorded, str):  # "name, 512 ids, 1a2b3c4d": equal ids do not need equal names
            name, *facts = recorded.rsplit(", ", 2)
            return f"{KIND} {facts[-1]}" if name == KIND and facts else ", ".join(facts)
    return ""
