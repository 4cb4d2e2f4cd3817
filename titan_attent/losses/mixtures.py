"""What is known of examples that are trained as shares of mixtures (mixup, CutMix), however the exchanges are cut.

Steps are counted in windows. All mixtures of an example in one window are one reading of it, and a reading moves its
record towards itself, by as much of the example as it saw:

    S = sum of shares,  m = sum of share x loss / S,  a = min(S, 1)      of the window under way
    record = (a m + (1 - a) c v) / c',   c' = a + (1 - a) c              v, c: record and its weight before the window

c is how much of an image a record rests on. Below one half the example counts as never scored: a mixture in which it
was 2% says nothing of it, and is outweighed by the next. A share of 0 is nothing at all. A forward pass sees an example
alone: its score is the record, and c is 1.

Sums are of integers, and v and c change at the first record of another window alone. So the record is the same in any
order within a window, wherever an exchange cuts it (a checkpoint does), and on any number of ranks.

Cost: 24 bytes per example / ranks, 36 with gradients, kept only where examples are mixed; nothing on the wire beside
the share. No host sync, no shape that depends on values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = 0.5
"""Of an example: what it takes for a record, and for a visit."""
LARGEST = 4096.0
"""Losses beyond it count as this one, so that 2^19 of an example in a window have room in a sum."""
_SHARE, _FRACTION = 2.0**24, 2.0**8
"""Units of a whole share; of a nat in them."""


class Mixtures:
    """Readings of the window under way, and what was known before it.

    Args:
        names: of the values that are read: "loss", perhaps "gradient".
        slots: examples of this rank, and a last one for what goes nowhere.
        steps: of a window.

    Attributes:
        state: by name, tensors [slots].
    """

    def __init__(self, names: Sequence[str], *, slots: int, steps: int, device: torch.device):
        self.names, self.steps, self.nowhere = tuple(names), steps, slots - 1
        kinds = {"mixed_window": torch.int32, "mixed_weight": torch.float32, "mixed_shares": torch.int64}
        for name in names:
            kinds |= {f"mixed_{name}": torch.float32, f"mixed_{name}_sum": torch.int64}
        self.state = {name: torch.zeros(slots, dtype=kind, device=device) for name, kind in kinds.items()}

    def parts(self, step: int, other: int) -> bool:
        """Whether two steps are of different windows."""
        return self._window(step) != self._window(other)

    def _window(self, step: int) -> int:
        return max(step - 1, 0) // self.steps

    def take(
        self, slot: Tensor, values: dict[str, Tensor], shares: Tensor | None, *, first: Tensor, last: Tensor, step: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Take in records of one window, or scores.

        Args:
            slot: int64 [n], equal ones side by side.
            values: fp32 [n] by name.
            shares: fp32 [n], in [0, 1]; None for scores.
            first, last: the slot at the first of equal ones where nothing is known yet, and at the last of all;
                elsewhere the slot of nothing.
            step: of one of them.

        Returns:
            (values, first, last): what is known now, and where to write it. What an example is first known by changes
            until that window ends.
        """
        if shares is None:
            self._replace(last, values)
            return values, first, last
        now, known, new = self._add(slot, last, values, shares, window=self._window(step))
        last = torch.where(known, last, self.nowhere)
        return now, torch.where(new, last, self.nowhere), last

    def _add(
        self, slot: Tensor, last: Tensor, values: dict[str, Tensor], shares: Tensor, *, window: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(records fp32 [n] by name, whether each is one, whether it was none before the window)."""
        state = self.state
        weight, seen = state["mixed_weight"][slot], state["mixed_shares"][slot]
        other = state["mixed_window"][slot] != window
        kept = torch.where(other, _weight(weight, seen), weight)
        before = {}
        for name in self.names:
            record, total = state[f"mixed_{name}"][slot], state[f"mixed_{name}_sum"][slot]
            before[name] = torch.where(other, _record(weight, record, seen, total), record)
            state[f"mixed_{name}"].index_copy_(0, last, before[name])
            state[f"mixed_{name}_sum"].index_copy_(0, last, total.masked_fill(other, 0))
        state["mixed_weight"].index_copy_(0, last, kept)
        state["mixed_shares"].index_copy_(0, last, seen.masked_fill(other, 0))
        state["mixed_window"].index_copy_(0, last, torch.full_like(last, window, dtype=torch.int32))

        units = (shares.double() * _SHARE).round_()
        state["mixed_shares"].index_add_(0, slot, units.long())
        for name in self.names:
            read = units * _FRACTION * values[name].double().clamp(-LARGEST, LARGEST)
            state[f"mixed_{name}_sum"].index_add_(0, slot, read.round_().long())
        seen = state["mixed_shares"][slot]
        now = {name: _record(kept, before[name], seen, state[f"mixed_{name}_sum"][slot]) for name in self.names}
        return now, _weight(kept, seen) >= HALF, kept < HALF

    def _replace(self, last: Tensor, values: dict[str, Tensor]) -> None:
        for name in self.names:
            self.state[f"mixed_{name}"].index_copy_(0, last, values[name])
            self.state[f"mixed_{name}_sum"].index_fill_(0, last, 0)
        self.state["mixed_shares"].index_fill_(0, last, 0)
        self.state["mixed_weight"].index_fill_(0, last, 1.0)


def _weight(weight: Tensor, seen: Tensor) -> Tensor:
    """c' of c, fp32, and S in units, int64."""
    share = (seen.double() / _SHARE).clamp_(max=1.0)
    return (share + (1.0 - share) * weight.double()).float()


def _record(weight: Tensor, record: Tensor, seen: Tensor, total: Tensor) -> Tensor:
    """The record after a window, fp32, of what was known before it and the window's sums."""
    share = (seen.double() / _SHARE).clamp_(max=1.0)
    mean = total.double() / (seen.double() * _FRACTION)
    rest = (1.0 - share) * weight.double()
    moved = (share * mean + rest * record.double()) / (share + rest)
    return torch.where(seen > 0, moved.float(), record)
