"""What is summed on the device in a watched sweep, and what is read from it.

For each block the squared norms and products that the number of rounds, the gains and the cosines are made of. They are
sums over this rank's part of the residual stream; those over all ranks are the sums of the table over the ranks.

Cost: two reductions over a tensor of the stream's shape a round and block, two a vjp, three a cosine. One table, fp32
[2 k + 5, L], for one exchange.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of the local parts, fp32 []."""
    if isinstance(a, DTensor):
        a = a.to_local()
    if isinstance(b, DTensor):
        b = b.to_local()
    return torch.dot(a.float().reshape(-1), b.float().reshape(-1))


class Sums:
    """Sums of one step.

    Args:
        num_blocks: L.
        iterations: k.
        wants_exact: whether the exact gradient is compared with.

    Attributes:
        table: fp32 [2 k + 5, L]: of each round m = 1 .. k |w^m - w^{m-1}|^2 and |w^m|^2 at the blocks' inputs; <w, w J>
            and <w, w>; <h, e>, <h, h> and <e, e> of the highway's and the exact gradient at the blocks' outputs.
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
class Watched:
    """What the sums over all ranks say.

    Attributes:
        changes: of round m = 1 .. k: |w^m - w^{m-1}| / |w^m|, mean over the blocks; 0 where a round changes nothing.
        cosines: of the highway's with the exact gradient at the output of each block; none unless it was compared.
    """

    changes: list[float]
    cosines: list[float]


def fitted_gains(table: Tensor) -> Tensor:
    """<w, w J> / <w, w> of each block, fp32 [L]; 1 where nothing is known. No host sync."""
    product, size = table[-5], table[-4]
    return torch.where(size > 0, product / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)


def read(table: Tensor) -> Watched:
    """Copies the table to the host."""
    host = table.double().cpu()
    changes, sizes = host[:-5:2].clamp_min(0).sqrt(), host[1:-5:2].clamp_min(0).sqrt()
    ratios = torch.where(sizes > 0, changes / sizes.clamp_min(1e-300), 0.0)
    product, highway, exact = host[-3:]
    cosines = product / (highway * exact).sqrt() if bool((exact > 0).any()) else product[:0]
    return Watched(ratios.mean(dim=1).tolist(), cosines.tolist())


def enough_rounds(changes: list[float], *, tolerance: float) -> int:
    """The first round whose change is below the tolerance; all of them if there is none, or if it is not a number."""
    return next((m for m, change in enumerate(changes, 1) if change < tolerance), len(changes))
