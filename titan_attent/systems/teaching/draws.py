"""Draws: from a pool and the records of its examples to a selection with weights. Only the last draw's selection is
current.

    records of the candidates -> importance -> scores -> quarantine -> ratio -> strategy -> weights, bitmask, audit

Cost in memory on each rank: 4 bytes per local example for the last draw that selected it, 4 bytes per local candidate
for its weight, and 17 bytes per local candidate during a draw. Where examples differ in length, 4 bytes per local
example for its tokens. Cost in collectives per draw: 14 for any number of
ranks, 4 more for a median, 4 for ties, up to 7 if examples are quarantined. Each is a few KiB, except 512 KiB for the
minimum probability of the soft draw. If the pool is a span of the shuffled order, its data is exchanged with the owners
as well (candidates.py).
"""

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool, SelectedSlots
from titan_attent.foundations.counter_rng import derive_key, signed
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.records import NEVER
from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.advice import warn_of_fallback
from titan_attent.systems.teaching.audit import Sources, audit_scores, audit_selection
from titan_attent.systems.teaching.by_source import WithinSources
from titan_attent.systems.teaching.candidates import Candidates, PoolRecords
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.guards import Quarantine, Quarantined
from titan_attent.systems.teaching.importance import Evidence, importance, reads
from titan_attent.systems.teaching.radix import blocks
from titan_attent.systems.teaching.ratios import RatioFromScores
from titan_attent.systems.teaching.selection import gather_bitmask
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO, Seed, choose
from titan_attent.systems.teaching.tokens import Tokens


