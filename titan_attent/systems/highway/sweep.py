"""Highway backpropagation over a stack of residual blocks (Fagnou et al., ICLR 2025, arXiv 2501.17086).

Block i maps h_i to h_{i+1} = h_i + g_i(h_i), i = 0 .. L-1; J_i is its whole Jacobian and c_i the gain of its residual
path, 1 unless it was fitted (the paper's K_i = c_i I). Gradients are rows; g is that of the loss at h_L. The paper's
iteration, for all i at once:

    w^0_L = g,  w^0_i = c_i w^0_{i+1};    w^m_L = g,  w^{m+1}_i = c_i w^{m+1}_{i+1} + (w^m_{i+1} J_i - c_i w^m_{i+1})

after k rounds the weights of block i get theirs from w^k_{i+1}, and what is below the blocks from w^k_0. A round
looks only at blocks above, so that one sweep from the top block down, which carries w^0 .. w^k, gives the same. Two
savings change nothing in the result: w^m_i is exact, hence the same, for all m >= L - i; and with k - i > 0 the rounds
before k - i lead to nothing that is used. With k = L this leaves one input gradient a block: backpropagation.

Cost in input gradients (vjps) of a block, L of which backpropagation needs: see :func:`num_vjps`. Memory: up to k + 1
tensors of the residual stream's shape, in fp32 if it is of lower precision, as w J - c w cancels; with k = 0 one, as
it came.

Any shape: w has the shape of h, of which a rank may hold a part.
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
        """The two in one pass over the graph; w J."""
        ...


def num_vjps(num_blocks: int, iterations: int, *, complete: bool = False, exact_too: bool = False) -> int:
    """Input gradients of blocks in a sweep of k rounds: k (L - k + 1), or more where a sweep is watched: ``complete``
    with sums, ``exact_too`` where these want the exact gradient."""
    k = min(iterations, num_blocks)
    total = sum(min(k, num_blocks - i) for i in range(num_blocks)) if complete else k * (num_blocks - k + 1)
    return total + (max(0, num_blocks - 1 - k) if exact_too else 0)


def separate_vjps(num_blocks: int, iterations: int, *, complete: bool = False, exact_too: bool = False) -> list[int]:
    """Of these, those of each block that do not come with its weights' gradients: what a sweep costs on top of the
    weights' passes. Tied embeddings under FSDP2 may bring one more (links.py)."""
    k = min(iterations, num_blocks)
    found = []
    for i in range(num_blocks):
        top, joined = min(k, num_blocks - i), num_blocks - i <= k
        lowest = 1 if complete else max(1, k - i)
        found.append(max(0, top - lowest + 1) - joined + (exact_too and i > 0 and not joined))
    return found


def sweep(
    links: Sequence[Link], gradient: Tensor, *, iterations: int, gains: Tensor | None = None, sums: Sums | None = None
) -> Tensor:
    """Add to the gradients of the weights of all blocks, from the last to the first.

    Args:
        links: of the L blocks, in the order of the forward pass.
        gradient: g, of the loss at the last block's output.
        iterations: k; more than L are L.
        gains: c, fp32 [L]; None for 1.
        sums: what is watched is added to it; then all rounds are carried down to the first block, and, if it wants the
            exact gradient, that, too.

    Returns:
        w^k_0, for what is below the first block.
    """
    num = len(links)
    k = min(iterations, num)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g = gradient.to(wide) if k > 0 else gradient
    exact = g if sums is not None and sums.wants_exact else None
    carried = {0: g}  # m -> w^m at the output of block i; at the last block's all are g
    for i in reversed(range(num)):
        link, highest = links[i], max(carried)
        lowest, top = max(0, k - i) if sums is None else 0, min(k, num - i)
        joined = top > highest  # its last input gradient comes with its weights'
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
