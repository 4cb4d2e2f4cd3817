"""Thousands of ranks that are not there: the real code as one rank of many, and counts of what it asks for.

The other ranks are made up: each holds what this one holds. A sum over 64-bit integers, which are counts, is this
rank's times the number of ranks; other sums are of values that one rank has and the others add zeros to, and where
this rank has none they are those of another example. A gather repeats this rank's part. Nothing is timed: operators,
host syncs, collectives and bytes are counted, and do not depend on the machine.
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
    """A one-dimensional mesh, as much of it as the package reads."""

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
    """While active, collectives over a :class:`SyntheticMesh` are answered as above.

    Attributes:
        num_operators: calls of torch's operators, but for those that only look at a tensor in another way.
        syncs: what on an accelerator would make the host wait, by name.
        collectives: by name.
        received: bytes that reach this rank in ring algorithms.
        ranks_asked_for: how often the part of a single rank was looked up: a loop over the ranks asks once for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.received = self.ranks_asked_for = 0
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
        def asked(sharding: ExampleSharding, rank: int) -> tuple[int, int]:
            self.ranks_asked_for += 1
            return stock(sharding, rank)

        return asked

    def _all_reduce(self, x: Tensor, *, op: Any, group: SyntheticMesh) -> None:
        self.collectives["max" if op == dist.ReduceOp.MAX else "sum"] += 1
        self.received += 2 * (group.num_ranks - 1) * x.nbytes // group.num_ranks
        self._answering = True
        if op == dist.ReduceOp.SUM and x.dtype == torch.int64:
            x *= group.num_ranks
        elif op == dist.ReduceOp.SUM and x.ndim == 2:
            here = (x != 0).any(dim=0).nonzero().flatten()
            if len(here):
                x.copy_(x[:, here[torch.arange(x.shape[1]) % len(here)]])
        self._answering = False

    def _all_gather(self, out: Tensor, x: Tensor, *, group: SyntheticMesh, async_op: bool) -> None:
        assert not async_op
        self.collectives["gather"] += 1
        self.received += out.nbytes - x.nbytes
        self._answering = True
        out.view(group.num_ranks, -1).copy_(x.expand(group.num_ranks, -1))
        self._answering = False
