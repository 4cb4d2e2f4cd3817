"""Draws: from a pool and what the buffer knows of it to a selection with weights. One at a time is in force.

    records of the candidates -> importance -> scores -> guards -> ratio -> strategy -> weights, bitmask, audit

Cost: 4 bytes per example / ranks for the last draw that took it, 4 bytes a candidate / ranks for its weight. A draw
takes 17 bytes a local candidate while it runs and 14 collectives for any number of ranks (4 more for a median, 4 for
ties, up to 7 where something is set aside), a few KiB each, except the floor's 512 KiB; and what travels to and from a
pool that is a stretch of the order (candidates.py).
"""

import struct
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool, SelectedPlaces
from titan_attent.foundations.counter_rng import derive_key, signed
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.records import NEVER
from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.advice import warn_of_fallback
from titan_attent.systems.teaching.audit import Sources, audit_selection, audit_scores
from titan_attent.systems.teaching.candidates import Candidates, PoolRecords
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.guards import Quarantine, Quarantined
from titan_attent.systems.teaching.importance import Evidence, importance, reads
from titan_attent.systems.teaching.radix import blocks, is_positive, replace_bits
from titan_attent.systems.teaching.ratios import RatioFromScores
from titan_attent.systems.teaching.selection import gather_bitmask
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO, Seed, choose


