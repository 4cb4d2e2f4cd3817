"""The statistics of examples: tensors of the loss buffer, for a shard or a pool; losses packed as bits to exchange."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding

NEVER = -1
"""The step of an example that has no loss yet."""


@dataclass(frozen=True)
class Records:
    """The statistics of this rank's examples of ``sharding``: tensors [num_local], as in :class:`LossBuffer`.

    ``gradient`` is None unless functional gradients are recorded.
    """

    sharding: ExampleSharding
    loss: Tensor
    step: Tensor
    first_loss: Tensor
    first_step: Tensor
    visits: Tensor
    gradient: Tensor | None = None

    def moved(self, move: Callable[[list[Tensor]], list[Tensor]], sharding: ExampleSharding) -> "Records":
        """The records in another sharding; ``move`` moves the list of their tensors."""
        tensors = [self.loss, self.step, self.first_loss, self.first_step, self.visits]
        return Records(sharding, *move(tensors + ([] if self.gradient is None else [self.gradient])))

    def with_scores(self, losses: Tensor, *, replace_all: bool) -> "Records":
        """The records with losses of another model, fp32 [num_local], as losses of step 0, in new tensors.

        Args:
            replace_all: replace the loss of every example; else only of examples that were never trained.
        """
        if replace_all:
            loss, step = losses, torch.zeros_like(self.step)
        else:
            unseen = self.visits == 0
            loss, step = torch.where(unseen, losses, self.loss), self.step.masked_fill(unseen, 0)
        return Records(self.sharding, loss, step, self.first_loss, self.first_step, self.visits, self.gradient)


def bits_of(values: Tensor, device: torch.device) -> Tensor:
    """The fp32 bits of ``values`` in the low half of an int64; a copy, as the next step may overwrite the source."""
    return values.detach().to(device, torch.float32).view(torch.int32).long() & 0xFFFFFFFF


def floats_of(packed: Tensor) -> Tensor:
    """The fp32 values whose bits are the low halves of ``packed``."""
    return packed.to(torch.int32).view(torch.float32)
