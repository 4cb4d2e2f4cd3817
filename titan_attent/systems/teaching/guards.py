"""Guards: examples that never improve are set aside, and a round that a handful would rule is not selected.

A noisy, broken or unlearnable example keeps a high loss however often it is taught, and a teacher that follows the loss
teaches it for ever. The quarantine counts, for every example, the selections in a row that took it, found its
importance in the top ``QUANTILE`` of its pool, and brought its loss no more than ``IMPROVEMENT`` below where it stood
when the row began. After ``quarantine_after`` of them no selection takes it again; passes over the full data still do.

A selection is counted when the example is a candidate again: at the next draw from the whole data set, rounds later
from pools. Until then one bit of the example's streak remembers it.

Cost: 8 bytes per example / ranks, kept only where it is asked for; a pass over them a draw, and where something is set
aside two small all-gathers.
"""

from typing import Any

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import blocks, is_positive

IMPROVEMENT = 0.05
"""Share of its loss that an example must lose during the row, or it counts on."""

Quarantined = list[tuple[int, float]]
"""(example id, its loss in nats per token)."""


_TAKEN = 1 << 30
"""In a streak: taken by the last draw that the example was a candidate of, and not counted yet."""
_COUNT = _TAKEN - 1


class Quarantine:
    """Streaks of useless selections and what came of them, sharded by example id.

    Args:
        after: selections in a row; at least 1.
        owners: who keeps which example.

    Attributes:
        streak: int32 [owners.num_local], the count, and the bit ``_TAKEN``.
        loss_at_start: fp32 [owners.num_local], where the loss stood when the row began.
        count: examples that are set aside, of all ranks.
    """

    def __init__(self, *, after: int, owners: ExampleSharding, device: torch.device):
        self.after, self.owners = after, owners
        self.streak = torch.zeros(owners.num_local, dtype=torch.int32, device=device)
        self.loss_at_start = torch.zeros(owners.num_local, dtype=torch.float32, device=device)
        self.count = 0

    def update(self, streak: Tensor, start: Tensor, *, scores: Tensor, losses: Tensor, watched: float) -> Tensor:
        """Count, in place, what the selections brought that took a candidate when it was one before.

        Args:
            streak, start: of this rank's candidates, as the attributes ``streak`` and ``loss_at_start``.
            scores, losses: fp32 [n], theirs.
            watched: the least importance of those watched.

        Returns:
            int64 [m], those among the n that are set aside from now on.
        """
        newly = [torch.zeros(0, dtype=torch.int64, device=scores.device)]
        for block in blocks(len(scores), device=scores.device):
            now, score = streak[block], scores[block]
            # Few change: what was taken, and is watched now or has a row. In integers: far below 0 is what was not
            # taken, and the sign of the difference is 0 or -1.
            watch = (score - watched).view(torch.int32) >> 31
            changing = (watch.add_(now) >= _TAKEN).nonzero().flatten()
            high = (score[changing] >= watched) & (score[changing] < float("inf"))
            count, since, loss = now[changing] & _COUNT, start[block][changing], losses[block][changing]
            before = count >= self.after
            goes_on = (count > 0) & (loss > (1 - IMPROVEMENT) * since)
            counted = torch.where(high, torch.where(goes_on, count + 1, 1), 0)
            starts = high & ~goes_on & ~before
            now[changing] = torch.where(before, count, counted)
            start[block][changing] = torch.where(starts, loss, since)
            newly.append(block.start + changing[(counted >= self.after) & ~before])
        return torch.cat(newly)

    def quarantined(self, streak: Tensor) -> Tensor:
        """bool [n], the candidates that no selection takes."""
        return (streak & _COUNT) >= self.after

    def mark(self, streak: Tensor, *, weights: Tensor) -> None:
        """Remember, in place, which candidates are taken: the ones with a weight above 0."""
        for block in blocks(len(streak), device=streak.device):
            streak[block].bitwise_and_(_COUNT).add_(is_positive(weights[block]).mul_(_TAKEN))

    def gather_quarantined(self, ids: Tensor, losses: Tensor) -> Quarantined:
        """This rank's examples that are newly set aside -> those of all ranks, in the order of the ranks. A
        collective."""
        sharding, num = self.owners, len(ids)
        counts = sharding.gather(torch.tensor([num], device=ids.device))[0]
        most = int(counts.max())
        # Rows of equal length: a rank with fewer leaves the rest at 0.
        rows = torch.zeros(most, 2, dtype=torch.int64, device=ids.device)
        rows[:num] = torch.stack((ids, losses.view(torch.int32).long()), dim=1)
        gathered = sharding.gather(rows)[0]
        listed = gathered[torch.arange(most, device=ids.device) < counts]
        return list(zip(listed[:, 0].tolist(), listed[:, 1].int().view(torch.float32).tolist(), strict=True))

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
