"""The teacher: decides, pass after pass, which examples are trained and with what weights.

    round 0   warm-up: `warmup_passes` full passes; the losses seen are the first scores
    round r   choose k examples by importance, train `interval` passes over them (soft draws anew for each pass)
    last      anneal: full passes for the last `anneal_fraction` of the steps

With `shadow` a round is decided before every full pass, logged, and not acted on.

Decisions depend on (seed, round, example id, buffer) and not on the number of ranks. The state is the buffer, a few
integers, and two tensors sharded like the buffer: the weights of the selection in force, and which draw last chose an
example. A pass that was under way when a checkpoint was written is rebuilt from them.

Cost: 8 bytes an example / ranks beside the buffer; a selection every pass (see selection.py); for weighted passes one
all-reduce of 4 bytes a trained example, in blocks of ``flush_every`` steps; scoring passes only where asked for.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.sampler import Pass, SelectedIds
from titan_attent.job_config import TeacherConfig
from titan_attent.loss_buffer import NEVER, LossBuffer
from titan_attent.teacher import schedule
from titan_attent.teacher.importance import clip_outliers, effective_share, importance
from titan_attent.teacher.ledger import Ledger, audit
from titan_attent.teacher.selection import gather_bitmask
from titan_attent.teacher.strategies import REDRAWN, choose, is_weighted


class Teacher:
    """Rounds, passes and weights over the examples of ``buffer``.

    Args:
        buffer: the losses, whose sharding (mesh, device) the teacher shares.
        config: what to teach; validated here.
        batch_size: G, examples of a global batch over all ranks and microbatches.
        total_steps: training steps of the whole run; schedules and the anneal tail are fractions of it.
        data_seed: seed of the order within a pass.
        tokens_per_example: for the ledger's token rate.
        reference: fp32 [num_local] reference losses of this rank's examples, for importance "excess_loss".
        score: called with the step on all ranks to record the loss of every example by a forward pass
            (``buffer.record(..., trained=False)``), for ``scoring`` other than "train".
        on_decision: called on every rank with a JSON-ready record of each pass that starts: its first step, and all
            scalars of :meth:`metrics`.
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
        reference: Tensor | None = None,
        score: Callable[[int], None] | None = None,
        on_decision: Callable[[dict[str, Any]], None] | None = None,
    ):
        config.validate()
        self.buffer, self.config, self.sharding = buffer, config, buffer.sharding
        self.batch_size, self.total_steps, self.data_seed = batch_size, total_steps, data_seed
        self.reference, self.score, self.on_decision = reference, score, on_decision
        num_examples = self.sharding.num_examples
        if batch_size > num_examples:
            raise ValueError(
                f"the data set has {num_examples} examples, fewer than one global batch of {batch_size}: "
                "write more data, or lower training.global_batch_size or training.seq_len"
            )
        if config.scoring != "train" and score is None:
            raise ValueError(f'scoring = "{config.scoring}" needs a forward pass: give the teacher `score`')
        if config.importance == "excess_loss" and reference is None:
            raise ValueError('importance = "excess_loss" needs the examples\' reference losses: give `reference`')
        self.warmup_steps = config.warmup_passes * (num_examples // batch_size)
        self.anneal_start = total_steps - int(config.anneal_fraction * total_steps + 1e-9)  # 0.29 of 100 is 29
        self.ledger = Ledger(batch_size=batch_size, tokens_per_example=tokens_per_example)

        self.round = 0
        self.pass_index = 0
        self.num_full_passes = 0
        self.num_draws = 0
        self.ratio = 1.0
        self.interval = max(1, config.warmup_passes)
        self.annealing = False
        self.num_batches = 0  # of the current pass; 0: no pass yet
        self.selecting = False  # the current pass trains a selection
        self.num_selected = num_examples  # examples that the current pass covers the data set with
        self.weights = torch.zeros(self.sharding.num_local, dtype=torch.float32, device=buffer.device)
        self.last_draw = torch.full_like(self.weights, NEVER, dtype=torch.int32)
        self._pass: Pass | None = None
        self._audit: dict[str, float] = {}

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
        self._decide(step)
        if self.on_decision is not None:
            self.on_decision(
                {"step": step + 1, "pass": self.pass_index, "num_steps": self.num_batches} | self.metrics()
            )
        with self.ledger.charge("select"):
            self._pass = self._build_pass()
        return self._pass

    def _decide(self, step: int) -> None:
        config = self.config
        uniform = config.strategy == "uniform"
        anneal = not uniform and step >= self.anneal_start
        self.pass_index += 1 if self.num_batches else 0
        if uniform or anneal or step < self.warmup_steps:
            if anneal and not self.annealing:
                self._start_round(interval=1)
            self.annealing, self.selecting = anneal, False
            self._audit = {}
        else:
            new_round = not self.selecting or self.pass_index >= self.interval
            if new_round:
                self._start_round(
                    interval=schedule.interval_at(
                        self._progress(step),
                        schedule=config.interval_schedule,
                        initial=config.initial_interval,
                        maximum=config.max_interval,
                    )
                )
                self._maybe_score(step)
            if new_round or config.strategy in REDRAWN:
                with self.ledger.charge("select"):
                    self._draw(step, new_round=new_round)
            self.selecting = not config.shadow
        if not self.selecting:
            self.num_full_passes += 1
            self.num_selected = self.sharding.num_examples
        self.num_batches = self.num_selected // self.batch_size
        if not (uniform or anneal):
            self.num_batches = min(self.num_batches, self.anneal_start - step)

    def _progress(self, step: int) -> float:
        return schedule.progress(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def _start_round(self, *, interval: int) -> None:
        self.round += 1
        self.pass_index = 0
        self.interval = interval

    def _build_pass(self) -> Pass:
        num_examples, config = self.sharding.num_examples, self.config
        if not self.selecting:
            # Numbered through, whatever the round: warm-up and uniform see the same order.
            return Pass(
                selected=SelectedIds(num_examples),
                order=(self.data_seed, 0, self.num_full_passes - 1),
                batch_size=self.batch_size,
                num_batches=self.num_batches,
                round=self.round,
            )
        return Pass(
            selected=SelectedIds(num_examples, bitmask=gather_bitmask(self._chosen(), sharding=self.sharding)),
            order=(self.data_seed, self.round, self.pass_index),
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            round=self.round,
            weighted=is_weighted(config),
            strategy=config.strategy,
        )

    # -- selections -----------------------------------------------------------------------------------------------

    def _chosen(self) -> Tensor:
        """bool [num_local]: in the selection in force."""
        return self.last_draw == self.num_draws - 1

    def _maybe_score(self, step: int) -> None:
        scoring = self.config.scoring
        if scoring == "forward" or (scoring == "forward_once" and self.num_draws == 0):
            assert self.score is not None
            with self.ledger.charge("score"):
                self.score(step)
                self.buffer.sync()

    def _ratio(self, scores: Tensor, step: int) -> float:
        config = self.config
        if config.ratio_schedule == "adaptive":
            share = effective_share(clip_outliers(scores, sharding=self.sharding), sharding=self.sharding)
            return schedule.adaptive_ratio(share, lowest=config.initial_ratio, highest=config.final_ratio)
        return schedule.ratio_at(
            self._progress(step), schedule=config.ratio_schedule, initial=config.initial_ratio, final=config.final_ratio
        )

    def _draw(self, step: int, *, new_round: bool) -> None:
        """Choose anew, from the losses known now: sets ``weights``, ``last_draw``, ``num_selected`` and ``ratio``."""
        config, sharding = self.config, self.sharding
        self.buffer.sync()
        scores = importance(self.buffer, name=config.importance, reference=self.reference)
        if new_round:
            self.ratio = self._ratio(scores, step)
        k = schedule.selection_size(sharding.num_examples, ratio=self.ratio, batch_size=self.batch_size)
        seed = (config.seed, self.round, self.pass_index)
        chosen, weights, self.num_selected = choose(
            scores, k=k, config=config, seed=seed, sharding=sharding, at_least=self.batch_size
        )
        chosen_before = self._chosen() if self.num_draws else torch.zeros_like(chosen)
        self.weights.copy_(weights)
        self.last_draw.masked_fill_(chosen, self.num_draws)
        self.num_draws += 1
        known = self.buffer.step != NEVER
        self._audit = audit(
            scores=scores,
            ages=torch.where(known, step - self.buffer.step, -1),
            chosen=chosen,
            chosen_before=chosen_before,
            ever_chosen=self.last_draw != NEVER,
            weights=weights,
            sharding=sharding,
        ) | {
            "teacher/ratio": self.num_selected / sharding.num_examples,
            "teacher/selected": float(self.num_selected),
        }

    def weights_of(self, example_ids: Tensor) -> Tensor:
        """The weights of examples of the current pass, wherever they are kept. A collective without a host sync.

        Args:
            example_ids: int64 [n] on any device; the same ids in the same order on every rank: global batches, not a
                rank's own (:class:`TeachingSampler` hands out a rank's own weights).

        Returns:
            fp32 [n] on the buffer's device; 0 for an example that the selection in force left out.
        """
        ids = example_ids.to(self.buffer.device, non_blocking=True)
        with self.ledger.charge("exchange"):
            # Each id has one owner; the others add zeros, so the sum is exact.
            padded = torch.cat((self.weights, self.weights.new_zeros(1)))
            return self.sharding.sum(padded[self.sharding.local_index(ids, elsewhere=self.sharding.num_local)])

    # -- steps ----------------------------------------------------------------------------------------------------

    def step_done(self) -> None:
        """Call after every training step, on all ranks: exchanges losses when it is time, keeps the ledger."""
        with self.ledger.charge("exchange"):
            self.buffer.step_done()
        self.ledger.step_done(covered_per_trained=self.sharding.num_examples / self.num_selected)

    def metrics(self) -> dict[str, float]:
        """The ``teacher/*`` and ``ledger/*`` scalars as host numbers; no collective, no device sync."""
        position = {
            "teacher/round": float(self.round),
            "teacher/ratio": self.num_selected / self.sharding.num_examples,
            "teacher/selected": float(self.num_selected),
        }
        return position | self._audit | self.ledger.metrics()

    # -- checkpoint -----------------------------------------------------------------------------------------------

    _POSITION = (
        *("round", "pass_index", "num_full_passes", "num_draws", "ratio", "interval"),
        *("annealing", "num_batches", "selecting", "num_selected"),
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, on any number of ranks; a collective (the buffer is exchanged first)."""
        return {
            "buffer": self.buffer.state_dict(),
            "weights": self.sharding.as_global(self.weights),
            "last_draw": self.sharding.as_global(self.last_draw),
            "position": {name: getattr(self, name) for name in self._POSITION},
            # One leaf: DCP loads the keys that are there before loading, and this dictionary starts empty.
            "audit": json.dumps(self._audit),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.sharding.as_global(self.weights).copy_(state["weights"])
        self.sharding.as_global(self.last_draw).copy_(state["last_draw"])
        for name in self._POSITION:
            setattr(self, name, state["position"][name])
        self._audit = json.loads(state["audit"])
        self.ledger.load_state_dict(state["ledger"])
        self._pass = None
