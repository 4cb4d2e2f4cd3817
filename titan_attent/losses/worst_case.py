"""Weights that train the worst inputs most: the gradient of a q-norm over the inputs of a global batch.

An input is a group of m neighbouring rows that differ in their random seed alone. The mean over its seeds comes first:

    l_i = mean loss of the valid tokens of the m rows of input i
    L_q = (sum_i n_i l_i^q / sum_i n_i)^(1/q)        n_i: valid tokens of input i
    gradient of L_q = sum_i n_i w_i gradient of l_i / sum_i n_i,    w_i = (l_i / L_q)^(q - 1)

With q = 1 that is the mean over tokens, torchtitan's loss; with growing q it nears the largest l_i. Where every row has
equally many valid tokens, L_q is the plain q-norm of the means. The weights average 1 or less.

L_q is of the whole batch, and known only after the last microbatch's backward. So the loss of a microbatch has the
weights (l_i / s)^(q - 1), with a number s that all ranks know: L_q of the step before. The gradient is multiplied by
(s / L_q)^(q - 1) once, before it is clipped. As s is near L_q, no power overflows or vanishes; a weight above
``LARGEST`` is cut to it, which takes a loss that exceeds s by a factor of 1,000 with q = 11.

So the step is exact for any number of ranks and microbatches that do not cut a group.

Source: "Learning randomized algorithms with transformers" (arXiv 2408.10818): the relaxed adversary. Where it is silent
(rows of unequal length), this is the norm whose weights with q = 1 are those of torchtitan's loss.

Cost: per step one all-reduce of 16 bytes and one pass over the gradients; a few fp64 numbers per example. No host sync.

Shapes: N examples, G = N / m groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

LARGEST = 1e30
"""The largest weight before the gradient is scaled."""


@dataclass(frozen=True)
class PowerWeights:
    """The weights (l_i / s)^(q - 1), a :data:`~titan_attent.losses.folding.LossRule` that reads s.

    Args:
        q: 1 or more.
        group_size: m, neighbouring examples with one input; N must be a multiple of it.
    """

    q: float
    group_size: int = 1

    def __call__(self, losses_N: Tensor, counts_N: Tensor, scale: Tensor) -> Tensor:
        """fp32 [N], equal for all examples of a group. ``scale``: fp64 scalar s, above 0."""
        means_G, _ = self._means(losses_N, counts_N)
        powers_G = (means_G / scale).pow(self.q - 1).clamp(max=LARGEST).float()
        return powers_G[:, None].expand(-1, self.group_size).flatten()

    def sums(self, losses_N: Tensor, counts_N: Tensor, scale: Tensor) -> Tensor:
        """fp64 [2]: sum_i n_i (l_i / s)^q, sum_i n_i."""
        means_G, counts_G = self._means(losses_N, counts_N)
        return torch.stack(((counts_G * (means_G / scale).pow(self.q)).sum(), counts_G.sum()))

    def _means(self, losses_N: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
        """fp64 [G] each: l_i, 0 without a valid token, and n_i."""
        counts = counts_N.double().view(-1, self.group_size)
        totals_G = (losses_N.double().view(-1, self.group_size) * counts).sum(dim=1)
        counts_G = counts.sum(dim=1)
        return (totals_G / counts_G.clamp(min=1)).clamp(min=0), counts_G


class WorstCase:
    """The q-norm of the steps of a run.

    Args:
        rule: the weights.
        first_scale: s of the first step: a loss of the size to be expected, above 0.
        device: of the losses.
        group: the ranks that have other examples of the batch; None for one rank.

    Attributes:
        scale: s of the current step, fp64 scalar on ``device``; equal on all ranks.
        shown: s after the last step, fp64 scalar on the host; to be read once the host has waited for the device.
    """

    def __init__(
        self, rule: PowerWeights, *, first_scale: float, device: torch.device | str, group: ProcessGroup | None = None
    ):
        self.rule, self._group = rule, group
        self.scale = torch.tensor(first_scale, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.shown = torch.tensor(first_scale, dtype=torch.float64)
        if torch.device(device).type == "cuda":
            self.shown = self.shown.pin_memory()

    def add(self, losses_N: Tensor, counts_N: Tensor) -> None:
        """Add the examples of a microbatch: their mean losses and their numbers of valid tokens, fp32 [N] each."""
        self._sums += self.rule.sums(losses_N, counts_N, self.scale)

    def finish(self) -> Tensor:
        """End the step: (s / L_q)^(q - 1), the factor of its gradient, fp32 scalar. A collective without a host sync.

        If no loss is above 0, the factor is 1.
        """
        if self._group is not None:
            dist.all_reduce(self._sums, group=self._group)
        total, count = self._sums.unbind()
        mean = total / count.clamp(min=1)  # (L_q / s)^q
        q = self.rule.q
        factor = torch.where(mean > 0, mean.pow((1 - q) / q), 1.0)
        # A loss that is not finite must not become the scale of all later steps.
        scale = self.scale * mean.pow(1 / q)
        self.scale.copy_(torch.where(torch.isfinite(scale) & (scale > 0), scale, self.scale))
        self.shown.copy_(self.scale, non_blocking=True)
        self._sums.zero_()
        return factor.float()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply the gradients in place by a scalar on their device that is equal on all ranks, also of sharded ones."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
