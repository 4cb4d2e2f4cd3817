"""The statistics of examples that are trained as shares of mixtures (mixup, CutMix).

Steps are grouped into windows. All mixtures of an example within one window are averaged by their shares; the average
then moves the recorded value of the example in proportion to the sum of the shares:

    S = sum of shares,  m = sum of share x loss / S,  a = min(S, 1)      in the current window
    value = (a m + (1 - a) c v) / c',   c' = a + (1 - a) c               v, c: value and its weight before the window

The weight c is the share of an image that the value is based on. An example with c below one half counts as never
scored: its loss in a mixture with a share of 2% carries no information, and the next mixture outweighs it. Records with
a share of 0 are ignored. A score from a forward pass is of the example alone: it replaces the value, with c = 1.

The sums are sums of integers, and v and c change only at the first record of a new window. So the value does not depend
on the order of records within a window, on where an exchange or a checkpoint splits it, or on the number of ranks.

Cost: 24 bytes per example / ranks, 36 with gradients, only where examples are mixed; on the wire only the share. No
host sync, no shape that depends on values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SHARE = 0.5
"""The smallest weight of a value that counts as scored, and the smallest share that counts as a visit."""
MAX_LOSS = 4096.0
"""Larger losses are clipped to it, so that the sum of 2^19 losses of an example per window fits into an int64."""
_SHARE, _FRACTION = 2.0**24, 2.0**8
"""Integer units per share of 1; further units per nat, in products of share and loss."""


class Mixtures:
    """The sums of the current window of every example, and its values before that window.

    Args:
        names: the names of the recorded values: "loss", and "gradient" if it is kept.
        slots: number of this rank's examples, plus a last trash slot for writes to ignore.
        steps: steps per window.

    Attributes:
        state: tensors [slots], by name.
    """

    def __init__(self, names: Sequence[str], *, slots: int, steps: int, device: torch.device):
        self.names, self.steps, self.trash = tuple(names), steps, slots - 1
        dtypes = {"mixed_window": torch.int32, "mixed_weight": torch.float32, "mixed_shares": torch.int64}
        for name in names:
            dtypes |= {f"mixed_{name}": torch.float32, f"mixed_{name}_sum": torch.int64}
        self.state = {name: torch.zeros(slots, dtype=dtype, device=device) for name, dtype in dtypes.items()}

    def same_window(self, step: int, other: int) -> bool:
        """Whether two steps are in the same window."""
        return self._window(step) == self._window(other)

    def _window(self, step: int) -> int:
        return max(step - 1, 0) // self.steps

    def update(
        self, slot: Tensor, values: dict[str, Tensor], shares: Tensor | None, *, first: Tensor, last: Tensor, step: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Apply training records of one window, or scores.

        Args:
            slot: int64 [n], with equal slots adjacent.
            values: fp32 [n] by name.
            shares: fp32 [n], in [0, 1]; None for scores.
            first: int64 [n], the slot at the first record of an example without a loss yet, elsewhere the trash slot.
            last: int64 [n], the slot at the last record of each example, elsewhere the trash slot.
            step: the step of any of the records.

        Returns:
            (values, first, last): the new values, and the slots to write them to. The first value of an example is
            rewritten until the window ends in which it was first scored.
        """
        if shares is None:
            self._replace(last, values)
            return values, first, last
        updated, is_scored, is_first = self._add(slot, last, values, shares, window=self._window(step))
        last = torch.where(is_scored, last, self.trash)
        return updated, torch.where(is_first, last, self.trash), last

    def _add(
        self, slot: Tensor, last: Tensor, values: dict[str, Tensor], shares: Tensor, *, window: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(values fp32 [n] by name, whether the example counts as scored, whether it did not before the window)."""
        state = self.state
        weight, seen = state["mixed_weight"][slot], state["mixed_shares"][slot]
        is_new = state["mixed_window"][slot] != window
        weight_before = torch.where(is_new, _weight(weight, seen), weight)
        before = {}
        for name in self.names:
            value, total = state[f"mixed_{name}"][slot], state[f"mixed_{name}_sum"][slot]
            before[name] = torch.where(is_new, _value(weight, value, seen, total), value)
            state[f"mixed_{name}"].index_copy_(0, last, before[name])
            state[f"mixed_{name}_sum"].index_copy_(0, last, total.masked_fill(is_new, 0))
        state["mixed_weight"].index_copy_(0, last, weight_before)
        state["mixed_shares"].index_copy_(0, last, seen.masked_fill(is_new, 0))
        state["mixed_window"].index_copy_(0, last, torch.full_like(last, window, dtype=torch.int32))

        units = (shares.double() * _SHARE).round_()
        state["mixed_shares"].index_add_(0, slot, units.long())
        for name in self.names:
            product = units * _FRACTION * values[name].double().clamp(-MAX_LOSS, MAX_LOSS)
            state[f"mixed_{name}_sum"].index_add_(0, slot, product.round_().long())
        seen = state["mixed_shares"][slot]
        updated = {
            name: _value(weight_before, before[name], seen, state[f"mixed_{name}_sum"][slot]) for name in self.names
        }
        return updated, _weight(weight_before, seen) >= MIN_SHARE, weight_before < MIN_SHARE

    def _replace(self, last: Tensor, values: dict[str, Tensor]) -> None:
        for name in self.names:
            self.state[f"mixed_{name}"].index_copy_(0, last, values[name])
            self.state[f"mixed_{name}_sum"].index_fill_(0, last, 0)
        self.state["mixed_shares"].index_fill_(0, last, 0)
        self.state["mixed_weight"].index_fill_(0, last, 1.0)


def _weight(weight: Tensor, seen: Tensor) -> Tensor:
    """c' from c (``weight``, fp32) and S (``seen``, int64 units)."""
    share = (seen.double() / _SHARE).clamp_(max=1.0)
    return (share + (1.0 - share) * weight.double()).float()


def _value(weight: Tensor, value: Tensor, seen: Tensor, total: Tensor) -> Tensor:
    """The value after a window, fp32, from ``weight`` and ``value`` before it and the sums ``seen`` and ``total``."""
    share = (seen.double() / _SHARE).clamp_(max=1.0)
    mean = total.double() / (seen.double() * _FRACTION)
    old_share = (1.0 - share) * weight.double()
    moved = (share * mean + old_share * value.double()) / (share + old_share)
    return torch.where(seen > 0, moved.float(), value)
