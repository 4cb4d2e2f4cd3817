"""The candidates of a round, sharded over the ranks by slot, and the exchange with the owners of the examples.

The data of an example is sharded by its id. A pool of all examples is sharded in the same way, and nothing is sent. A
pool that is a span of the shuffled order is sharded by slot, so that every rank decides on as many candidates.
``fetch`` brings the owners' data to the slots, ``store`` brings the decisions back to the owners.

Cost of a span of P slots: 4 bytes per value and slot on the wire in either direction. Blocks of a fixed number of
slots, for any number of ranks, bound the memory. Every rank evaluates the order at all P slots once, and keeps 24 bytes
per slot / ranks. Nothing here depends on N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.records import Records
from titan_attent.systems.teaching.tokens import Tokens

_BLOCK = 1 << 20


@dataclass(frozen=True)
class PoolRecords:
    """The owners' data about this rank's candidates, [num_local] each."""

    records: Records
    last_draw: Tensor
    expert: Tensor | None = None
    amateur: Tensor | None = None
    streak: Tensor | None = None
    start: Tensor | None = None


class Candidates:
    """The slots of ``pool``, sharded over the ranks of ``owners``.

    Args:
        pool: the candidates.
        owners: which rank owns which example.
        sharding: how the slots are sharded: ``owners`` for all examples, else a sharding of ``pool.size`` slots over
            the same mesh.
        tokens: tokens of the candidates; None if all are equally long.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        owners: ExampleSharding,
        sharding: ExampleSharding,
        device: torch.device,
        tokens: Tokens | None = None,
    ):
        assert sharding.num_examples == pool.size
        self.pool, self.owners, self.sharding, self.device = pool, owners, sharding, device
        self.tokens = tokens
        if pool.order is None:
            return
        # For each block: the slots whose examples this rank owns, and the index of each in this rank's shard.
        self._owned: list[tuple[Tensor, Tensor]] = []
        local_ids = []
        for first, last in _blocks(pool.size, _BLOCK):
            ids = pool.ids(torch.arange(first, last, dtype=torch.int64, device=device))
            slots = ((ids >= owners.start) & (ids < owners.stop)).nonzero().flatten()
            self._owned.append((slots, ids[slots] - owners.start))
            local_ids.append(ids[max(0, sharding.start - first) : max(0, sharding.stop - first)].clone())
        self._ids = torch.cat(local_ids)

    def ids_at(self, block: slice) -> Tensor:
        """int64 [n], the example ids in a block of this rank's slots."""
        if self.pool.order is not None:
            return self._ids[block]
        start, stop, _ = block.indices(self.sharding.num_local)
        first = self.sharding.start
        return torch.arange(first + start, first + stop, dtype=torch.int64, device=self.device)

    def ids_of(self, slots: Tensor) -> Tensor:
        """Local slots, int64 [n], each in [0, sharding.num_local) -> the example ids in them, int64 [n]."""
        return slots + self.sharding.start if self.pool.order is None else self._ids[slots]

    def fetch(self, values: list[Tensor]) -> list[Tensor]:
        """Tensors of 4-byte elements, each [owners.num_local] -> the same tensors for this rank's slots. A collective.

        Nothing is copied if the pool is all examples.
        """
        if self.pool.order is None:
            return values
        local: list[Tensor] = []
        for (first, last), (slots, index) in zip(_blocks(self.pool.size, _BLOCK), self._owned, strict=True):
            # One owner adds the bits of a value and all other ranks add zeros, so the sum is exact.
            bits = torch.zeros(len(values), last - first, dtype=torch.int32, device=self.device)
            for row, value in zip(bits, values, strict=True):
                row[slots] = value.view(torch.int32)[index]
            start, stop = max(0, self.sharding.start - first), max(0, self.sharding.stop - first)
            local.append(self.owners.sum(bits)[:, start:stop].clone())
        fetched = torch.cat(local, dim=1)
        return [bits.view(value.dtype) for bits, value in zip(fetched, values, strict=True)]

    def store(self, targets: list[Tensor], values: list[Tensor]) -> None:
        """The reverse of :meth:`fetch`: write this rank's values of its slots into the owners' ``targets``. A
        collective.
        """
        if self.pool.order is None:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
            return
        chunk, num_ranks = self.sharding.chunk, self.owners.size
        slots = torch.cat([slots + i * _BLOCK for i, (slots, _) in enumerate(self._owned)])
        index = torch.cat([index for _, index in self._owned])
        rank, local_slot = slots // chunk, slots % chunk
        bits = torch.zeros(len(values), chunk, dtype=torch.int32, device=self.device)
        for row, value in zip(bits, values, strict=True):
            row[: self.sharding.num_local] = value.view(torch.int32)
        for first, last in _blocks(chunk, max(1, _BLOCK // num_ranks)):
            gathered, _ = self.owners.gather(bits[:, first:last].contiguous())
            in_block = ((local_slot >= first) & (local_slot < last)).nonzero().flatten()
            owned = gathered[rank[in_block], :, local_slot[in_block] - first]  # [n, values]
            for target, column in zip(targets, owned.unbind(dim=1), strict=True):
                target[index[in_block]] = column.contiguous().view(target.dtype)


def _blocks(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, size)) for first in range(0, size, step))
