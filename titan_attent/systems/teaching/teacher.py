"""The teacher: decides, pass after pass, which examples are trained and with what weights.

    round 0   warm-up: `warmup_passes` full passes; the losses seen are the first scores
    round r   select k of the round's pool by importance, train `interval` passes over them (soft draws anew for each)
    last      the tail: full passes for the last `full_data_tail` of the steps

The pool of a round is the whole data set, or the next ``pool_size`` examples of its shuffled order; a full pass takes
the remaining examples of that order. With `dry_run` a round is decided and logged before every pass over its pool, but
the pass trains on the whole pool.

Decisions depend on (seed, round, example id, buffer) and not on the number of ranks. The state is the buffer, a few
integers, and the state of draws.py. The current pass of a checkpoint is rebuilt from them.

Where examples are packed, they differ in length: ratios, repeats and the smallest selection then count tokens.

Cost: a selection per pass (draws.py); for weighted passes an all-gather of 8 bytes and an all-reduce of 4 bytes per
trained example, in blocks of ``flush_every`` steps; scoring passes only if configured.
"""

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import AnyPass
from titan_attent.foundations.ledger import Ledger
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.window import neutral_statistics
from titan_attent.systems.teaching.audit import Sources
from titan_attent.systems.teaching.by_source import WithinSources
from titan_attent.systems.teaching.checks import check_cut_examples, check_inputs, check_sizes
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.forecast import log_forecast
from titan_attent.systems.teaching.rounds import Record, Rounds
from titan_attent.systems.teaching.rule import with_rule
from titan_attent.systems.teaching.schedule import Plan, repeat_bound
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO
from titan_attent.systems.teaching.tokens import Amounts, Tokens


