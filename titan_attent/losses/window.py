"""Recent losses of the whole run, for weights computed from the loss within the step (``weighting = "loss"``).

The rule (Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025,
arXiv 2502.06733, strategy LinUpper) scales the loss l of an example linearly between the smallest and the largest loss,
caps it at the middle and takes the exponential:

    h = 2 (l - low) / (high - low) - 1        in [-1, 1]
    w = exp(min(h + 1, 1) / temperature)      divided by its mean

Losses below the middle count less, and all losses above it count equally: learned examples lose weight, and outliers
gain none. The paper takes low, high and the mean from the global batch of the step, with a collective and a host sync
before the backward. Here they come from the last but one window of ``flush_every`` steps, whose losses the buffer has
already gathered. So they need no collective of their own and no sync, and are equal on every rank and for every number
of ranks. Windows are counted from step 0, so neither checkpoints nor decisions shift them.

Where examples are packed, the mean counts examples, not tokens: a short one as much as a long one.

Cost: 12 bytes per trained example of a window, in memory and in the checkpoint; one pass over them per window. Where
examples are packed, 12 bytes per slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH_EVERY = 16
"""Steps between two exchanges of losses."""

_WINDOWS = 3  # the window being written, the one being exchanged, the one whose statistics are used


def neutral_statistics(device: torch.device | str = "cpu") -> Tensor:
    """Statistics, fp32 [3], that give every loss a weight of 1.

    Call it once, outside the step: it copies host numbers to the device, which is a sync.
    """
    return torch.tensor([0.0, float("inf"), 1.0], device=device)


def capped_linear_weights(losses: Tensor, statistics: Tensor, *, temperature: float) -> Tensor:
    """The weights of losses fp32 [B] by the rule above -> [B]; statistics fp32 [3]: low, high, mean before division."""
    low, high, mean = statistics.unbind()
    return torch.exp((2 * (losses - low) / (high - low)).clamp(0.0, 1.0) / temperature) / mean


@dataclass(frozen=True)
class CappedLinear:
    """The rule of :func:`capped_linear_weights` as a :data:`~titan_attent.losses.folding.LossRule`."""

    temperature: float

    def __call__(self, losses_N: Tensor, counts_N: Tensor, statistics: Tensor) -> Tensor:
        return capped_linear_weights(losses_N, statistics, temperature=self.temperature)


class LossWindow:
    """The losses of the last windows of ``flush_every`` steps, on every rank, in global order.

    Args:
        batch_size: G, losses per step; where examples are packed, rows x slots per row.
        temperature: the temperature of the rule.
        device: the device of the losses.
        flush_every: steps per window, the same as that of the buffer.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        temperature: float,
        device: torch.device | str = "cpu",
        flush_every: int = FLUSH_EVERY,
    ):
        self.flush_every, self.temperature = flush_every, temperature
        self._losses = torch.full((_WINDOWS, flush_every * batch_size), float("nan"), device=device)
        self._neutral = neutral_statistics(device)
        self._numbers = [-1] * _WINDOWS
        self._counts = [0] * _WINDOWS
        self._cached: tuple[int, Tensor] | None = None

    def _number(self, step: int) -> int:
        return (step - 1) // self.flush_every

    def write(self, losses: Tensor, *, step: int) -> None:
        """Append losses fp32 [n] in global order; their last step is ``step``, all in one window. No host sync.

        A loss that is not finite counts nowhere: NaN stands for a slot without an example. Nor does a loss of 0, which
        an example without a label has.
        """
        number = self._number(step)
        slot = number % _WINDOWS
        if self._numbers[slot] != number:
            self._numbers[slot], self._counts[slot] = number, 0
            self._losses[slot].fill_(float("nan"))
        start = self._counts[slot]
        target = self._losses[slot][start : start + len(losses)]
        target.copy_(losses[: len(target)])
        self._counts[slot] = start + len(target)

    def statistics(self, step: int) -> Tensor:
        """Statistics fp32 [3] for :func:`capped_linear_weights` at ``step``; neutral in the first two windows. No host
        sync."""
        number = self._number(step)
        if self._cached is None or self._cached[0] != number:
            slot = (number - 2) % _WINDOWS
            is_written = number >= 2 and self._numbers[slot] == number - 2
            values = self._measure(self._losses[slot]) if is_written else self._neutral
            self._cached = number, values
        return self._cached[1]

    def _measure(self, losses: Tensor) -> Tensor:
        # Unwritten elements and empty slots are NaN; an example whose labels are all ignored has a loss of 0.
        counted = torch.isfinite(losses) & (losses != 0)
        low = torch.where(counted, losses, float("inf")).min()
        high = torch.where(counted, losses, float("-inf")).max()
        one = torch.ones_like(low)
        weights = capped_linear_weights(losses, torch.stack((low, high, one)), temperature=self.temperature)
        mean = torch.where(counted, weights, 0.0).sum() / counted.sum().clamp(min=1)
        return torch.where(high > low, torch.stack((low, high, mean)), self._neutral)

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self._losses, "positions": torch.tensor([self._numbers, self._counts])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self._losses.shape:
            raise ValueError(
                f"the checkpoint's loss window holds {tuple(state['losses'].shape)}, this run needs "
                f"{tuple(self._losses.shape)}: resume with the global batch that the checkpoint was written with"
            )
        self._losses.copy_(state["losses"])
        self._numbers, self._counts = state["positions"].tolist()
        self._cached = None
