"""Which rank owns which example, and the few collectives the package uses.

State per example (losses, weights) is a tensor over the N example ids. It is sharded over the ranks of one mesh
dimension as DTensor's ``Shard(0)`` does: ceil(N / ranks) ids per rank, the last ranks shorter or empty. The mesh is
torchtitan's ``batch`` mesh (dp_replicate x dp_shard), never WORLD: tensor- and pipeline-parallel peers hold equal
copies and take equal decisions. Without a mesh (one process) every collective is the identity.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# The name since torch 2.13, where the old name warns; torch 2.11 has only the old name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def is_first_rank() -> bool:
    """Whether this process is rank 0, which logs and writes files for all ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


class ExampleSharding:
    """The contiguous chunks of [0, num_examples) that the ranks of ``mesh`` own.

    Args:
        num_examples: N, at least 1.
        mesh: one-dimensional; None for a single process.

    Attributes:
        start, stop: this rank's ids are [start, stop); empty when there are more ranks than chunks.
        chunk: ids per full chunk, ceil(N / ranks).
    """

    def __init__(self, num_examples: int, *, mesh: DeviceMesh | None = None):
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, not {num_examples}: give the data set's length")
        if mesh is not None and mesh.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, not {mesh.ndim}: pass torchtitan's `batch` mesh")
        self.num_examples = num_examples
        self.mesh = mesh
        self.group = None if mesh is None else mesh.get_group()
        self.size = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_local_rank()
        self.chunk = -(-num_examples // self.size)
        self.start, self.stop = self.range_of(self.rank)

    def range_of(self, rank: int) -> tuple[int, int]:
        """The ids [start, stop) that ``rank`` of the mesh owns."""
        start = min(rank * self.chunk, self.num_examples)
        return start, min(start + self.chunk, self.num_examples)

    @property
    def num_local(self) -> int:
        return self.stop - self.start

    def local_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [num_local], this rank's ids in order."""
        return torch.arange(self.start, self.stop, dtype=torch.int64, device=device)

    def local_index(self, ids: Tensor, *, elsewhere: int) -> Tensor:
        """ids [n] -> their indices into this rank's shard; ``elsewhere`` for ids of other ranks. No host sync."""
        inside = (ids >= self.start) & (ids < self.stop)
        return torch.where(inside, ids - self.start, elsewhere)

    def sum(self, x: Tensor) -> Tensor:
        """In-place all-reduce SUM. Sums of integers are exact, so they do not depend on the number of ranks."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self.group)
        return x

    def total(self, x: Tensor) -> list[int]:
        """int64 [n] of this rank -> the exact sums over all ranks, however large. A collective and a host sync.

        Each number is summed in two halves: sums of 31 bits have room for 2^32 ranks.
        """
        halves = self.sum(torch.stack((x >> 31, x & 0x7FFFFFFF))).tolist()
        return [(high << 31) + low for high, low in zip(*halves, strict=True)]

    def max(self, x: Tensor) -> Tensor:
        """In-place all-reduce MAX."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
        """All-gather tensors of equal shapes -> ([ranks, *x.shape], work handle or None)."""
        if self.group is None:
            return x[None], None
        out = x.new_empty((self.size, *x.shape))
        work = _all_gather(out.view(-1), x.contiguous().view(-1), group=self.group, async_op=async_op)
        return out, work

    def as_global(self, local: Tensor) -> Tensor:
        """local [num_local] -> the tensor over all N ids, for checkpoints: a DTensor ``Shard(0)``, sharing memory."""
        assert local.shape[0] == self.num_local
        if self.mesh is None:
            return local
        shape = torch.Size((self.num_examples, *local.shape[1:]))
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride() if local.ndim else ()
        )
