"""Runs the real code as one rank of thousands of synthetic ranks, and counts the operations of that rank.

The other ranks hold the same values as this rank. A sum of 64-bit integers, which are counts, is this rank's value
times the number of ranks. Other sums are of values that one rank owns, with zeros from the others; where this rank
owns none, the values of another example are used. A gather repeats this rank's tensor. Nothing is timed: operators,
host syncs, collectives and bytes are counted, which do not depend on the machine.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import titan_attent.foundations.sharding
from titan_attent.foundations.sharding import ExampleSharding

_SYNCS = ("cpu", "tolist")
_SYNCING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh")

_VIEWS = ("view", "slice", "select", "split", "unbind", "expand", "as_strided", "t", "transpose", "unsqueeze")


@dataclass(frozen=True)
class SyntheticMesh:
    """A one-dimensional mesh with the attributes that the package reads."""

    num_ranks: int
    rank: int = 1
    ndim: int = 1
    device_type: str = "cpu"

    def size(self) -> int:
        return self.num_ranks

    def get_local_rank(self) -> int:
        return self.rank

    def get_group(self) -> "SyntheticMesh":
        return self


class SyntheticRanks(TorchDispatchMode):
    """While active, collectives over a :class:`SyntheticMesh` return results as described above.

    Attributes:
        num_operators: calls of torch's operators, without views.
        syncs: number of calls that would be host syncs on an accelerator, by name.
        collectives: number of collectives, by name.
        received: bytes that reach this rank in ring algorithms.
        num_range_lookups: number of look-ups of the shard of one rank; a loop over the ranks makes one per rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.received = self.num_range_lookups = 0
        self.syncs: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self._answering = False
        self._patches = [mock.patch.object(Tensor, name, self._counted(name)) for name in _SYNCS]
        self._patches += [
            mock.patch.object(dist, "all_reduce", self._all_reduce),
            mock.patch.object(titan_attent.foundations.sharding, "_all_gather", self._all_gather),
            mock.patch.object(ExampleSharding, "range_of", self._range_of(ExampleSharding.range_of)),
        ]

    def __enter__(self) -> "SyntheticRanks":
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._answering:
            name = func.overloadpacket.__name__
            self.num_operators += name not in _VIEWS
            if name in _SYNCING_OPS:
                self.syncs[name] += 1
            if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.syncs["index by mask"] += 1
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._answering:
                self.syncs[name] += 1
            return method(tensor, *args, **kwargs)

        return call

    def _range_of(self, stock: Any) -> Callable[..., Any]:
        def counted(sharding: ExampleSharding, rank: int) -> tuple[int, int]:
            self.num_range_lookups += 1
            return stock(sharding, rank)

        return counted

    def _all_reduce(self, x: Tensor, *, op: Any, group: SyntheticMesh) -> None:
        self.collectives["max" if op == dist.ReduceOp.MAX else "sum"] += 1
        self.received += 2 * (group.num_ranks - 1) * x.nbytes // group.num_ranks
        self._answering = True
        if op == dist.ReduceOp.SUM and x.dtype == torch.int64:
            x *= group.num_ranks
        elif op == dist.ReduceOp.SUM and x.ndim == 2:
            owned = (x != 0).any(dim=0).nonzero().flatten()
            if len(owned):
                x.copy_(x[:, owned[torch.arange(x.shape[1]) % len(owned)]])
        self._answering = False

    def _all_gather(self, out: Tensor, x: Tensor, *, group: SyntheticMesh, async_op: bool) -> None:
        assert not async_op
        self.collectives["gather"] += 1
        self.received += out.nbytes - x.nbytes
        self._answering = True
        out.view(group.num_ranks, -1).copy_(x.expand(group.num_ranks, -1))
        self._answering = False
