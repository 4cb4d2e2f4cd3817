"""The sums that a measured sweep makes on the device, and the values computed from them.

For each block these are the squared norms and inner products behind the number of rounds, the gains and the cosines.
Each rank sums over its shard of the residual stream; an all-reduce of the table gives the sums over all ranks.

Cost: reductions over a tensor of the stream's shape: two per round and block, two per vjp, three per cosine. One table,
fp32 [2 k + 5, L], is exchanged at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product <a, b> of the local shards, fp32 []."""
    if isinstance(a, DTensor):
        a = a.to_local()
    if isinstance(b, DTensor):
        b = b.to_local()
    return torch.dot(a.float().reshape(-1), b.float().reshape(-1))


class Sums:
    """The sums of one step.

    Args:
        num_blocks: L.
        iterations: k.
        wants_exact: whether the highway gradient is compared with the exact one.

    Attributes:
        table: fp32 [2 k + 5, L]. For each round m = 1 .. k: |w^m - w^{m-1}|^2 and |w^m|^2 at the blocks' inputs. Then
            <w, w J> and <w, w>. Then <h, e>, <h, h> and <e, e> of the highway gradient h and the exact gradient e at
            the blocks' outputs.
    """

    def __init__(self, num_blocks: int, iterations: int, *, wants_exact: bool, device: torch.device):
        self.iterations, self.wants_exact = iterations, wants_exact
        self.table = torch.zeros(2 * iterations + 5, num_blocks, device=device)

    def add_round(self, i: int, m: int, now: Tensor, before: Tensor) -> None:
        change = now - before
        self.table[2 * m - 2, i] += dot(change, change)
        self.table[2 * m - 1, i] += dot(now, now)

    def add_vjp(self, i: int, w: Tensor, product: Tensor) -> None:
        self.table[-5, i] += dot(w, product)
        self.table[-4, i] += dot(w, w)

    def compare(self, i: int, highway: Tensor, exact: Tensor) -> None:
        self.table[-3, i] += dot(highway, exact)
        self.table[-2, i] += dot(highway, highway)
        self.table[-1, i] += dot(exact, exact)


@dataclass(frozen=True)
class Measurements:
    """The measurements computed from the sums over all ranks.

    Attributes:
        changes: |w^m - w^{m-1}| / |w^m| of each round m = 1 .. k, mean over the blocks; 0 where w^m is zero.
        cosines: cosine between the highway and the exact gradient at each block's output; empty if not compared.
    """

    changes: list[float]
    cosines: list[float]


def fitted_gains(table: Tensor) -> Tensor:
    """The gain <w, w J> / <w, w> of each block, fp32 [L]; 1 where <w, w> is 0. No host sync."""
    product, size = table[-5], table[-4]
    return torch.where(size > 0, product / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)


def read(table: Tensor) -> Measurements:
    """Copy the table to the host and compute the measurements."""
    host = table.double().cpu()
    changes, sizes = host[:-5:2].clamp_min(0).sqrt(), host[1:-5:2].clamp_min(0).sqrt()
    ratios = torch.where(sizes > 0, changes / sizes.clamp_min(1e-300), 0.0)
    product, highway, exact = host[-3:]
    cosines = product / (highway * exact).sqrt() if bool((exact > 0).any()) else product[:0]
    return Measurements(ratios.mean(dim=1).tolist(), cosines.tolist())


def enough_rounds(changes: list[float], *, tolerance: float) -> int:
    """The number of the first round whose change is below the tolerance; all rounds if there is none, as with NaN."""
    return next((m for m, change in enumerate(changes, 1) if change < tolerance), len(changes))
