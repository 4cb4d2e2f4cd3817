"""The candidates of a round, cut over the ranks by their place in the pool, beside what the owners know of them.

What is kept of an example is sharded by its id. A pool of all examples is cut the same way, and nothing travels. A pool
that is a stretch of the shuffled order is cut by place, so that every rank decides on an equal part of it; ``fetch``
brings what the owners know to the places, ``store`` brings what was decided back.

Cost of a stretch of P places: 4 bytes a value and place on the wire in either direction, in blocks that bound the
memory; every rank evaluates the order at all P places. Nothing here depends on N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from titan_attent.data.order import Pool
from titan_attent.sharding import ExampleSharding

_BLOCK = 1 << 20


class Candidates:
    """The places of ``pool`` over the ranks of ``owners``.

    Args:
        pool: the candidates.
        owners: who keeps which example.
        sharding: the cut of the places: ``owners`` for all examples, else one of ``pool.size`` over the same mesh.

    Attributes:
        ids: int64 [num_local], the examples at this rank's places.
    """

    def __init__(self, pool: Pool, *, owners: ExampleSharding, sharding: ExampleSharding, device: torch.device):
        assert sharding.num_examples == pool.size
        self.pool, self.owners, self.sharding, self.device = pool, owners, sharding, device
        self.ids = pool.ids(sharding.local_ids(device))

    def fetch(self, values: list[Tensor]) -> list[Tensor]:
        """Tensors of 4 bytes an element, each [owners.num_local] -> the same of this rank's places. A collective."""
        if self.pool.order is None:
            return values
        # Bits: one owner has them and the others add zeros, so the sum is exact.
        kept = torch.stack([torch.cat((value, value.new_zeros(1))).view(torch.int32) for value in values])
        here = []
        for first, last in self._blocks(self.pool.size):
            index = self.owners.local_index(self._ids(first, last), elsewhere=self.owners.num_local)
            bits = self.owners.sum(kept[:, index])
            start, stop = max(first, self.sharding.start), min(last, self.sharding.stop)
            if start < stop:
                here.append(bits[:, start - first : stop - first])
        fetched = torch.cat(here, dim=1) if here else kept[:, :0]
        return [bits.contiguous().view(value.dtype) for bits, value in zip(fetched, values, strict=True)]

    def store(self, targets: list[Tensor], values: list[Tensor]) -> None:
        """The reverse: write this rank's values of its places into the owners' ``targets``. A collective."""
        if self.pool.order is None:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
            return
        chunk = self.sharding.chunk
        bits = torch.zeros(len(values), chunk, dtype=torch.int32, device=self.device)
        bits[:, : self.sharding.num_local] = torch.stack([value.view(torch.int32) for value in values])
        for first, last in self._blocks(chunk):
            gathered, _ = self.owners.gather(bits[:, first:last].contiguous())
            for rank in range(self.owners.size):
                start, stop = self.sharding.range_of(rank)
                ids = self._ids(min(start + first, stop), min(start + last, stop))
                mine = (ids >= self.owners.start) & (ids < self.owners.stop)
                for target, part in zip(targets, gathered[rank], strict=True):
                    target[ids[mine] - self.owners.start] = part[: len(ids)][mine].view(target.dtype)

    def _ids(self, first: int, last: int) -> Tensor:
        return self.pool.ids(torch.arange(first, last, dtype=torch.int64, device=self.device))

    @staticmethod
    def _blocks(size: int) -> Iterator[tuple[int, int]]:
        return ((first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK))
