"""The quarantine: examples that never improve are no longer selected.

A noisy, broken or unlearnable example keeps a high loss however often it is trained on, and a teacher that follows the
loss selects it forever. The quarantine counts, per example, consecutive useless selections. A selection is useless if
it found the importance in the top ``QUANTILE`` of the pool, and the loss has fallen by no more than ``IMPROVEMENT``
since the first selection of the streak. After ``quarantine_after`` of them no selection takes the example again; passes
over the full data still do.

A selection is counted when the example is a candidate again: at the next draw from the whole data set, or rounds later
with pools. Until then one bit of the example's streak marks it.

Cost: 8 bytes per example / ranks, only if the guard is on; a pass over them per draw, and two small all-gathers when
examples are quarantined.
"""

from typing import Any

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import blocks

IMPROVEMENT = 0.05
"""If the loss of an example falls by more than this share during a streak, the streak starts anew."""

Quarantined = list[tuple[int, float]]
"""(example id, its loss in nats per token) of each newly quarantined example."""


_SELECTED = 1 << 30
"""Bit of a streak: the last draw with this example as a candidate selected it, and that is not counted yet."""
_COUNT = _SELECTED - 1
"""Bits of a streak that hold the count."""


class Quarantine:
    """Streaks of useless selections, sharded by example id.

    Args:
        after: consecutive useless selections until an example is quarantined; at least 1.
        owners: which rank owns which example.

    Attributes:
        streak: int32 [owners.num_local], the count and the bit ``_SELECTED``.
        loss_at_start: fp32 [owners.num_local], the loss at the start of the streak.
        count: number of quarantined examples of all ranks.
    """

    def __init__(self, *, after: int, owners: ExampleSharding, device: torch.device):
        self.after, self.owners = after, owners
        self.streak = torch.zeros(owners.num_local, dtype=torch.int32, device=device)
        self.loss_at_start = torch.zeros(owners.num_local, dtype=torch.float32, device=device)
        self.count = 0

    def update(self, streak: Tensor, start: Tensor, *, scores: Tensor, losses: Tensor, threshold: float) -> Tensor:
        """Count, in place, the last selection of each candidate as useless or not.

        Args:
            streak, start: the attributes ``streak`` and ``loss_at_start`` of this rank's candidates.
            scores, losses: fp32 [n], importance and loss of each candidate.
            threshold: the smallest importance at which a selection is counted.

        Returns:
            int64 [m], indices of the candidates that are quarantined from now on.
        """
        new = [torch.zeros(0, dtype=torch.int64, device=scores.device)]
        for block in blocks(len(scores), device=scores.device):
            streaks, score = streak[block], scores[block]
            # Only selected examples with a score of at least the threshold, or with a count, change: these are few.
            # Their streak, less 1 where the score is below the threshold, is at least _SELECTED.
            changing = (streaks - (score < threshold).int() >= _SELECTED).nonzero().flatten()
            high = (score[changing] >= threshold) & (score[changing] < float("inf"))
            count, loss_before, loss = streaks[changing] & _COUNT, start[block][changing], losses[block][changing]
            already = count >= self.after
            continues = (count > 0) & (loss > (1 - IMPROVEMENT) * loss_before)
            new_count = torch.where(high, torch.where(continues, count + 1, 1), 0)
            starts = high & ~continues & ~already
            streaks[changing] = torch.where(already, count, new_count)
            start[block][changing] = torch.where(starts, loss, loss_before)
            new.append(block.start + changing[(new_count >= self.after) & ~already])
        return torch.cat(new)

    def quarantined(self, streak: Tensor) -> Tensor:
        """bool [n], the candidates that no selection takes."""
        return (streak & _COUNT) >= self.after

    def mark(self, streak: Tensor, *, weights: Tensor) -> None:
        """Mark, in place, the selected candidates: those with a weight above 0."""
        for block in blocks(len(streak), device=streak.device):
            streak[block].bitwise_and_(_COUNT).add_((weights[block] > 0).int().mul_(_SELECTED))

    def gather_quarantined(self, ids: Tensor, losses: Tensor) -> Quarantined:
        """This rank's newly quarantined examples -> those of all ranks, in the order of the ranks. A collective."""
        sharding, num = self.owners, len(ids)
        counts = sharding.gather(torch.tensor([num], device=ids.device))[0]
        max_count = int(counts.max())
        # Every rank sends as many rows; unused rows are 0.
        rows = torch.zeros(max_count, 2, dtype=torch.int64, device=ids.device)
        rows[:num] = torch.stack((ids, losses.view(torch.int32).long()), dim=1)
        gathered = sharding.gather(rows)[0]
        used = gathered[torch.arange(max_count, device=ids.device) < counts]
        return list(zip(used[:, 0].tolist(), used[:, 1].int().view(torch.float32).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "streak": self.owners.as_global(self.streak),
            "loss_at_start": self.owners.as_global(self.loss_at_start),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owners.as_global(self.streak).copy_(state["streak"])
        self.owners.as_global(self.loss_at_start).copy_(state["loss_at_start"])
        self.count = state["count"]
