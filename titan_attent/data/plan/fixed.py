"""A fixed list of examples in batches, for validation and scoring: the ranks together read each example once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.order import Pool
from titan_attent.losses.cross_entropy import IGNORE_INDEX


class FixedLoader:
    """The examples of ``pool`` in batches, equal at every iteration; the ranks together read each example once.

    All ranks get equally many batches, as unequal counts would hang FSDP. Rows that are missing at the end are padding,
    with ignored labels and the id N.
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
    ):
        self.dataset, self.pool, self.batch_size = dataset, pool, batch_size
        self.dp_rank, self.dp_world_size, self.reader = dp_rank, dp_world_size, reader
        self.num_batches = -(-pool.size // (batch_size * dp_world_size))

    def _read(self, slots: Tensor) -> ReadBatch:
        padding = slots >= self.pool.size
        ids = self.pool.ids(slots.clamp(max=self.pool.size - 1))
        inputs, labels = self.dataset.read(ids)
        labels[padding] = IGNORE_INDEX
        return {**inputs, "example_id": ids.masked_fill(padding, len(self.dataset))}, labels

    def __iter__(self) -> Iterator[ReadBatch]:
        rows = torch.arange(self.batch_size) + self.dp_rank * self.batch_size
        slots = (rows + batch * self.batch_size * self.dp_world_size for batch in range(self.num_batches))
        return self.reader.read(self._read, slots)
