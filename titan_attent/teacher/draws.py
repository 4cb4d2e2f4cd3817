"""Draws: from a pool and what the buffer knows of it to a selection with weights. One at a time is in force.

    records of the candidates -> importance -> guards -> ratio -> strategy -> weights, bitmask, audit

Cost: 4 bytes an example / ranks for the last draw that took it, 4 bytes a candidate / ranks for its weight; a selection
a draw (selection.py), and what travels to and from a pool that is a stretch of the order (candidates.py).
"""

import logging
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.order import Pool, SelectedPlaces
from titan_attent.job_config import TeacherConfig
from titan_attent.loss_buffer import LossBuffer
from titan_attent.loss_records import NEVER
from titan_attent.sharding import ExampleSharding
from titan_attent.teacher import schedule
from titan_attent.teacher.audit import Sources, audit_choice, audit_scores, audit_sources
from titan_attent.teacher.candidates import Candidates
from titan_attent.teacher.guards import Quarantine, Quarantined
from titan_attent.teacher.importance import Known, above_lowest, clip_outliers, effective_share, importance
from titan_attent.teacher.selection import gather_bitmask
from titan_attent.teacher.strategies import Seed, choose

logger = logging.getLogger(__name__)


class Draws:
    """Selections from pools of one size.

    Args:
        buffer: the losses; its mesh shares the work.
        config: strategy, importance, guards.
        batch_size: G, the least that a selection holds.
        reference: fp32 [num_local] reference losses of the examples that this rank owns, for "excess_loss".
        vocab_size: V, for "attainment".
        sources: where in the data set each source's examples stand; empty for no audit by source.

    Attributes:
        size: P, candidates of a pool.
        num_selected: examples of the selection in force.
        weights: fp32 [places of this rank], 0 where not chosen.
        audit: the ``teacher/*`` scalars of the last draw.
    """

    def __init__(
        self,
        buffer: LossBuffer,
        config: TeacherConfig,
        *,
        batch_size: int,
        reference: Tensor | None = None,
        vocab_size: int | None = None,
        sources: Sources = (),
    ):
        self.buffer, self.config, self.batch_size = buffer, config, batch_size
        self.reference, self.vocab_size, self.sources = reference, vocab_size, sources
        self.owners = buffer.sharding
        self.size = config.pool_size or self.owners.num_examples
        self.sharding = ExampleSharding(self.size, mesh=self.owners.mesh) if config.pool_size else self.owners
        self.num_draws = 0
        self.digest = 0
        self.num_ever_chosen = 0
        self.num_selected = self.size
        self.weights = torch.zeros(self.sharding.num_local, dtype=torch.float32, device=buffer.device)
        self.last_draw = torch.full((self.owners.num_local,), NEVER, dtype=torch.int32, device=buffer.device)
        self.quarantine: Quarantine | None = None
        if config.quarantine_after:
            self.quarantine = Quarantine(after=config.quarantine_after, owners=self.owners, device=buffer.device)
        self.audit: dict[str, float] = {}

    def draw(self, pool: Pool, *, step: int, seed: Seed, ratio: float | None) -> tuple[float, Quarantined]:
        """Choose from ``pool``, from the losses known now. A collective, with host syncs.

        Args:
            step: training steps done.
            seed: of the draw: (seed, round, pass).
            ratio: the share to select; None for the adaptive one.

        Returns:
            (ratio, examples that are set aside from now on).
        """
        config, sharding = self.config, self.sharding
        self.buffer.sync()
        candidates = Candidates(pool, owners=self.owners, sharding=sharding, device=self.buffer.device)
        records = self.buffer.records().moved(candidates.fetch, sharding)
        (last_draw,) = candidates.fetch([self.last_draw])
        reference = None if self.reference is None else candidates.fetch([self.reference])[0]
        known = Known(reference=reference, vocab_size=self.vocab_size)
        scores = importance(records, name=config.importance, known=known)
        excluded: Tensor | None = None
        newly: Quarantined = []
        if self.quarantine is not None:
            taken_before = (last_draw == self.num_draws - 1) & (last_draw != NEVER)
            excluded, newly = self.quarantine.update(
                scores, records=records, taken_before=taken_before, candidates=candidates
            )

        clipped = clip_outliers(scores, sharding=sharding)
        if ratio is None:
            share = effective_share(clipped, sharding=sharding)
            ratio = schedule.adaptive_ratio(share, lowest=config.initial_ratio, highest=config.final_ratio)
        share = effective_share(above_lowest(clipped, sharding=sharding), sharding=sharding)
        falls_back = config.strategy != "random" and share < config.min_effective_sample_size
        if falls_back:
            logger.warning(
                f"The pass after step {step} trains its whole pool: the effective sample size of the importances is "
                f"{share:.2%} of the pool, under teacher.min_effective_sample_size = {config.min_effective_sample_size}"
            )
            weights, self.num_selected = torch.ones_like(self.weights), self.size
        else:
            weights, self.num_selected = choose(
                scores,
                k=schedule.selection_size(self.size, ratio=ratio, batch_size=self.batch_size),
                config=config,
                seed=seed,
                candidates=candidates,
                excluded=excluded,
                at_least=self.batch_size,
            )
        choice, num_newly = audit_choice(
            weights=weights, records=records, last_draw=last_draw, draw=self.num_draws, step=step
        )
        candidates.store([self.last_draw], [torch.where(weights > 0, self.num_draws, last_draw)])
        self.weights.copy_(weights)
        self.num_draws += 1
        self.num_ever_chosen += num_newly
        self.audit = {
            "teacher/ratio": self.num_selected / self.size,
            "teacher/selected": float(self.num_selected),
            **audit_scores(scores, sharding=sharding),
            **choice,
            "teacher/never_selected": 1 - self.num_ever_chosen / self.owners.num_examples,
            "teacher/nonfinite": float(self.buffer.num_nonfinite),
            "teacher/fallback": float(falls_back),
        }
        if self.quarantine is not None:
            self.audit["teacher/quarantined"] = float(self.quarantine.count)
        if len({name for name, _ in self.sources}) > 1:
            self.audit |= audit_sources(self.sources, weights=weights, ids=candidates.ids, sharding=sharding)
        return ratio, newly

    def selected(self) -> SelectedPlaces:
        """The places in force, on every rank. A collective."""
        return SelectedPlaces(self.size, bitmask=gather_bitmask(self.weights > 0, sharding=self.sharding))

    def weights_of(self, places: Tensor) -> Tensor:
        """This rank's places, int64 [n] on any device -> their weights, fp32 [n]. A collective without a host sync."""
        asked, _ = self.sharding.gather(places.to(self.buffer.device, non_blocking=True))
        # Each place has one owner; the others add zeros, so the sum is exact.
        padded = torch.cat((self.weights, self.weights.new_zeros(1)))
        answers = padded[self.sharding.local_index(asked, elsewhere=self.sharding.num_local)]
        return self.sharding.sum(answers)[self.sharding.rank]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "weights": self.sharding.as_global(self.weights),
            "last_draw": self.owners.as_global(self.last_draw),
            "counts": {name: getattr(self, name) for name in ("num_draws", "num_ever_chosen", "num_selected")},
        }
        return state if self.quarantine is None else state | {"quarantine": self.quarantine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sharding.as_global(self.weights).copy_(state["weights"])
        self.owners.as_global(self.last_draw).copy_(state["last_draw"])
        for name, value in state["counts"].items():
            setattr(self, name, value)
        if self.quarantine is not None:
            self.quarantine.load_state_dict(state["quarantine"])