class Draws:
    """Selections from pools of one size.

    Args:
        buffer: the losses; its mesh shares the work.
        config: strategy, importance, guards.
        batch_size: G, the least that a selection holds.
        expert: fp32 [num_local] an expert's losses of the examples that this rank owns, for "excess_loss".
        amateur: the same of an amateur.
        chance_loss: what a blind guess costs, for "attainment".
        trusted: fp32, sorted: cross-entropy differences of trusted examples, for the calibrated schedule.
        sources: where in the data set each source's examples stand; empty for no audit by source.
        bound: how often the run may train an example, where the scores decide the ratio (schedule.py).

    Attributes:
        size: P, candidates of a pool.
        num_selected: examples of the selection in force.
        weights: fp32 [places of this rank], 0 where not chosen.
        digest: signed 64-bit hash of the last decision of all ranks of the buffer's mesh: their choices with the
            weights, the draw's number, its size and ratio. Equal for every number of ranks.
        takes_all: the scores say that nothing is to be left out.
        audit: the ``teacher/*`` scalars of the last draw.
    """

    def __init__(
        self,
        buffer: LossBuffer,
        config: TeacherConfig,
        *,
        batch_size: int,
        expert: Tensor | None = None,
        amateur: Tensor | None = None,
        chance_loss: float | None = None,
        trusted: Tensor | None = None,
        sources: Sources = (),
        bound: schedule.RepeatBound = schedule.UNBOUNDED,
    ):
        self.buffer, self.config, self.batch_size = buffer, config, batch_size
        self.chance_loss, self.sources = chance_loss, sources
        self.on_disk = {"expert": expert, "amateur": amateur}
        self.owners = buffer.sharding
        self.size = config.pool_size or self.owners.num_examples
        self.sharding = ExampleSharding(self.size, mesh=self.owners.mesh) if config.pool_size else self.owners
        self.ratios = RatioFromScores(
            config, size=self.size, bound=bound, trusted=trusted, all_scores=self._differences
        )
        self.num_draws = 0
        self.digest = 0
        self.num_ever_chosen = 0
        self.num_selected = self.size
        self.weights = torch.zeros(self.sharding.num_local, dtype=torch.float32, device=buffer.device)
        self.last_draw = torch.full((self.owners.num_local,), NEVER, dtype=torch.int32, device=buffer.device)
        self.quarantine: Quarantine | None = None
        if config.keeps_streaks:
            self.quarantine = Quarantine(after=config.quarantine_after, owners=self.owners, device=buffer.device)
        self.takes_all = False
        self.audit: dict[str, float] = {}
        self._warned = False

    def draw(self, pool: Pool, *, step: int, seed: Seed, ratio: float | None) -> tuple[float, Quarantined]:
        """Choose from ``pool``, from the losses known now. A collective, with host syncs.

        Args:
            step: training steps done.
            seed: of the draw: (seed, round, pass).
            ratio: the share to select; None where the scores decide it.

        Returns:
            (ratio, examples that are set aside from now on).
        """
        config = self.config
        self.buffer.sync()
        candidates = Candidates(pool, owners=self.owners, sharding=self.sharding, device=self.buffer.device)
        seen = self._fetch(candidates)
        known = Evidence(expert=seen.expert, amateur=seen.amateur, chance_loss=self.chance_loss)
        records = seen.records
        if seen.amateur is not None and "loss" in reads(config.importance):
            records = records.with_readings(seen.amateur, everywhere=config.scoring == "amateur")
        scores = Scores(importance(records, name=config.importance, evidence=known), sharding=self.sharding)
        newly, excluded = self._measure(scores, seen, candidates)
        metrics, audit = scores.metrics, audit_scores(scores)
        self.takes_all = False
        if ratio is None:
            ratio = self.ratios.decide(scores, batch_size=self.batch_size)
            self.takes_all = ratio == 1.0 and excluded is None and config.strategy in READ_THE_RATIO
        falls_back = config.strategy != "random" and metrics.shifted_share < config.min_effective_sample_size
        if falls_back and not self._warned:
            warn_of_fallback(step, share=metrics.shifted_share, least=config.min_effective_sample_size)
            self._warned = True
        if falls_back or self.takes_all:
            weights, self.num_selected = torch.ones_like(self.weights), self.size
        else:
            weights, self.num_selected = choose(
                scores if excluded is None else scores.without(excluded),
                k=schedule.selection_size(self.size, ratio=ratio, batch_size=self.batch_size),
                config=config,
                seed=seed,
                candidates=candidates,
                excluded=excluded,
                at_least=self.batch_size,
            )
        choice = audit_selection(
            candidates,
            weights=weights,
            records=seen.records,
            last_draw=seen.last_draw,
            draw=self.num_draws,
            step=step,
            sources=self.sources,
        )
        self.weights = weights
        self._remember(seen, candidates)
        self.digest = self._digest(choice.digest, ratio)
        self.num_draws += 1
        self.num_ever_chosen += choice.num_new
        self.audit = {
            "teacher/ratio": self.num_selected / self.size,
            "teacher/selected": float(self.num_selected),
            **audit,
            **choice.scalars,
            "teacher/never_selected": 1 - self.num_ever_chosen / self.owners.num_examples,
            "teacher/nonfinite": float(self.buffer.num_nonfinite),
            "teacher/fallback": float(falls_back),
        }
        if self.quarantine is not None:
            self.audit["teacher/quarantined"] = float(self.quarantine.count)
        return ratio, newly

    def _fetch(self, candidates: Candidates) -> PoolRecords:
        kept = {"last_draw": self.last_draw}
        kept |= {name: losses for name, losses in self.on_disk.items() if losses is not None}
        if self.quarantine is not None:
            kept |= {"streak": self.quarantine.streak, "start": self.quarantine.loss_at_start}
        here: list[Tensor] = []

        def fetch(tensors: list[Tensor]) -> list[Tensor]:
            fetched = candidates.fetch(tensors + list(kept.values()))
            here.extend(fetched[len(tensors) :])
            return fetched[: len(tensors)]

        records = self.buffer.records().moved(fetch, self.sharding)
        return PoolRecords(records, **dict(zip(kept, here, strict=True)))

    def _differences(self) -> Scores:
        """What the calibrated schedule compares with trusted text, of all examples of the data set."""
        known = Evidence(expert=self.on_disk["expert"], amateur=self.on_disk["amateur"])
        return Scores(importance(self.buffer.records(), name=self.config.importance, evidence=known), sharding=self.owners)

    def _measure(self, scores: Scores, seen: PoolRecords, candidates: Candidates) -> tuple[Quarantined, Tensor | None]:
        """Measure the scores, and count what the last selections brought.

        Returns:
            (examples newly set aside; bool [num_local], all candidates that are, or None where nothing is).
        """
        guard, losses = self.quarantine, seen.records.loss
        if guard is None or seen.streak is None or seen.start is None:
            return [], None
        places = torch.zeros(0, dtype=torch.int64, device=losses.device)
        if scores.summary.num_finite:
            places = guard.update(
                seen.streak, seen.start, scores=scores.values, losses=losses, threshold=scores.summary.quarantine_threshold
            )
        _, (num_new,) = scores.compute_metrics(torch.tensor([len(places)], device=losses.device))
        newly: Quarantined = []
        if num_new:
            newly = guard.gather_quarantined(candidates.ids_of(places), losses[places])
            guard.count += num_new
        return newly, guard.quarantined(seen.streak) if guard.count else None

    def _remember(self, seen: PoolRecords, candidates: Candidates) -> None:
        """Bring what this draw decided to the owners."""
        targets, values = [self.last_draw], [seen.last_draw]
        for block in blocks(len(self.weights), device=self.weights.device):
            replace_bits(seen.last_draw[block], self.num_draws, where=is_positive(self.weights[block]).neg_())
        guard = self.quarantine
        if guard is not None and seen.streak is not None and seen.start is not None:
            guard.mark(seen.streak, weights=self.weights)
            targets += [guard.streak, guard.loss_at_start]
            values += [seen.streak, seen.start]
        candidates.store(targets, values)

    def _digest(self, choice: int, ratio: float) -> int:
        (bits,) = struct.unpack("<q", struct.pack("<d", ratio))
        return signed(derive_key(self.num_draws, self.num_selected, bits, choice))

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