class Draws:
    """Selections from pools of one size.

    Args:
        buffer: the losses; the work is sharded over its mesh.
        config: strategy, importance, guards.
        batch_size: G, the smallest size of a selection: examples, or tokens where ``tokens`` are given.
        expert: fp32 [num_local], an expert's losses of the examples that this rank owns.
        amateur: fp32 [num_local], an amateur's losses of these examples.
        chance_loss: the loss of a uniform guess, for "attainment".
        trusted: fp32, sorted: cross-entropy differences of trusted examples, for the calibrated schedule.
        sources: the spans of the data set by source; empty for no audit by source.
        bound: how often the run may train an example if the scores decide the ratio (schedule.py).
        tokens: tokens of the examples that this rank owns, for ratios that are shares of tokens; None if all examples
            are equally long. Not with a ``pool_size``.
        within: selects within each source (by_source.py); made from this object. None to select among all candidates.

    Attributes:
        size: P, candidates of a pool.
        num_counted: candidates of a pool, or their tokens: the whole of which a ratio is a share.
        num_selected: number of examples of the current selection.
        num_counted_selected: the same, or their tokens.
        weights: fp32 [local slots], 0 for candidates that are not selected.
        digest: signed 64-bit hash of the last decision of all ranks of the buffer's mesh: the selected examples with
            their weights, the draw's number, its size and ratio. Equal for every number of ranks.
        takes_all: whether the scores leave nothing out.
        audit: the ``teacher/*`` scalars of the last draw.
        watch: called on all ranks at the end of each draw with the candidates, their scores and their weights; it must
            not change them.
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
        tokens: Tokens | None = None,
        within: Callable[[Callable[[], Scores]], WithinSources] | None = None,
    ):
        assert (tokens is None and within is None) or not config.pool_size
        self.buffer, self.config, self.batch_size = buffer, config, batch_size
        self.chance_loss, self.sources = chance_loss, sources
        self.on_disk = {"expert": expert, "amateur": amateur}
        self.owners = buffer.sharding
        self.size = config.pool_size or self.owners.num_examples
        self.sharding = ExampleSharding(self.size, mesh=self.owners.mesh) if config.pool_size else self.owners
        self.tokens = tokens
        self.num_counted = self.size if tokens is None else tokens.total
        self.ratios = RatioFromScores(
            config,
            size=self.num_counted,
            bound=bound,
            trusted=trusted,
            all_scores=self._all_scores,
            noun="examples" if tokens is None else "tokens",
        )
        self.within = None if within is None else within(self._all_scores)
        self.num_draws = 0
        self.digest = 0
        self.num_ever_chosen = 0
        self.num_selected, self.num_counted_selected = self.size, self.num_counted
        self.weights = torch.zeros(self.sharding.num_local, dtype=torch.float32, device=buffer.device)
        self.last_draw = torch.full((self.owners.num_local,), NEVER, dtype=torch.int32, device=buffer.device)
        self.quarantine: Quarantine | None = None
        if config.keeps_streaks:
            self.quarantine = Quarantine(after=config.quarantine_after, owners=self.owners, device=buffer.device)
        self.takes_all = False
        self.audit: dict[str, float] = {}
        self._fallback_warned = False
        self.watch: Callable[[Candidates, Scores, Tensor], None] | None = None

    def draw(self, pool: Pool, *, step: int, seed: Seed, ratio: float | None) -> tuple[float, Quarantined]:
        """Select from ``pool`` by the losses recorded so far. A collective, with host syncs.

        Args:
            step: training steps done.
            seed: seed of the draw: (seed, round, pass).
            ratio: the share to select; None if the scores decide it.

        Returns:
            (ratio, newly quarantined examples).
        """
        config = self.config
        self.buffer.sync()
        candidates = Candidates(
            pool, owners=self.owners, sharding=self.sharding, device=self.buffer.device, tokens=self.tokens
        )
        fetched = self._fetch(candidates)
        evidence = Evidence(expert=fetched.expert, amateur=fetched.amateur, chance_loss=self.chance_loss)
        records = fetched.records
        if fetched.amateur is not None and "loss" in reads(config.importance):
            records = records.with_scores(fetched.amateur, replace_all=config.scoring == "amateur")
        values = importance(records, name=config.importance, evidence=evidence)
        scores = Scores(values, sharding=self.sharding, tokens=self.tokens)
        quarantined, excluded = self._update_quarantine(scores, fetched, candidates)
        metrics, audit = scores.metrics, audit_scores(scores)
        if self.within is None:
            weights, ratio, falls_back = self._choose(scores, candidates, seed=seed, ratio=ratio, excluded=excluded)
        else:
            chosen = self.within.choose(scores, candidates, seed=seed, ratio=ratio, excluded=excluded)
            weights, self.takes_all, falls_back = chosen.weights, chosen.takes_all, chosen.num_fallbacks > 0
        if falls_back and not self._fallback_warned:
            warn_of_fallback(step, share=metrics.shifted_share, minimum=config.min_effective_sample_size)
            self._fallback_warned = True
        selection = audit_selection(
            candidates,
            weights=weights,
            records=fetched.records,
            last_draw=fetched.last_draw,
            draw=self.num_draws,
            step=step,
            sources=self.sources,
        )
        self.weights = weights
        self.num_selected, self.num_counted_selected = selection.num_chosen, selection.num_counted
        if ratio is None:  # of each source its scores have decided it
            ratio = self.num_counted_selected / self.num_counted
        self._store(fetched, candidates)
        self.digest = self._digest(selection.digest, ratio)
        self.num_draws += 1
        self.num_ever_chosen += selection.num_new
        self.audit = {
            "teacher/ratio": self.num_counted_selected / self.num_counted,
            "teacher/selected": float(self.num_selected),
            **audit,
            **selection.scalars,
            "teacher/never_selected": 1 - self.num_ever_chosen / self.owners.num_examples,
            "teacher/nonfinite": float(self.buffer.num_nonfinite),
            "teacher/fallback": float(falls_back),
        }
        if self.quarantine is not None:
            self.audit["teacher/quarantined"] = float(self.quarantine.count)
        if self.watch is not None:
            self.watch(candidates, scores, weights)
        return ratio, quarantined

    def _choose(
        self, scores: Scores, candidates: Candidates, *, seed: Seed, ratio: float | None, excluded: Tensor | None
    ) -> tuple[Tensor, float, bool]:
        """(weights, ratio, whether a few examples would dominate a selection) of a draw among all candidates."""
        config = self.config
        self.takes_all = False
        if ratio is None:
            ratio = self.ratios.decide(scores, batch_size=self.batch_size)
            self.takes_all = ratio == 1.0 and excluded is None and config.strategy in READ_THE_RATIO
        share = scores.metrics.shifted_share
        falls_back = config.strategy != "random" and share < config.min_effective_sample_size
        if falls_back or self.takes_all:
            return torch.ones_like(self.weights), ratio, falls_back
        weights = choose(
            scores if excluded is None else scores.without(excluded),
            k=schedule.selection_size(self.num_counted, ratio=ratio, batch_size=self.batch_size),
            config=config,
            seed=seed,
            candidates=candidates,
            excluded=excluded,
            at_least=self.batch_size,
        )
        return weights, ratio, falls_back

    @property
    def never_selects(self) -> bool:
        """Whether every draw of the run takes all candidates."""
        if self.within is None:
            return self.ratios.never_selects
        return all(pool.ratios.never_selects for pool in self.within.pools)

    def _fetch(self, candidates: Candidates) -> PoolRecords:
        """Bring the owners' data to this rank's slots. A collective."""
        owned = {"last_draw": self.last_draw}
        owned |= {name: losses for name, losses in self.on_disk.items() if losses is not None}
        if self.quarantine is not None:
            owned |= {"streak": self.quarantine.streak, "start": self.quarantine.loss_at_start}
        fetched: list[Tensor] = []

        def fetch(tensors: list[Tensor]) -> list[Tensor]:
            values = candidates.fetch(tensors + list(owned.values()))
            fetched.extend(values[len(tensors) :])
            return values[: len(tensors)]

        records = self.buffer.records().moved(fetch, self.sharding)
        return PoolRecords(records, **dict(zip(owned, fetched, strict=True)))

    def _all_scores(self) -> Scores:
        """Scores of all examples of the data set, which the calibrated schedule compares with trusted text."""
        evidence = Evidence(expert=self.on_disk["expert"], amateur=self.on_disk["amateur"])
        values = importance(self.buffer.records(), name=self.config.importance, evidence=evidence)
        return Scores(values, sharding=self.owners, tokens=self.tokens)

    def _update_quarantine(
        self, scores: Scores, fetched: PoolRecords, candidates: Candidates
    ) -> tuple[Quarantined, Tensor | None]:
        """Compute the metrics of the scores, and count selections that did not lower an example's loss.

        Returns:
            (newly quarantined examples; bool [num_local], all quarantined candidates, or None if there are none).
        """
        guard, losses = self.quarantine, fetched.records.loss
        if guard is None or fetched.streak is None or fetched.start is None:
            return [], None
        slots = torch.zeros(0, dtype=torch.int64, device=losses.device)
        if scores.summary.num_finite:
            slots = guard.update(
                fetched.streak,
                fetched.start,
                scores=scores.values,
                losses=losses,
                threshold=scores.summary.quarantine_threshold,
            )
        _, (num_new,) = scores.compute_metrics(torch.tensor([len(slots)], device=losses.device))
        new: Quarantined = []
        if num_new:
            new = guard.gather_quarantined(candidates.ids_of(slots), losses[slots])
            guard.count += num_new
        return new, guard.quarantined(fetched.streak) if guard.count else None

    def _store(self, fetched: PoolRecords, candidates: Candidates) -> None:
        """Bring the decisions of this draw to the owners."""
        targets, values = [self.last_draw], [fetched.last_draw]
        for block in blocks(len(self.weights), device=self.weights.device):
            fetched.last_draw[block].masked_fill_(self.weights[block] > 0, self.num_draws)
        guard = self.quarantine
        if guard is not None and fetched.streak is not None and fetched.start is not None:
            guard.mark(fetched.streak, weights=self.weights)
            targets += [guard.streak, guard.loss_at_start]
            values += [fetched.streak, fetched.start]
        candidates.store(targets, values)

    def _digest(self, selection: int, ratio: float) -> int:
        (bits,) = struct.unpack("<q", struct.pack("<d", ratio))
        return signed(derive_key(self.num_draws, self.num_selected, bits, selection))

    def selected(self) -> SelectedSlots:
        """The selected slots, on every rank. A collective."""
        return SelectedSlots(self.size, bitmask=gather_bitmask(self.weights > 0, sharding=self.sharding))

    def weights_of(self, slots: Tensor) -> Tensor:
        """Slots, int64 [n] on any device -> their weights, fp32 [n]. A collective without a host sync."""
        requested, _ = self.sharding.gather(slots.to(self.buffer.device, non_blocking=True))
        # Each slot has one owner, and all other ranks add zeros, so the sum is exact.
        padded = torch.cat((self.weights, self.weights.new_zeros(1)))
        local_weights = padded[self.sharding.local_index(requested, elsewhere=self.sharding.num_local)]
        return self.sharding.sum(local_weights)[self.sharding.rank]

    @property
    def _saved_counts(self) -> tuple[str, ...]:
        names = ("num_draws", "num_ever_chosen", "num_selected")
        return names if self.tokens is None else (*names, "num_counted_selected")

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "weights": self.sharding.as_global(self.weights),
            "last_draw": self.owners.as_global(self.last_draw),
            "counts": {name: getattr(self, name) for name in self._saved_counts},
        }
        return state if self.quarantine is None else state | {"quarantine": self.quarantine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sharding.as_global(self.weights).copy_(state["weights"])
        self.owners.as_global(self.last_draw).copy_(state["last_draw"])
        for name, value in state["counts"].items():
            setattr(self, name, value)
        if self.tokens is None:
            self.num_counted_selected = self.num_selected
        if self.quarantine is not None:
            self.quarantine.load_state_dict(state["quarantine"])
