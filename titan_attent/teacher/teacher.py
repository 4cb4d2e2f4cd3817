"""The teacher: decides, pass after pass, which examples are trained and with what weights.

    round 0   warm-up: `warmup_passes` full passes; the losses seen are the first scores
    round r   choose k examples by importance, train `interval` passes over them (soft draws anew for each pass)
    last      anneal: full passes for the last `anneal_fraction` of the steps

Decisions depend on (seed, round, example id, buffer) and not on the number of ranks. The state is the buffer, a few
integers, and two tensors sharded like the buffer: the weights of the selection in force, and which draw last chose an
example. A pass that was under way when a checkpoint was written is rebuilt from them.

Cost: 8 bytes an example / ranks beside the buffer; a selection every pass (see selection.py); for weighted passes one
all-reduce of 4 bytes a trained example, in blocks of ``flush_every`` steps.
"""

import json
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.sampler import Pass, SelectedIds
from titan_attent.job_config import TeacherConfig
from titan_attent.loss_buffer import NEVER, LossBuffer
from titan_attent.teacher import schedule
from titan_attent.teacher.importance import importance
from titan_attent.teacher.ledger import Ledger, audit
from titan_attent.teacher.selection import (
    UNSEEN_KEY,
    floor_log_probabilities,
    gather_bitmask,
    log_probabilities,
    random_keys,
    score_of_key,
    select_top_k,
    soft_keys,
    with_unseen_first,
)
from titan_attent.teacher.weights import inverse_probability_weights


