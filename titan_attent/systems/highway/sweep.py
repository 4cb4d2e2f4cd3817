"""Highway backpropagation over a stack of residual blocks (Fagnou et al., ICLR 2025, arXiv 2501.17086).

Block i maps h_i to h_{i+1} = h_i + g_i(h_i), i = 0 .. L-1. J_i is the whole Jacobian of the block, and c_i the gain of
its residual path, 1 unless it was fitted (the paper's K_i = c_i I). Gradients are row vectors; g is the gradient of the
loss at h_L. The paper's iteration, for all i at once:

    w^0_L = g,  w^0_i = c_i w^0_{i+1};    w^m_L = g,  w^{m+1}_i = c_i w^{m+1}_{i+1} + (w^m_{i+1} J_i - c_i w^m_{i+1})

After k rounds the weights of block i get their gradients from w^k_{i+1}, and everything below the blocks from w^k_0. A
round uses values of the blocks above only. So one sweep from the top block down, which carries w^0 .. w^k, gives the
same result. Two savings do not change it:

- w^m_i is exact, hence the same, for all m >= L - i.
- If k > i, rounds before k - i do not affect any result and are skipped.

With k = L one input gradient per block is left: backpropagation.

Cost: :func:`num_vjps` input gradients (vjps) of blocks; backpropagation needs L. Memory: up to k + 1 tensors of the
residual stream's shape, in fp32 if the stream has lower precision, as w J - c w cancels. With k = 0 it is one tensor in
the stream's precision.

Any shape: w has the shape of h, of which a rank may hold a shard.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from titan_attent.systems.highway.sums import Sums


class Link(Protocol):
    """A block, its input and its output, with a graph of its own between the two."""

    def input_gradient(self, w: Tensor) -> Tensor:
        """w J, in the precision of w; the graph stays."""
        ...

    def weight_gradients(self, w: Tensor) -> None:
        """Add to the gradients of the block's weights those from w at its output, and free the graph."""
        ...

    def both(self, w: Tensor) -> Tensor:
        """Do both in one pass over the graph, and return w J."""
        ...


def num_vjps(num_blocks: int, iterations: int, *, complete: bool = False, exact_too: bool = False) -> int:
    """The number of input gradients of blocks in a sweep of k rounds: k (L - k + 1), or more in a measured sweep.

    Args:
        num_blocks: L.
        iterations: k; a larger k than L counts as L.
        complete: whether the sweep has sums, for which all rounds run down to the first block.
        exact_too: whether the sums also want the exact gradient.
    """
    k = min(iterations, num_blocks)
    total = sum(min(k, num_blocks - i) for i in range(num_blocks)) if complete else k * (num_blocks - k + 1)
    return total + (max(0, num_blocks - 1 - k) if exact_too else 0)


def separate_vjps(num_blocks: int, iterations: int, *, complete: bool = False, exact_too: bool = False) -> list[int]:
    """The number of these input gradients per block that need a pass of their own, without the weights' gradients.

    They are the cost of a sweep on top of the passes for the weights. Tied embeddings under FSDP2 may add one more
    (links.py).
    """
    k = min(iterations, num_blocks)
    counts = []
    for i in range(num_blocks):
        top, joined = min(k, num_blocks - i), num_blocks - i <= k
        lowest = 1 if complete else max(1, k - i)
        counts.append(max(0, top - lowest + 1) - joined + (exact_too and i > 0 and not joined))
    return counts


def sweep(
    links: Sequence[Link], gradient: Tensor, *, iterations: int, gains: Tensor | None = None, sums: Sums | None = None
) -> Tensor:
    """Compute the weight gradients of all blocks, from the last to the first, and add them to ``.grad``.

    Args:
        links: links of the L blocks, in the order of the forward pass.
        gradient: g, the gradient of the loss at the last block's output.
        iterations: k; a larger k than L counts as L.
        gains: c, fp32 [L]; None for 1.
        sums: gets the sums of a measured sweep; None for no measurement. With sums, all rounds run down to the first
            block, and so does the exact gradient if the sums want it.

    Returns:
        w^k_0, the gradient for everything below the first block.
    """
    num = len(links)
    k = min(iterations, num)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g = gradient.to(wide) if k > 0 else gradient
    exact = g if sums is not None and sums.wants_exact else None
    carried = {0: g}  # m -> w^m at the output of block i; at the last block's output every w^m is g
    for i in reversed(range(num)):
        link, highest = links[i], max(carried)
        lowest, top = max(0, k - i) if sums is None else 0, min(k, num - i)
        joined = top > highest  # the last input gradient is computed with the weight gradients
        c = None if gains is None else gains[i].to(wide)
        at_output, at_input = carried, dict[int, Tensor]()
        if sums is not None and exact is not None:
            sums.compare(i, at_output[highest], exact)
        if exact is not None and i > 0 and not joined:
            exact = link.input_gradient(exact)
        for m in range(lowest, top + 1):
            if m == 0:
                at_input[0] = _times(c, at_output[0])
                continue
            before, after = at_output[min(m - 1, highest)], at_output[min(m, highest)]
            product = link.both(before) if joined and m == top else link.input_gradient(before)
            at_input[m] = product if after is before else product + _times(c, after - before)
            if sums is not None:
                sums.add_vjp(i, before, product)
                sums.add_round(i, m, at_input[m], at_input[m - 1])
        if joined:
            exact = at_input[top] if exact is not None else None
        else:
            link.weight_gradients(at_output[highest])
        carried = at_input
    return carried[max(carried)]


def _times(c: Tensor | None, w: Tensor) -> Tensor:
    return w if c is None else c * w
