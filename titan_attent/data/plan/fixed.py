"""A fixed list of examples in batches, for validation and scoring: the ranks together read each example once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.forward_rows import ForwardRows, Rows
from titan_attent.data.plan.order import Pool
from titan_attent.losses.cross_entropy import IGNORE_INDEX


class FixedLoader:
    """The examples of ``pool`` in batches, equal at every iteration; the ranks together read each example once.

    All ranks get equally many batches, as unequal counts would hang FSDP. Rows that are missing at the end are padding,
    with ignored labels and the id N.

    Args:
        batch_size: rows per rank.
        forward_rows: lays out documents in rows, which have other lengths and other numbers then, and the same number
            of tokens per batch at most. Iterating is a collective then. None for one example per row.
    """

    def __init__(
        self,
        dataset: Examples,
        pool: Pool,
        *,
        batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        reader: Reader,
        forward_rows: ForwardRows | None = None,
    ):
        self.dataset, self.pool, self.batch_size = dataset, pool, batch_size
        self.dp_rank, self.dp_world_size, self.reader = dp_rank, dp_world_size, reader
        self.forward_rows = forward_rows

    def num_tokens(self, labels: Tensor) -> int:
        """The tokens of a batch with these labels, padding included."""
        return labels.numel() if self.forward_rows else len(labels) * self.dataset.tokens_per_example

    def _read(self, slots: Tensor) -> ReadBatch:
        padding = slots >= self.pool.size
        ids = self.pool.ids(slots.clamp(max=self.pool.size - 1))
        inputs, labels = self.dataset.read(ids)
        labels[padding] = IGNORE_INDEX
        return {**inputs, "example_id": ids.masked_fill(padding, len(self.dataset))}, labels

    def _read_rows(self, rows: Rows) -> ReadBatch:
        documents: Any = self.dataset
        inputs, labels = documents.read(rows.ids, row_length=rows.length)
        return {**inputs, "example_id": rows.ids}, labels

    def __iter__(self) -> Iterator[ReadBatch]:
        if self.forward_rows is not None:
            batches = self.forward_rows.batches(self.pool, batch_size=self.batch_size)
            local = (rows.of_rank(self.dp_rank, self.dp_world_size) for rows in batches)
            return self.reader.read(self._read_rows, local)
        rows = torch.arange(self.batch_size) + self.dp_rank * self.batch_size
        num_batches = -(-self.pool.size // (self.batch_size * self.dp_world_size))
        slots = (rows + batch * self.batch_size * self.dp_world_size for batch in range(num_batches))
        return self.reader.read(self._read, slots)
