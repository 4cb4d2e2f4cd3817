"""Guards: examples that never improve are set aside, and a round that a handful would rule is not selected.

A noisy, broken or unlearnable example keeps a high loss however often it is taught, and a teacher that follows the loss
teaches it for ever. The quarantine counts, for every example, the selections in a row that took it, found its
importance in the top ``QUANTILE`` of its pool, and brought its loss no more than ``IMPROVEMENT`` below where it stood
when the row began. After ``quarantine_after`` of them no selection takes it again; passes over the full data still do.

Cost: 8 bytes an example / ranks, kept only where it is asked for; one k-th largest a draw.
"""

from typing import Any

import torch
from torch import Tensor

from titan_attent.loss_records import Records
from titan_attent.sharding import ExampleSharding
from titan_attent.teacher.candidates import Candidates
from titan_attent.teacher.importance import kth_largest

QUANTILE = 0.01
"""The share of the pool, by importance, that is watched."""

IMPROVEMENT = 0.05
"""Share of its loss that an example must lose during the row, or it counts on."""

Quarantined = list[tuple[int, float]]
"""(example id, its loss in nats a token)."""


class Quarantine:
    """Streaks of useless selections and what came of them, sharded by example id.

    Args:
        after: selections in a row; at least 1.
        owners: who keeps which example.
    """

    def __init__(self, *, after: int, owners: ExampleSharding, device: torch.device):
        self.after, self.owners = after, owners
        self.streak = torch.zeros(owners.num_local, dtype=torch.int32, device=device)
        self.loss_at_start = torch.zeros(owners.num_local, dtype=torch.float32, device=device)
        self.count = 0

    def update(
        self, scores: Tensor, *, records: Records, taken_before: Tensor, candidates: Candidates
    ) -> tuple[Tensor, Quarantined]:
        """Count what the last selection brought. A collective, once a draw, before it.

        Args:
            scores: fp32 [num_local] importances of the candidates.
            records: of the candidates.
            taken_before: bool [num_local], taken by the selection before this one.

        Returns:
            (set aside: bool [num_local]; those newly set aside, in the order of their places, equal on all ranks).
        """
        streak, start = candidates.fetch([self.streak, self.loss_at_start])
        finite = torch.isfinite(scores)
        watched = kth_largest(scores, lambda n: max(1, int(QUANTILE * n)), where=finite, sharding=candidates.sharding)
        before = streak >= self.after
        if watched is None:
            return before, []
        high = finite & (scores >= watched)
        goes_on = (streak > 0) & (records.loss > (1 - IMPROVEMENT) * start)
        counted = torch.where(goes_on, streak + 1, 1)
        new_streak = torch.where(taken_before & ~before, torch.where(high, counted, 0), streak)
        new_start = torch.where(taken_before & high & ~goes_on & ~before, records.loss, start)
        candidates.store([self.streak, self.loss_at_start], [new_streak, new_start])
        after = new_streak >= self.after
        newly = self._listed(after & ~before, records.loss, candidates)
        self.count += len(newly)
        return after, newly

    def _listed(self, mask: Tensor, losses: Tensor, candidates: Candidates) -> Quarantined:
        sharding = candidates.sharding
        counts = sharding.gather(mask.sum()[None])[0].flatten().tolist()
        if not max(counts):
            return []
        # Rows of equal length: a rank with fewer leaves the rest at 0.
        rows = torch.zeros(max(counts), 2, dtype=torch.int64, device=losses.device)
        here = torch.stack((candidates.ids[mask], losses[mask].view(torch.int32).long()), dim=1)
        rows[: len(here)] = here
        gathered = sharding.gather(rows)[0].cpu()
        listed = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
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
