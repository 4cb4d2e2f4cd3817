"""Rounds: decides the next pass, its examples and its length.

    round 0   warm-up: `warmup_passes` full passes
    round r   a selection from the round's pool, `interval` passes over it (soft draws anew for each)
    last      the tail: full passes on the full data

Cost: a draw (draws.py) before each pass over a selection, and the caller's ``score`` if the round is scored.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from titan_attent.data.plan.order import OrderCursor, Pass, Pool, SelectedSlots
from titan_attent.data.plan.packed import PackedPass, Packer
from titan_attent.data.plan.sampler import AnyPass
from titan_attent.foundations.counter_rng import derive_key, signed
from titan_attent.foundations.ledger import Ledger
from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.advice import warn_below_break_even
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.strategies import REDRAWN, is_weighted

Record = dict[str, Any]


class Rounds:
    """The current round and pass of a run, and the decision about the next pass.

    Args:
        draws: the selections.
        config: the teacher's configuration.
        plan: ratio and interval of each round.
        batch_size: G, examples of a global batch.
        data_seed: seed of the order within a pass.
        ledger: charged for scoring.
        score: called on all ranks with the step and a pool, to record the loss of each of its examples.
        on_quarantine: called with a JSON-ready record of each newly quarantined example.
        packer: packs the examples into windows; ``batch_size`` is then a number of windows. None if each row is one
            example.
        group_size: examples that stay next to each other in a full pass (data/plan/order.py).

    Attributes:
        round, pass_index: the round, and the pass within it.
        ratio, interval: the share selected in the round, and its number of passes.
        in_tail: the run is in its tail on the full data.
        num_batches: global batches of the current pass; 0 before the first pass.
        selecting: the current pass trains a selection.
        cursor: the span of the shuffled order that the last full pass or pool took.
    """

    def __init__(
        self,
        draws: Draws,
        config: TeacherConfig,
        plan: schedule.Plan,
        *,
        batch_size: int,
        data_seed: int,
        ledger: Ledger,
        score: Callable[[int, Pool], None] | None,
        on_quarantine: Callable[[Record], None] | None,
        packer: Packer | None = None,
        group_size: int = 1,
    ):
        self.draws, self.config, self.plan = draws, config, plan
        self.num_examples, self.batch_size, self.data_seed = draws.owners.num_examples, batch_size, data_seed
        self.ledger, self.score, self.on_quarantine = ledger, score, on_quarantine
        self.round = 0
        self.pass_index = 0
        self.ratio = 1.0
        self.interval = max(1, plan.warmup_passes)
        self.in_tail = False
        self.num_batches = 0
        self.selecting = False
        self.cursor = OrderCursor(self.num_examples, data_seed, group_size=group_size)
        self._warned = False
        self.packer = packer
        self._packed: PackedPass | None = None  # the packed pass of the current decision

    def decide(self, step: int) -> None:
        """Move to the pass that starts after ``step`` training steps. A collective if it trains a selection."""
        uniform = self.config.strategy == "uniform"
        tail = not uniform and step >= self.plan.tail_start
        self._packed = None
        self.pass_index += 1 if self.num_batches else 0
        if uniform or tail or self._warms_up(step):
            if tail and not self.in_tail:
                self._start_round(interval=1)
            self.in_tail, self.selecting = tail, False
            self.draws.audit = {}
            self.cursor.take(at_least=self.batch_size)
        else:
            self._select(step)
        self.num_batches = self._full_batches()
        if not (uniform or tail):
            self.num_batches = min(self.num_batches, self.plan.tail_start - step)

    def digest(self) -> int:
        """A signed 64-bit hash of the current decision, equal on all ranks that agree."""
        position = (self.round, self.pass_index, self.num_batches, int(self.in_tail), int(self.selecting))
        cursor = (self.cursor.order, self.cursor.start, self.cursor.size)
        return signed(derive_key(*position, *cursor, self.draws.digest if self.selecting else 0))

    def follow_plan(self, *, step: int, consumed: int) -> None:
        """Fit the current pass to this run's plan: the checkpoint may be of a run with other ``total_steps``.

        A tail on the full data ends now if this run has not reached its tail. Any other pass ends where this run's tail
        starts.

        Args:
            step: training steps done.
            consumed: number of them in the current pass.
        """
        if self.config.strategy == "uniform":
            return
        if self.in_tail:
            if step < self.plan.tail_start:
                self.num_batches = consumed
        else:
            until_tail = self.plan.tail_start - (step - consumed)
            self.num_batches = max(consumed, min(self._full_batches(), until_tail))

    def _warms_up(self, step: int) -> bool:
        """Whether the pass that starts after ``step`` steps belongs to the warm-up."""
        if self.packer is None:
            return step < self.plan.warmup_steps
        # The steps of a packed pass are known only once it is packed; the plan's number of steps is an estimate.
        return self.round == 0 and self.pass_index < self.plan.warmup_passes

    def _full_batches(self) -> int:
        """Global batches of the current pass, if the tail does not cut it short. A collective if passes are packed."""
        if self.packer is not None:
            return self._pack(self.packer).num_batches
        # Within its sources a selection may be smaller than a batch, which a mixture fills.
        return max(self.num_trained() // self.batch_size, int(self.draws.within is not None))

    def _pack(self, packer: Packer) -> PackedPass:
        if self._packed is None and self.selecting:
            self._packed = packer.pack(
                self.draws.selected(),
                (self.data_seed, self.round, self.pass_index),
                round=self.round,
                weighted=is_weighted(self.config),
                strategy=self.config.strategy,
            )
        elif self._packed is None:
            self._packed = packer.full_pass((self.data_seed, 0, self.cursor.order), round=self.round)
        return self._packed

    def covered_per_trained(self) -> float:
        """Number of examples of the pool per trained example; for packed passes, the same ratio of their windows."""
        if self.packer is None:
            return self.num_candidates() / self.num_trained()
        packed = self._pack(self.packer)
        return max(1.0, self.packer.examples.num_rows / packed.num_windows) if self.selecting else 1.0

    def num_trained(self) -> int:
        """Examples of the current pass, if the tail does not cut it short."""
        return self.draws.num_selected if self.selecting else self.cursor.size

    def num_candidates(self) -> int:
        """Candidates that the examples of the current pass were selected from; for a full pass, its examples."""
        return self.draws.size if self.selecting else self.cursor.size

    def _select(self, step: int) -> None:
        config = self.config
        self.in_tail = False  # a run resumed in its tail may have more steps now, and leave the tail
        new_round = not self.selecting or self.pass_index >= self.interval
        if new_round:
            if not self._warned and self.draws.num_draws > 1:
                self._warned = warn_below_break_even(self.ledger)
            self._start_round(interval=self.plan.interval(step))
            if config.pool_size:
                self.cursor.take(config.pool_size)
            self._maybe_score(step)
        if new_round or config.strategy in REDRAWN:
            seed = (config.seed, self.round, self.pass_index)
            ratio = self.plan.ratio(step) if new_round else self.ratio
            if self.draws.within is not None and config.ratio_schedule in DECIDED_BY_SCORES:
                ratio = None  # each source has its own
            self.ratio, quarantined = self.draws.draw(self._pool(), step=step, seed=seed, ratio=ratio)
            for example_id, loss in quarantined:
                if self.on_quarantine is not None:
                    self.on_quarantine({"step": step + 1, "round": self.round, "example_id": example_id, "loss": loss})
        # If nothing is left out, it is a full pass in exactly the order of strategy = "uniform".
        self.selecting = not (config.dry_run or self.draws.takes_all)
        if not (self.selecting or config.pool_size):
            self.cursor.take(at_least=self.batch_size)
        elif self.draws.takes_all and self.draws.never_selects and not config.dry_run:
            self.cursor.take_remaining()

    def _start_round(self, *, interval: int) -> None:
        self.round += 1
        self.pass_index = 0
        self.interval = interval

    def _maybe_score(self, step: int) -> None:
        scoring = self.config.scoring
        if scoring == "forward" or (scoring == "forward_once" and self.draws.num_draws == 0):
            assert self.score is not None
            with self.ledger.charge("score"):
                self.score(step, self._pool())
                self.draws.buffer.sync()
            self.ledger.examples_scored += self.draws.size

    def _pool(self) -> Pool:
        """The candidates of the round."""
        return self.cursor.pool() if self.config.pool_size else Pool.whole(self.num_examples)

    def build_pass(self) -> AnyPass:
        """The current pass. A collective if it trains a selection."""
        if self.packer is not None:
            packed = self._pack(self.packer)
            packed.num_batches = self.num_batches
            return packed
        build = partial(Pass, batch_size=self.batch_size, num_batches=self.num_batches, round=self.round)
        if not self.selecting:
            span = self.cursor.pool()  # already shuffled
            return build(span, SelectedSlots(span.size), order=None)
        order, weighted = (self.data_seed, self.round, self.pass_index), is_weighted(self.config)
        return build(self._pool(), self.draws.selected(), order=order, weighted=weighted, strategy=self.config.strategy)

    _POSITION = {
        **{name: name for name in ("round", "pass_index", "ratio", "interval", "num_batches", "selecting")},
        "annealing": "in_tail",
    }
    """Key in a checkpoint, which must never change -> attribute."""

    def state_dict(self) -> Record:
        return {
            "position": {key: getattr(self, name) for key, name in self._POSITION.items()},
            "cursor": self.cursor.state_dict(),
        }

    def load_state_dict(self, state: Record) -> None:
        for key, name in self._POSITION.items():
            setattr(self, name, state["position"][key])
        self.cursor.load_state_dict(state["cursor"])
        self._packed = None
