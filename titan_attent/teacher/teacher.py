"""The teacher: decides, pass after pass, which examples are trained and with what weights.

    round 0   warm-up: `warmup_passes` full passes; the losses seen are the first scores
    round r   choose k of the round's pool by importance, train `interval` passes over them (soft draws anew for each)
    last      anneal: full passes for the last `anneal_fraction` of the steps

The pool of a round is the whole data set, or the next ``pool_size`` examples of its shuffled order; full passes take
what is left of that order. With `shadow` a round is decided before every pass over its pool, logged, and not acted on.

Decisions depend on (seed, round, example id, buffer) and not on the number of ranks. The state is the buffer, a few
integers, and what draws.py keeps. A pass that was under way when a checkpoint was written is rebuilt from them.

Cost: a selection every pass (draws.py); for weighted passes an all-gather of 8 bytes and an all-reduce of 4 bytes a
trained example, in blocks of ``flush_every`` steps; scoring passes only where asked for.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from titan_attent.data.order import Cursor, Pass, Pool, SelectedPlaces
from titan_attent.foundations.keyed import fold_key, signed
from titan_attent.foundations.ledger import Ledger
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.window import neutral_statistics
from titan_attent.teacher import schedule
from titan_attent.teacher.advice import warn_below_break_even
from titan_attent.teacher.audit import Sources
from titan_attent.teacher.checks import check_parts, check_sizes
from titan_attent.teacher.config import TeacherConfig
from titan_attent.teacher.draws import Draws
from titan_attent.teacher.strategies import REDRAWN, is_weighted

Record = dict[str, Any]


class Teacher:
    """Rounds, passes and weights over the examples of ``buffer``.

    Args:
        buffer: the losses, whose sharding (mesh, device) the teacher shares.
        config: what to teach; validated here.
        batch_size: G, examples of a global batch over all ranks and microbatches.
        total_steps: training steps of the whole run; schedules and the anneal tail are fractions of it.
        data_seed: seed of the order within a pass.
        tokens_per_example: for the token rate of a ledger of its own.
        ledger: of the run, for what teaching costs; one of its own by default.
        reference: fp32 [num_local] reference losses of this rank's examples, for importance "excess_loss".
        vocab_size: V, for importance "attainment".
        sources: (name, first example id) of each stretch of the data set, for the audit by source.
        score: called with the step and a pool on all ranks to record the loss of each of its examples by a forward
            pass (``buffer.record(..., trained=False)``), for ``scoring`` other than "train".
        on_decision: called on every rank with a JSON-ready record of each pass that starts: its first step, and all
            scalars of :meth:`metrics`.
        on_quarantine: called on every rank with a JSON-ready record of each example that is set aside.
    """

    def __init__(
        self,
        buffer: LossBuffer,
        config: TeacherConfig,
        *,
        batch_size: int,
        total_steps: int,
        data_seed: int = 0,
        tokens_per_example: int = 1,
        ledger: Ledger | None = None,
        reference: Tensor | None = None,
        vocab_size: int | None = None,
        sources: Sources = (),
        score: Callable[[int, Pool], None] | None = None,
        on_decision: Callable[[Record], None] | None = None,
        on_quarantine: Callable[[Record], None] | None = None,
    ):
        config.validate()
        self.buffer, self.config, self.num_examples = buffer, config, buffer.sharding.num_examples
        self.batch_size, self.data_seed = batch_size, data_seed
        self.score, self.on_decision, self.on_quarantine = score, on_decision, on_quarantine
        check_sizes(config, num_examples=self.num_examples, batch_size=batch_size)
        check_parts(config, score=score, reference=reference, vocab_size=vocab_size, window=buffer.window)
        self.draws = Draws(
            buffer, config, batch_size=batch_size, reference=reference, vocab_size=vocab_size, sources=sources
        )
        self.ledger = ledger or Ledger(batch_size=batch_size, tokens_per_example=tokens_per_example)
        self.plan = schedule.Plan(config, steps_of_full_pass=self.num_examples // batch_size, total_steps=total_steps)

        self.round = 0
        self.pass_index = 0
        self.ratio = 1.0
        self.interval = max(1, config.warmup_passes)
        self.annealing = False
        self.num_batches = 0  # of the current pass; 0: no pass yet
        self.selecting = False  # the current pass trains a selection
        self.cursor = Cursor(self.num_examples, data_seed)  # the stretch that a full pass or a pool took last
        self._pass: Pass | None = None
        self._warned = False
        self._neutral_statistics = neutral_statistics(buffer.device)

    # -- passes ---------------------------------------------------------------------------------------------------

    def current_pass(self) -> Pass | None:
        """The pass in progress, None before the first; rebuilt (a collective) after a checkpoint was loaded."""
        if self._pass is None and self.num_batches:
            self._pass = self._build_pass()
        return self._pass

    def next_pass(self, *, step: int) -> Pass:
        """Decide the pass that starts after ``step`` training steps. A collective, on all ranks.

        Never on the hot path: host syncs, a selection and perhaps a scoring pass happen in here.
        """
        with self.ledger.charge("select"):
            self.buffer.sync()  # brings the peers' hashes of the decision before
            self.buffer.agreement.check()
            self._decide(step)
            self._pass = self._build_pass()
            self.buffer.agreement.announce(self._digest(), round=self.round)
        if self.on_decision is not None:
            self.on_decision(
                {"step": step + 1, "pass": self.pass_index, "num_steps": self.num_batches} | self.metrics()
            )
        return self._pass

    def _decide(self, step: int) -> None:
        uniform = self.config.strategy == "uniform"
        anneal = not uniform and step >= self.plan.anneal_start
        self.pass_index += 1 if self.num_batches else 0
        if uniform or anneal or step < self.plan.warmup_steps:
            if anneal and not self.annealing:
                self._start_round(interval=1)
            self.annealing, self.selecting = anneal, False
            self.draws.audit = {}
            self.cursor.take(at_least=self.batch_size)
        else:
            self._select(step)
        self.num_batches = self._num_trained() // self.batch_size
        if not (uniform or anneal):
            self.num_batches = min(self.num_batches, self.plan.anneal_start - step)

    def _digest(self) -> int:
        """A signed 64-bit hash of the decision in force, equal on all ranks that agree."""
        position = (self.round, self.pass_index, self.num_batches, int(self.annealing), int(self.selecting))
        cursor = (self.cursor.order, self.cursor.start, self.cursor.size)
        return signed(fold_key(*position, *cursor, self.draws.digest if self.selecting else 0))

    def follow_plan(self, *, step: int, consumed: int) -> None:
        """Fit the pass under way to this run's plan: the checkpoint may be of a run with other ``total_steps``.

        A tail on the full data ends where this run is not that far; any other pass ends where this run's tail starts.

        Args:
            step: training steps done.
            consumed: of them, in the pass under way.
        """
        if self.config.strategy == "uniform":
            return
        if self.annealing:
            if step < self.plan.anneal_start:
                self.num_batches = consumed
        else:
            until_tail = self.plan.anneal_start - (step - consumed)
            self.num_batches = max(consumed, min(self._num_trained() // self.batch_size, until_tail))
        self._pass = None

    def _num_trained(self) -> int:
        """Examples of the pass in progress, where nothing cuts it."""
        return self.draws.num_selected if self.selecting else self.cursor.size

    def _select(self, step: int) -> None:
        config = self.config
        self.annealing = False  # a resumed run may be longer than the one that was in its tail
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
            self.ratio, quarantined = self.draws.draw(self._pool(), step=step, seed=seed, ratio=ratio)
            for example_id, loss in quarantined:
                if self.on_quarantine is not None:
                    self.on_quarantine({"step": step + 1, "round": self.round, "example_id": example_id, "loss": loss})
        self.selecting = not config.shadow
        if config.shadow and not config.pool_size:
            self.cursor.take(at_least=self.batch_size)

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
                self.buffer.sync()
            self.ledger.examples_scored += self.draws.size

    def _pool(self) -> Pool:
        """The candidates of the round."""
        return self.cursor.pool() if self.config.pool_size else Pool.whole(self.num_examples)

    def _build_pass(self) -> Pass:
        build = partial(Pass, batch_size=self.batch_size, num_batches=self.num_batches, round=self.round)
        if not self.selecting:
            stretch = self.cursor.pool()  # shuffled already
            return build(stretch, SelectedPlaces(stretch.size), order=None)
        order, weighted = (self.data_seed, self.round, self.pass_index), is_weighted(self.config)
        return build(self._pool(), self.draws.selected(), order=order, weighted=weighted, strategy=self.config.strategy)

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def weights_every(self) -> int:
        """Global batches whose weights are asked for at once (:class:`TeachingSampler` does)."""
        return self.buffer.flush_every

    def weights_of(self, places: Tensor) -> Tensor:
        """The weights of places in the pool of the current pass. A collective without a host sync.

        Args:
            places: int64 [n] on any device, those that this rank asks for; equally many on every rank.

        Returns:
            fp32 [n] on the buffer's device; 0 for what the selection in force left out.
        """
        with self.ledger.charge("exchange"):
            return self.draws.weights_of(places)

    def loss_statistics(self, step: int) -> Tensor:
        """fp32 [3] on the buffer's device, for the weights of ``weighting = "loss"`` in training step ``step``."""
        if self.buffer.window is None or not self.selecting:
            return self._neutral_statistics
        return self.buffer.window.statistics(step)

    def batch_served(self) -> None:
        """A global batch of the current pass goes to training (:class:`TeachingSampler` calls it)."""
        self.ledger.batch_served(covered_per_trained=self.draws.size / self.draws.num_selected if self.selecting else 1)

    def step_done(self) -> None:
        """Call after every training step, on all ranks: exchanges losses when it is time."""
        with self.ledger.charge("exchange"):
            self.buffer.step_done()

    def metrics(self) -> dict[str, float]:
        """The ``teacher/*`` and ``ledger/*`` scalars as host numbers; no collective, no device sync."""
        selected, pool = self._num_trained(), self.draws.size if self.selecting else self.cursor.size
        position = {"teacher/round": self.round, "teacher/ratio": selected / max(1, pool), "teacher/selected": selected}
        return {name: float(value) for name, value in position.items()} | self.draws.audit | self.ledger.metrics()

    # -- checkpoint -----------------------------------------------------------------------------------------------

    _POSITION = ("round", "pass_index", "ratio", "interval", "annealing", "num_batches", "selecting")

    def state_dict(self) -> Record:
        """Everything needed to go on, on any number of ranks; a collective (the buffer is exchanged first).

        A RuntimeError if that exchange shows that the ranks have decided differently: no such state is worth keeping.
        """
        buffer = self.buffer.state_dict()
        self.buffer.agreement.check()
        state = {
            "buffer": buffer,
            "draws": self.draws.state_dict(),
            "position": {name: getattr(self, name) for name in self._POSITION},
            "cursor": self.cursor.state_dict(),
            # One leaf: DCP loads the keys that are there before loading, and this dictionary starts empty.
            "audit": json.dumps(self.draws.audit),
            "ledger": self.ledger.state_dict(),
        }
        return state if self.buffer.window is None else state | {"window": self.buffer.window.state_dict()}

    def load_state_dict(self, state: Record) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.draws.load_state_dict(state["draws"])
        for name in self._POSITION:
            setattr(self, name, state["position"][name])
        self.cursor.load_state_dict(state["cursor"])
        self.draws.audit = json.loads(state["audit"])
        self.ledger.load_state_dict(state["ledger"])
        if self.buffer.window is not None:
            self.buffer.window.load_state_dict(state["window"])
        self._pass = None
