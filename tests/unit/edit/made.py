"""Small checkpoints that the tests of edits read, and plain whole-model readings of what edits write."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SHAPES = {
    "layers.0.attention.wq.weight": (12, 8),
    "layers.0.feed_forward.w1.weight": (6, 20),
    "layers.1.attention.wq.weight": (12, 8),
    "layers.1.moe.experts.w1": (3, 5, 7),
    "norm.weight": (8,),
    "temperature": (),
}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {"tokens_per_expert": torch.full((3,), seed)}


def save(path: Path, tensors: dict[str, Any]) -> Path:
    """A checkpoint as torchtitan writes it: the weights at the top level, other states below their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=path, no_dist=True)
    return path


def load(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by torch's own reader."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
