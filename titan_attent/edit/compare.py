"""Refuses checkpoints that cannot be combined: other weights, shapes, dtypes or tokenizers, each by name."""

from collections.abc import Sequence

import torch

from titan_attent.data.text.json_tokenizer import KIND
from titan_attent.edit.checkpoint import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that ``--dtype`` names."""
_SHOWN = 3


def check_same(checkpoints: Sequence[Checkpoint], *, converts: bool) -> None:
    """Refuse checkpoints whose weights differ from the first one's in anything but their values; ValueError.

    Args:
        converts: whether the user has named the dtype of the result, so that other float dtypes are accepted.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differences = [
            f"{name} is {_described(first, name)} in {first.path} and {_described(other, name)} in {other.path}"
            for name in sorted(first.weights.keys() | other.weights.keys())
            if not _agree(first, other, name, converts=converts)
        ]
        if differences:
            only_dtypes = all(_same_shape(first, other, name) for name in first.weights.keys() | other.weights.keys())
            fix = "Name the dtype of the result, such as --dtype float32" if only_dtypes else "They are of other models"
            more = f" (and {len(differences) - _SHOWN} more)" if len(differences) > _SHOWN else ""
            raise ValueError(f"{'; '.join(differences[:_SHOWN])}{more}. {fix}")
        if other.tokenizer and first.tokenizer and _kind(other) == _kind(first) and other.tokenizer != first.tokenizer:
            raise ValueError(
                f"{first.path} was trained with the tokenizer {first.tokenizer}, and {other.path} with "
                f"{other.tokenizer}: their embeddings are of other words. Combine checkpoints of one tokenizer"
            )


def without_tokenizer(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The checkpoints whose tokenizer cannot be compared with the first one's, because one has recorded none."""
    first = checkpoints[0]
    return [one.path for one in checkpoints if not one.tokenizer or _kind(one) != _kind(first)]


def _kind(checkpoint: Checkpoint) -> bool:
    """Hashes of ``tokenizer.json`` and of tiktoken's ranks are not comparable."""
    return checkpoint.tokenizer.startswith(KIND)


def _agree(first: Checkpoint, other: Checkpoint, name: str, *, converts: bool) -> bool:
    if not _same_shape(first, other, name):
        return False
    one, two = first.weights[name].dtype, other.weights[name].dtype
    return one == two or (converts and one.is_floating_point and two.is_floating_point)


def _same_shape(first: Checkpoint, other: Checkpoint, name: str) -> bool:
    known = name in first.weights and name in other.weights
    return known and first.weights[name].shape == other.weights[name].shape


def _described(checkpoint: Checkpoint, name: str) -> str:
    weight = checkpoint.weights.get(name)
    if weight is None:
        return "absent"
    return f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