class Teacher:
    """Rounds, passes and weights over the examples of ``buffer``.

    Args:
        buffer: the losses; the teacher uses its sharding (mesh, device).
        config: the configuration; validated here.
        batch_size: G, examples of a global batch over all ranks and microbatches.
        total_steps: training steps of the whole run; schedules and the tail are fractions of it.
        data_seed: seed of the order within a pass.
        tokens_per_example: used for the token rate of the default ledger.
        ledger: the run's ledger, for the cost of teaching; by default a new one.
        expert: fp32 [num_local], an expert's losses of this rank's examples, for "excess_loss" and
            "cross_entropy_difference".
        amateur: fp32 [num_local], an amateur's losses of these examples.
        trusted: cross-entropy differences of trusted held-out examples, for ``ratio_schedule = "calibrated"``.
        chance_loss: the loss of a uniform guess, for importance "attainment".
        sources: (name, first example id) of each span of the data set, for the audit by source.
        score: called on all ranks with the step and a pool, to record the loss of each of its examples by a forward
            pass (``buffer.record(..., trained=False)``); for ``scoring`` other than "train".
        on_decision: called on every rank with a JSON-ready record of each pass that starts: its first step, and all
            scalars of :meth:`metrics`.
        on_quarantine: called on every rank with a JSON-ready record of each newly quarantined example.
        within: source -> its mean share of what the run trains, with a mixture (data/plan/mixture.py): the teacher then
            selects within each source. None to select among all examples.
        packer: packs the examples into windows; ``batch_size`` is then a number of windows. Each rank reads the lengths
            of its examples here. None if each row of a batch is one example.
        group_size: examples that stay next to each other in a full pass, for ``weighting = "worst_case"``.
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
        expert: Tensor | None = None,
        amateur: Tensor | None = None,
        trusted: Sequence[float] | None = None,
        chance_loss: float | None = None,
        sources: Sources = (),
        score: Callable[[int, Pool], None] | None = None,
        on_decision: Callable[[Record], None] | None = None,
        on_quarantine: Callable[[Record], None] | None = None,
        packer: Packer | None = None,
        within: Mapping[str, float] | None = None,
        group_size: int = 1,
    ):
        check_config(config)
        config = with_rule(config)
        self.buffer, self.config, self.num_examples = buffer, config, buffer.sharding.num_examples
        self.batch_size, self.on_decision = batch_size, on_decision
        # Examples per global batch. If examples are packed: the mean number in the ``batch_size`` windows of a batch.
        self.batch_examples = batch_size if packer is None else packer.examples_per_batch
        check_sizes(config, num_examples=self.num_examples, batch_size=self.batch_examples)
        check_inputs(
            config,
            score=score,
            expert=expert,
            amateur=amateur,
            trusted=trusted,
            chance_loss=chance_loss,
            window=buffer.window,
        )
        tokens, self.amounts = None, Amounts(self.num_examples, batch_size)
        if packer is not None:
            if config.pool_size:
                raise ValueError(
                    f"pool_size = {config.pool_size} with a packer: windows are packed from a pass over all examples. "
                    "Set pool_size = 0"
                )
            if packer.cuts_examples:
                check_cut_examples(config)
            sharding = buffer.sharding
            lengths = packer.lengths_of(sharding.start, sharding.stop)
            tokens = Tokens(lengths.to(buffer.device), packer.num_tokens)
            self.amounts = Amounts(packer.num_tokens, packer.tokens_per_batch, "tokens")
        scorers = [name for name, losses in (("expert", expert), ("amateur", amateur)) if losses is not None]
        trusted_scores = None if trusted is None else torch.tensor(sorted(trusted)).to(buffer.device)

        def make_within(all_scores: Callable[[], Scores]) -> WithinSources:
            return WithinSources(
                config,
                sources=sources,
                proportions=within or {},
                whole=buffer.sharding,
                tokens=tokens,
                bound=lambda size, proportion: repeat_bound(
                    config,
                    num_examples=size,
                    batch_size=max(1, min(size, round(proportion * self.amounts.batch))),
                    total_steps=total_steps,
                    scorers=scorers,
                ),
                trusted=trusted_scores,
                all_scores=all_scores,
            )

        self.draws = Draws(
            buffer,
            config,
            batch_size=self.amounts.batch,
            expert=expert,
            amateur=amateur,
            chance_loss=chance_loss,
            trusted=trusted_scores,
            sources=sources,
            bound=repeat_bound(
                config,
                num_examples=self.amounts.data,
                batch_size=self.amounts.batch,
                total_steps=total_steps,
                scorers=scorers,
            ),
            tokens=tokens,
            within=None if within is None else make_within,
        )
        self.ledger = ledger or Ledger(batch_size=batch_size, tokens_per_example=tokens_per_example)
        self.plan = Plan(
            config,
            steps_of_full_pass=self.amounts.data // self.amounts.batch,
            total_steps=total_steps,
            scorers=scorers,
        )
        self.rounds = Rounds(
            self.draws,
            config,
            self.plan,
            batch_size=batch_size,
            data_seed=data_seed,
            ledger=self.ledger,
            score=score,
            on_quarantine=on_quarantine,
            packer=packer,
            group_size=group_size,
        )
        self._pass: AnyPass | None = None
        self._forecast_logged = False
        self._neutral_statistics = neutral_statistics(buffer.device)

    @property
    def round(self) -> int:
        """The round of the current pass; 0 is the warm-up."""
        return self.rounds.round

    @property
    def pass_index(self) -> int:
        """The index of the current pass within its round."""
        return self.rounds.pass_index

    # -- passes ---------------------------------------------------------------------------------------------------

    def current_pass(self) -> AnyPass | None:
        """The current pass, None before the first; rebuilt (a collective) after a checkpoint was loaded."""
        if self._pass is None and self.rounds.num_batches:
            self._pass = self.rounds.build_pass()
        return self._pass

    def next_pass(self, *, step: int) -> AnyPass:
        """Decide the pass that starts after ``step`` training steps. A collective, on all ranks.

        It has host syncs, a selection and maybe a scoring pass, so it must not run within a step.
        """
        with self.ledger.charge("select"):
            self.buffer.sync()  # also exchanges the ranks' hashes of the previous decision
            self.buffer.agreement.check()
            self.rounds.decide(step)
            self._pass = self.rounds.build_pass()
            self.buffer.agreement.announce(self.rounds.digest(), round=self.round)
        metrics = self.metrics()
        if self.draws.audit and not self._forecast_logged:  # this decision made a draw
            visits, takes_all, self._forecast_logged = self._visits(), self.draws.takes_all, True
            log_forecast(
                self.config,
                metrics,
                visits=visits,
                step=step,
                num_examples=self.amounts.data,
                takes_all=takes_all,
                noun=self.amounts.noun,
            )
        if self.on_decision is not None:
            self.on_decision(
                {"step": step + 1, "pass": self.pass_index, "num_steps": self.rounds.num_batches} | metrics
            )
        return self._pass

    def follow_plan(self, *, step: int, consumed: int) -> None:
        """Fit the current pass to this run's plan: see :meth:`Rounds.follow_plan`."""
        self.rounds.follow_plan(step=step, consumed=consumed)
        self._pass = None

    def resume(self, *, round: int, pass_index: int, step: int) -> bool:
        """Always True, for a loaded sampler: this teacher's own state holds the position."""
        return True

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def weights_every(self) -> int:
        """Number of global batches whose weights :class:`TeachingSampler` requests at once."""
        return self.buffer.flush_every

    def weights_of(self, slots: Tensor) -> Tensor:
        """The weights of slots in the pool of the current pass. A collective without a host sync.

        Args:
            slots: int64 [n] on any device, the slots that this rank requests; equally many on every rank.

        Returns:
            fp32 [n] on the buffer's device; 0 for slots that the current selection left out.
        """
        with self.ledger.charge("exchange"):
            return self.draws.weights_of(slots)

    def loss_statistics(self, step: int) -> Tensor:
        """fp32 [3] on the buffer's device, for the weights of ``weighting = "loss"`` in training step ``step``."""
        if self.buffer.window is None or not self.rounds.selecting:
            return self._neutral_statistics
        return self.buffer.window.statistics(step)

    def batch_served(self) -> None:
        """Count a global batch of the current pass that goes to training (:class:`TeachingSampler` calls it)."""
        self.ledger.batch_served(covered_per_trained=self.rounds.covered_per_trained())

    def step_done(self) -> None:
        """Exchange losses every ``flush_every`` steps. Call it after every training step, on all ranks."""
        with self.ledger.charge("exchange"):
            self.buffer.step_done()

    def metrics(self) -> dict[str, float]:
        """The ``teacher/*`` and ``ledger/*`` scalars as host numbers; no collective, no device sync."""
        return self.decision_metrics() | self.ledger.metrics()

    def decision_metrics(self) -> dict[str, float]:
        """The ``teacher/*`` scalars alone: a run logs its ledger itself."""
        selected, pool = self.rounds.num_trained(), self.rounds.num_candidates()
        position = {
            "teacher/round": self.round,
            "teacher/ratio": selected / max(1, pool),
            "teacher/selected": selected,
            "teacher/repeats": self._visits(),
        }
        return {name: float(value) for name, value in position.items()} | self.draws.audit

    def _visits(self) -> float:
        """How often the run trains an example that it always selects, by the schedule or the ratio of the last draw."""
        draws, config = self.draws, self.config
        has_schedule = config.strategy in READ_THE_RATIO and config.ratio_schedule not in DECIDED_BY_SCORES
        ratio = None if has_schedule else draws.num_counted_selected / draws.num_counted
        return self.plan.visits(ratio, num_examples=self.amounts.data, batch_size=self.amounts.batch)

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> Record:
        """Everything needed to resume, on any number of ranks; a collective (the buffer is exchanged first).

        Raises:
            RuntimeError: that exchange shows that the ranks have decided differently; such a state must not be saved.
        """
        buffer = self.buffer.state_dict()
        self.buffer.agreement.check()
        state = {
            "buffer": buffer,
            "draws": self.draws.state_dict(),
            **self.rounds.state_dict(),
            # One leaf: DCP loads only the keys that the state has before loading, and this dictionary starts empty.
            "audit": json.dumps(self.draws.audit),
            "ledger": self.ledger.state_dict(),
        }
        return state if self.buffer.window is None else state | {"window": self.buffer.window.state_dict()}

    def load_state_dict(self, state: Record) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.draws.load_state_dict(state["draws"])
        self.rounds.load_state_dict(state)
        self.draws.audit = json.loads(state["audit"])
        self.ledger.load_state_dict(state["ledger"])
        if self.buffer.window is not None:
            self.buffer.window.load_state_dict(state["window"])
        self._pass = None