class Teacher:
    """Rounds, passes and weights over the examples of ``buffer``.

    Args:
        buffer: the losses, whose sharding (mesh, device) the teacher shares.
        config: what to teach; validated here.
        batch_size: G, examples of a global batch over all ranks and microbatches.
        total_steps: training steps of the whole run; schedules and the anneal tail are fractions of it.
        data_seed: seed of the order within a pass.
        tokens_per_example: for the ledger's token rate.
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
    ):
        config.validate()
        self.buffer, self.config, self.sharding = buffer, config, buffer.sharding
        self.batch_size, self.total_steps, self.data_seed = batch_size, total_steps, data_seed
        num_examples = self.sharding.num_examples
        if batch_size > num_examples:
            raise ValueError(
                f"the data set has {num_examples} examples, fewer than one global batch of {batch_size}: "
                "write more data, or lower training.global_batch_size or training.seq_len"
            )
        self.warmup_steps = config.warmup_passes * (num_examples // batch_size)
        self.anneal_start = total_steps - int(config.anneal_fraction * total_steps)
        self.ledger = Ledger(batch_size=batch_size, tokens_per_example=tokens_per_example)

        self.round = 0
        self.pass_index = 0
        self.num_draws = 0
        self.ratio = 1.0
        self.interval = max(1, config.warmup_passes)
        self.annealing = False
        self.num_batches = 0  # of the current pass; 0: no pass yet
        self.selecting = False  # the current pass trains a selection
        local = {"dtype": torch.float32, "device": buffer.device}
        self.weights = torch.zeros(self.sharding.num_local, **local)  # type: ignore[call-overload]
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

        Never on the hot path: host syncs and a selection happen in here.
        """
        with self.ledger.charge("select"):
            self._decide(step)
            self._pass = self._build_pass()
        return self._pass

    def _decide(self, step: int) -> None:
        first = self.num_batches == 0
        uniform = self.config.strategy == "uniform"
        anneal = not uniform and step >= self.anneal_start
        if uniform or (step < self.warmup_steps and not anneal):
            self.pass_index = 0 if first else self.pass_index + 1
            self.selecting = False
        elif anneal:
            if self.annealing:
                self.pass_index += 1
            else:
                self._start_round(interval=1, ratio=1.0)
            self.annealing, self.selecting = True, False
        elif not self.selecting or self.pass_index + 1 >= self.interval:
            config = self.config
            progress = schedule.progress(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
            self._start_round(
                interval=schedule.interval_at(
                    progress,
                    schedule=config.interval_schedule,
                    initial=config.initial_interval,
                    maximum=config.max_interval,
                ),
                ratio=schedule.ratio_at(
                    progress, schedule=config.ratio_schedule, initial=config.initial_ratio, final=config.final_ratio
                ),
            )
            self.selecting = True
            self._draw(step)
        else:
            self.pass_index += 1
            if self.config.strategy == "soft":
                self._draw(step)
        self.num_batches = self._pass_size() // self.batch_size
        if not (uniform or anneal):
            self.num_batches = min(self.num_batches, self.anneal_start - step)

    def _start_round(self, *, interval: int, ratio: float) -> None:
        self.round += 1
        self.pass_index = 0
        self.interval, self.ratio = interval, ratio

    def _selection_size(self) -> int:
        return schedule.selection_size(self.sharding.num_examples, ratio=self.ratio, batch_size=self.batch_size)

    def _pass_size(self) -> int:
        """Examples that one pass covers the data set with."""
        return self._selection_size() if self.selecting else self.sharding.num_examples

    def _build_pass(self) -> Pass:
        bitmask = None
        if self.selecting:
            bitmask = gather_bitmask(self._chosen(), sharding=self.sharding)
        return Pass(
            selected=SelectedIds(self.sharding.num_examples, bitmask=bitmask),
            seed=self.data_seed,
            round=self.round,
            index=self.pass_index,
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            weighted=self.selecting and self._weighted,
            strategy=self.config.strategy if self.selecting else "uniform",
        )

    # -- selections -----------------------------------------------------------------------------------------------

    @property
    def _weighted(self) -> bool:
        return self.config.strategy == "soft" and self.config.weighting == "inverse_probability"

    def _chosen(self) -> Tensor:
        """bool [num_local]: in the selection in force."""
        return self.last_draw == self.num_draws - 1

    def _draw(self, step: int) -> None:
        """Choose anew, from the losses known now: sets ``weights`` and ``last_draw``."""
        config, sharding = self.config, self.sharding
        self.buffer.sync()
        k = self._selection_size()
        seed = (config.seed, self.round, self.pass_index)
        scores = importance(self.buffer, name=config.importance)
        phi = None
        if config.strategy == "random":
            keys = random_keys(sharding=sharding, seed=seed, device=scores.device)
        elif config.strategy == "hard":
            keys = with_unseen_first(scores, scores == float("inf"), sharding=sharding, seed=seed)
        else:
            phi = log_probabilities(scores, temperature=config.temperature, normalization=config.normalization)
            phi = floor_log_probabilities(phi, k=k, minimum=config.min_inclusion_probability, sharding=sharding)
            keys = soft_keys(phi, sharding=sharding, seed=seed)
        chosen, threshold = select_top_k(keys, k=k, sharding=sharding)

        weights = chosen.float()
        if phi is not None and self._weighted and threshold < UNSEEN_KEY:
            kappa = score_of_key(threshold) if threshold >= 0 else float("-inf")
            weights = inverse_probability_weights(
                phi, chosen=chosen, kappa=kappa, max_weight=config.max_weight, sharding=sharding
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
        )

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
        self.ledger.step_done(covered_per_trained=self.sharding.num_examples / self._pass_size())

    def metrics(self) -> dict[str, float]:
        """The ``teacher/*`` and ``ledger/*`` scalars as host numbers; no collective, no device sync."""
        position = {
            "teacher/round": float(self.round),
            "teacher/ratio": self.ratio if self.selecting else 1.0,
            "teacher/selected": float(self._pass_size()),
        }
        return position | (self._audit if self.selecting else {}) | self.ledger.metrics()

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, on any number of ranks; a collective (the buffer is exchanged first)."""
        return {
            "buffer": self.buffer.state_dict(),
            "weights": self.sharding.as_global(self.weights),
            "last_draw": self.sharding.as_global(self.last_draw),
            "position": {
                "round": self.round,
                "pass_index": self.pass_index,
                "num_draws": self.num_draws,
                "ratio": self.ratio,
                "interval": self.interval,
                "annealing": self.annealing,
                "num_batches": self.num_batches,
                "selecting": self.selecting,
            },
            # One leaf: DCP loads the keys that are there before loading, and this dictionary starts empty.
            "audit": json.dumps(self._audit),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.sharding.as_global(self.weights).copy_(state["weights"])
        self.sharding.as_global(self.last_draw).copy_(state["last_draw"])
        for name, value in state["position"].items():
            setattr(self, name, value)
        self._audit = json.loads(state["audit"])
        self.ledger.load_state_dict(state["ledger"])
        self._pass = None
