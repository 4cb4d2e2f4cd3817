"""The weights of a folder of ``*.safetensors`` under torchtitan's names, read as the other operands of an edit.

torchtitan's StateDictAdapter of the family converts them (titan/hugging_face.py). Which weights it needs for one of
torchtitan's is found beforehand, on the meta device. Most are the file's bytes, which are read box by box. Those that
it reorders (the rows of queries and keys) or joins (experts) are converted whole, and kept while their boxes are read.

Cost: the headers, the conversion of all names on the meta device; memory of one converted weight.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.text.json_tokenizer import JSON_FILE, KIND
from titan_attent.edit.boxes import Box, boxes, within
from titan_attent.edit.checkpoint import Checkpoint, Weight
from titan_attent.edit.memory import empty
from titan_attent.edit.pieces import OpenFiles, Piece, read_box
from titan_attent.edit.storage import Folder
from titan_attent.titan.checkpoint_metadata import SafetensorsEntry, safetensors_entries

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""The format's names of dtypes. Quantized weights (F8 ..) need their scales, which an edit does not apply."""


class HuggingFaceCheckpoint(Checkpoint):
    """The weights of the folder ``path``, for the model ``flavor`` of ``family``.

    Raises:
        ValueError: the family or flavor is missing, unknown or has no adapter; a file is damaged; or the weights are
            not those of the family.
    """

    def __init__(self, path: str, *, family: str, flavor: str):
        self.path, self._family, self._flavor = path, family, flavor
        from titan_attent.titan.hugging_face import adapter_of  # imports torchtitan, which other edits do not need

        self._adapter = adapter_of(path, family=family, flavor=flavor)
        self._entries = safetensors_entries(path)
        _check_entries(path, self._entries)
        self.sha256 = hashlib.sha256(repr(sorted(self._entries.items())).encode()).hexdigest()
        tokenizer = Path(path) / JSON_FILE
        self.tokenizer = ""
        if tokenizer.is_file():
            self.tokenizer = f"{KIND} {hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:8]}"
        self._files = OpenFiles(path, Folder(path).open)
        self._meta = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in self._entries.items()
        }
        converted = self._convert(self._meta)
        self.weights = {name: Weight(tuple(one.shape), one.dtype) for name, one in sorted(converted.items())}
        files = {id(tensor): name for name, tensor in self._meta.items()}
        self._plain = {name: files[id(one)] for name, one in converted.items() if id(one) in files}
        self._converted: tuple[str, Tensor] | None = None

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self._family, self._flavor)

    def read(self, name: str, box: Box) -> Tensor:
        if name in self._plain:
            return self._read_stored(self._plain[name], box)
        if self._converted is None or self._converted[0] != name:
            self._converted = None  # its memory is for the next one
            self._converted = name, self._convert_weight(name)
        part = self._converted[1][within(box, tuple((0, size) for size in self.weights[name].shape))]
        return empty(part.shape, part.dtype).copy_(part)  # a view would hold, and torch.save would write, all of it

    def forget(self) -> None:
        self._files.forget()

    def _read_stored(self, name: str, box: Box) -> Tensor:
        entry = self._entries[name]
        piece = Piece(tuple((0, size) for size in entry.shape), entry.file, entry.start)
        return read_box([piece], box, DTYPES[entry.dtype], self._files)

    def _convert_weight(self, name: str) -> Tensor:
        """A weight of torchtitan from those of the files that it is made of."""
        weight = self.weights[name]
        sources = self._adapter.to_hf({name: torch.empty(weight.shape, dtype=weight.dtype, device="meta")})
        # Some adapters look for the embeddings whatever they convert.
        others = {other: tensor for other, tensor in self._meta.items() if not any(map(str.isdigit, other))}
        stored = {source: self._read_whole(source) for source in sources}
        return self._convert(others | stored)[name].contiguous()

    def _read_whole(self, name: str) -> Tensor:
        shape = self._entries[name].shape
        whole = torch.empty(shape, dtype=DTYPES[self._entries[name].dtype])
        for box in boxes(shape):
            whole[within(box, tuple((0, size) for size in shape))] = self._read_stored(name, box)
        return whole

    def _convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._adapter.from_hf(dict(tensors))
        except (KeyError, AssertionError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{self.path} does not hold the weights of {self._family} {self._flavor}: torchtitan's adapter cannot "
                f"convert them ({type(error).__name__}: {error}). Check --family and --flavor"
            ) from None


def _reopen(path: str, family: str, flavor: str) -> HuggingFaceCheckpoint:
    return HuggingFaceCheckpoint(path, family=family, flavor=flavor)


def _check_entries(path: str, entries: dict[str, SafetensorsEntry]) -> None:
    if not entries:
        raise ValueError(f"{path} has no weights: its *.safetensors are missing or empty")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name} is {entry.dtype}: quantized weights cannot be combined; give weights in bfloat16"
            )
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.stop - entry.start != size or (Path(path) / entry.file).stat().st_size < entry.stop:
            raise ValueError(f"{path} is damaged: {entry.file} does not hold all of {name}. Download it again")
