"""The candidates of a round, cut over the ranks by their place in the pool, beside what the owners know of them.

What is kept of an example is sharded by its id. A pool of all examples is cut the same way, and nothing travels. A pool
that is a stretch of the shuffled order is cut by place, so that every rank decides on an equal part of it; ``fetch``
brings what the owners know to the places, ``store`` brings what was decided back.

Cost of a stretch of P places: 4 bytes a value and place on the wire in either direction, in blocks of as many places
for any number of ranks, which bound the memory; every rank evaluates the order at all P places once, and keeps 24 bytes
a place / ranks. Nothing here depends on N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.records import Records

_BLOCK = 1 << 20


@dataclass(frozen=True)
class PoolRecords:
    """What the owners know of this rank's candidates, [num_local] each."""

    records: Records
    last_draw: Tensor
    expert: Tensor | None = None
    amateur: Tensor | None = None
    streak: Tensor | None = None
    start: Tensor | None = None


class Candidates:
    """The places of ``pool`` over the ranks of ``owners``.

    Args:
        pool: the candidates.
        owners: who keeps which example.
        sharding: the cut of the places: ``owners`` for all examples, else one of ``pool.size`` over the same mesh.
    """

    def __init__(self, pool: Pool, *, owners: ExampleSharding, sharding: ExampleSharding, device: torch.device):
        assert sharding.num_examples == pool.size
        self.pool, self.owners, self.sharding, self.device = pool, owners, sharding, device
        if pool.order is None:
            return
        # The places in each block whose examples this rank owns, and where it keeps them; the ids at its own places.
        self._kept: list[tuple[Tensor, Tensor]] = []
        ids_here = []
        for first, last in _blocks(pool.size, _BLOCK):
            ids = pool.ids(torch.arange(first, last, dtype=torch.int64, device=device))
            places = ((ids >= owners.start) & (ids < owners.stop)).nonzero().flatten()
            self._kept.append((places, ids[places] - owners.start))
            ids_here.append(ids[max(0, sharding.start - first) : max(0, sharding.stop - first)].clone())
        self._ids = torch.cat(ids_here)

    def ids_at(self, block: slice) -> Tensor:
        """int64 [n], the examples at a stretch of this rank's places."""
        if self.pool.order is not None:
            return self._ids[block]
        start, stop, _ = block.indices(self.sharding.num_local)
        first = self.sharding.start
        return torch.arange(first + start, first + stop, dtype=torch.int64, device=self.device)

    def ids_of(self, places: Tensor) -> Tensor:
        """int64 [n], each in [0, sharding.num_local) -> int64 [n], the examples there."""
        return places + self.sharding.start if self.pool.order is None else self._ids[places]

    def fetch(self, values: list[Tensor]) -> list[Tensor]:
        """Tensors of 4 bytes an element, each [owners.num_local] -> the same of this rank's places. A collective.

        Where the pool is all examples, nothing is copied.
        """
        if self.pool.order is None:
            return values
        here: list[Tensor] = []
        for (first, last), (places, kept) in zip(_blocks(self.pool.size, _BLOCK), self._kept, strict=True):
            # Bits: one owner has them and the others add zeros, so the sum is exact.
            bits = torch.zeros(len(values), last - first, dtype=torch.int32, device=self.device)
            for row, value in zip(bits, values, strict=True):
                row[places] = value.view(torch.int32)[kept]
            start, stop = max(0, self.sharding.start - first), max(0, self.sharding.stop - first)
            here.append(self.owners.sum(bits)[:, start:stop].clone())
        fetched = torch.cat(here, dim=1)
        return [bits.view(value.dtype) for bits, value in zip(fetched, values, strict=True)]

    def store(self, targets: list[Tensor], values: list[Tensor]) -> None:
        """The reverse: write this rank's values of its places into the owners' ``targets``. A collective."""
        if self.pool.order is None:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
            return
        chunk, num_ranks = self.sharding.chunk, self.owners.size
        places = torch.cat([places + i * _BLOCK for i, (places, _) in enumerate(self._kept)])
        kept = torch.cat([kept for _, kept in self._kept])
        rank, place = places // chunk, places % chunk
        bits = torch.zeros(len(values), chunk, dtype=torch.int32, device=self.device)
        for row, value in zip(bits, values, strict=True):
            row[: self.sharding.num_local] = value.view(torch.int32)
        for first, last in _blocks(chunk, max(1, _BLOCK // num_ranks)):
            gathered, _ = self.owners.gather(bits[:, first:last].contiguous())
            mine = ((place >= first) & (place < last)).nonzero().flatten()
            picked = gathered[rank[mine], :, place[mine] - first]  # [n, values]
            for target, column in zip(targets, picked.unbind(dim=1), strict=True):
                target[kept[mine]] = column.contiguous().view(target.dtype)


def _blocks(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, size)) for first in range(0, size, step))
