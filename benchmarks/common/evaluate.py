"""The loss and the accuracy of a llama's weights on documents, without torchtitan's trainer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.edit.checkpoint import Checkpoint, DcpCheckpoint
from titan_attent.edit.combine import Combination
from titan_attent.losses.cross_entropy import IGNORE_INDEX

ROWS = 50
"""Rows of a forward pass."""


class Measured(NamedTuple):
    """Means over labels: the share to which the largest logit belongs, each behind the true tokens; and the loss."""

    accuracy: float
    loss: float


def whole_weights(source: Checkpoint | Combination) -> dict[str, Tensor]:
    """name -> the whole weight."""
    return {
        name: source.read(name, tuple((0, size) for size in weight.shape)) for name, weight in source.weights.items()
    }


def load_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """name -> the whole weight of a DCP checkpoint."""
    return whole_weights(DcpCheckpoint(str(checkpoint)))


def evaluate(weights: Mapping[str, Tensor], data: str, *, flavor: str, seq_len: int) -> Measured:
    """Measure weights, name -> values in fp32, of a llama3 of ``flavor`` on the documents of ``data``."""
    from torchtitan.models.llama3.model.model import Transformer

    from titan_attent.titan.models.flavors import EXTRA_FLAVORS

    args: Any = EXTRA_FLAVORS["llama3"][flavor]
    vocab_size = len(weights["tok_embeddings.weight"])
    model = Transformer(replace(args, max_seq_len=seq_len, vocab_size=vocab_size)).eval()
    model.load_state_dict(dict(weights), strict=False)
    if missing := {name for name, _ in model.named_parameters()} - weights.keys():
        raise ValueError(f"the weights lack {sorted(missing)}")
    dataset = DocumentDataset(data, seq_len=seq_len)
    right, total, nats = 0, 0, 0.0
    with torch.no_grad():
        for ids in torch.arange(len(dataset)).split(ROWS):
            columns, labels = dataset.read(ids)
            counts = labels != IGNORE_INDEX
            logits, labels = model(columns["input"])[counts], labels[counts]
            right += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
            nats += float(cross_entropy(logits, labels, reduction="sum"))
    return Measured(right / total, nats / total)
