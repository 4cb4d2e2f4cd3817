"""The one-layer transformer of Kim and Suzuki (arXiv 2410.08633) for k-parity, and its ways of training.

Positions 0 to d - 1 hold the bits, each -1 or +1. The k - 1 positions behind them hold the nodes of a binary tree over
the k hidden bits, level by level; the last one is the answer. Attention sees positions alone, by weights W
[k - 1, d + k - 1] that begin at zero, and has one head of one value, the bit:

    x_m = link(sum_j softmax_j(W[m]) x_j),    link(t) = 4 t^2 - 1 for |t| < 1/2, else -4 t^2 + 8 |t| - 3

so a node that attends to two positions in equal parts has their parity. Training is gradient descent on all rows. The
loss is the mean of |x_m - right_m|^2 / 2 over rows and nodes. What the paper leaves open is stated at the functions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

FOUND = 0.4
"""Self-consistency: a node has found its inputs where its largest attention is above this."""
ANSWER_SHARE = 0.1
"""Self-consistency: weight of the answer's loss, which has the unit of the mean over the nodes."""
RATES = {8: 15.0, 16: 50.0, 32: 100.0}
"""The paper's learning rates by k; a direct run has a hundredth of them."""


@dataclass(frozen=True)
class Tree:
    """The hidden bits, and the nodes above them."""

    bits: int
    hidden: tuple[int, ...]
    """The positions of the k hidden bits; k is a power of 2. Neighbours are the inputs of a node."""

    @property
    def nodes(self) -> int:
        return len(self.hidden) - 1

    @cached_property
    def levels(self) -> list[range]:
        """The positions of the nodes of each level, the lowest first; the last level is the answer alone."""
        begin, found = self.bits, []
        while begin < self.bits + self.nodes:
            found.append(range(begin, begin + (self.bits + self.nodes - begin + 1) // 2))
            begin = found[-1].stop
        return found

    @cached_property
    def each(self) -> list[range]:
        """The positions of the nodes, one by one."""
        return [range(position, position + 1) for position in range(self.bits, self.bits + self.nodes)]

    def right(self, bits: torch.Tensor) -> torch.Tensor:
        """Every node's parity, [nodes, rows] of -1 and +1, from bits [bits, rows]."""
        below, levels = bits[list(self.hidden)], []
        while len(below) > 1:
            below = below[0::2] * below[1::2]
            levels.append(below)
        return torch.cat(levels)


def draw(bits: int, k: int, rows: int, seed: int) -> tuple[Tree, torch.Tensor]:
    """Hidden bits and rows of a seed: the tree, and float32 [bits, rows] of -1 and +1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(bits, generator=generator)[:k].tolist()
    return Tree(bits, tuple(hidden)), torch.randint(0, 2, (bits, rows), generator=generator).float() * 2 - 1


def link(t: torch.Tensor) -> torch.Tensor:
    """The feed-forward layer: -1 at 0, +1 at -1 and +1, flat at all three."""
    size = t.abs()
    return torch.where(size < 0.5, 4 * t * t - 1, -4 * t * t + 8 * size - 3)


def attend(weights: torch.Tensor, tree: Tree, step: range, seen: range, values: torch.Tensor) -> torch.Tensor:
    """The nodes of a step, [step, rows], which attend to the positions ``seen`` with values [seen, rows]."""
    return link(weights[step.start - tree.bits : step.stop - tree.bits, seen.start : seen.stop].softmax(1) @ values)


def has_found(weights: torch.Tensor, tree: Tree, level: range, seen: range) -> bool:
    """Whether every node of a level has an input with more attention than FOUND."""
    own = weights[level.start - tree.bits : level.stop - tree.bits, seen.start : seen.stop]
    return bool((own.softmax(1).amax(1) > FOUND).all())


def answer(weights: torch.Tensor, tree: Tree, bits: torch.Tensor, *, by_level: bool) -> torch.Tensor:
    """The answer [rows] that the model computes from bits [bits, rows] on its own.

    Args:
        by_level: a node attends to the level below it alone, and a level is one step; else nodes are computed one by
            one and attend to all positions before them.
    """
    if by_level:
        seen, values = range(tree.bits), bits
        for level in tree.levels:
            seen, values = level, attend(weights, tree, level, seen, values)
    else:
        values = bits
        for step in tree.each:
            values = torch.cat([values, attend(weights, tree, step, range(step.start), values)])
    return values[-1]


def half_square(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (found - right).square().mean() / 2


def direct_loss(weights: torch.Tensor, tree: Tree, bits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The answer's loss alone, through all the nodes that the model computes before it."""
    return half_square(answer(weights, tree, bits, by_level=False), right[-1])


def teacher_forcing_loss(weights: torch.Tensor, tree: Tree, bits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The loss of all nodes, each computed from the right values of all positions before it."""
    known = torch.cat([bits, right])
    positions = torch.arange(len(known))
    behind = positions >= torch.arange(tree.bits, len(known))[:, None]
    return half_square(link(weights.masked_fill(behind, -math.inf).softmax(1) @ known), right)


def chain_loss(
    weights: torch.Tensor,
    tree: Tree,
    bits: torch.Tensor,
    right: torch.Tensor,
    *,
    detached: bool = False,
    consistent: bool = False,
) -> torch.Tensor:
    """The loss of all nodes, each computed from the level below as the model computes it, with gradients through it.

    Args:
        detached: no gradient goes through the level below.
        consistent: self-consistency: a level is 0, and learns nothing, while the level below has not found its inputs;
            and ANSWER_SHARE of the answer's loss is added.
    """
    seen, values, losses, found = range(tree.bits), bits, [], True
    for level in tree.levels:
        own = right[level.start - tree.bits : level.stop - tree.bits]
        nodes = attend(weights, tree, level, seen, values) if found else torch.zeros_like(own)
        if consistent and found:
            found = has_found(weights.detach(), tree, level, seen)
        losses.append((nodes - own).square().sum() / 2)
        seen, values = level, nodes.detach() if detached else nodes
    loss = torch.stack(losses).sum() / right.numel()
    return loss + ANSWER_SHARE * half_square(values[-1], right[-1]) / tree.nodes if consistent else loss


def detached_loss(weights: torch.Tensor, tree: Tree, bits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """:func:`chain_loss` without gradients through the steps."""
    return chain_loss(weights, tree, bits, right, detached=True)


def consistent_loss(weights: torch.Tensor, tree: Tree, bits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """:func:`chain_loss` with self-consistency."""
    return chain_loss(weights, tree, bits, right, consistent=True)


@dataclass(frozen=True)
class Method:
    """A way of training, and of answering afterwards."""

    loss: Callable[[torch.Tensor, Tree, torch.Tensor, torch.Tensor], torch.Tensor]
    by_level: bool
    """Of :func:`answer`."""
    rate: float = 1.0
    """Times RATES."""


DETACHED = "chain of thought, detached"
"""Not in the paper: each step learns by itself."""
METHODS = {
    "direct": Method(direct_loss, by_level=False, rate=0.01),
    "chain of thought": Method(chain_loss, by_level=True),
    DETACHED: Method(detached_loss, by_level=True),
    "teacher forcing": Method(teacher_forcing_loss, by_level=False),
    "self-consistency": Method(consistent_loss, by_level=True),
}


def train(
    name: str, tree: Tree, bits: torch.Tensor, test: torch.Tensor, *, rate: float, epochs: int, every: int
) -> Iterator[tuple[int, float, float]]:
    """Train by gradient descent on all rows, from zero: (epoch, loss, accuracy on ``test``) every so many epochs."""
    method, right, truth = METHODS[name], tree.right(bits), tree.right(test)[-1] > 0
    weights = torch.zeros(tree.nodes, tree.bits + tree.nodes, requires_grad=True)
    for epoch in range(epochs + 1):
        loss = method.loss(weights, tree, bits, right)
        if epoch % every == 0:
            with torch.no_grad():
                right_ones = (answer(weights, tree, test, by_level=method.by_level) > 0) == truth
            yield epoch, loss.item(), right_ones.float().mean().item()
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= rate * method.rate * gradient
