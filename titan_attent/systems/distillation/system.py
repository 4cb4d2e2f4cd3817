"""Distillation as a system of a run: a frozen source beside the student, and the divergence from it in the loss.

    before the first step, and after the last step of a phase    the source's weights of the next step, loaded in place
    microbatch    source's forward -> divergence of each token -> a x loss of the labels + (1 - a) x divergence
    after a step that precedes a logged one                      sums for the scalars, one all-reduce of 16 bytes

The loss of the systems before this one, which may weight examples, is multiplied by a. The divergence of an example is
multiplied by the same weight of the example, so a weight counts for its whole loss; the teacher's buffer still records
the labels' cross-entropy. Where a is 1 the source does not run; where it is 0 the labels' loss is measured without a
graph, for the log.

Under a pipeline the source is whole on the ranks of the last stage. Each pipeline microbatch carries its inputs, so the
source's pass of a microbatch runs first in its own loss: no targets are queued, and none can be those of another.

With ``targets`` no source runs: the ids of each token are columns of the batch, read in the reader threads for the step
that will train them.

Cost per microbatch: a forward pass of the source, and its logits until the backward pass of the loss. Per change of the
source: each rank reads its shards, from the page cache where the read-ahead got there.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.flops import matrix_flops, product_flops
from titan_attent.foundations.ledger import LedgerAccount
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.divergence import build_kernels, kl_divergence, largest_id, target_cross_entropy
from titan_attent.losses.folding import fold, index_in_batch
from titan_attent.scores.targets import TOP_K, StoredTargets
from titan_attent.systems.distillation import sources
from titan_attent.systems.distillation.checks import check_targets, check_tokenizer
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.schedule import Phase, label_weight, next_change, source_at
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import (
    Batch,
    Columns,
    DataFacts,
    ExampleStats,
    Frozen,
    LossFunction,
    Panel,
    Planned,
    PlannedFrozen,
    Run,
    StepLoss,
    System,
)

logger = logging.getLogger(__name__)

DIVERGENCE, COUNT = "divergence", "divergence_tokens"
"""Statistics of an example: the sum of the divergence over its valid tokens, and their number."""
IDS, WEIGHTS = "target_ids", "target_weights"
"""Columns [B, L, N] of targets on disk."""
READ_AHEAD_STEPS = 50
"""Steps before a change at which the next checkpoint's files are read ahead: later than the cache forgets them."""


class Distillation(System):
    """The system of the section ``[distillation]``."""

    name = "distillation"
    needs = ("tokens",)
    off = 'schedule = "off"'
    keeps_state = True
    accounts = (LedgerAccount("source"), LedgerAccount("source_load"))
    panels = (
        Panel(
            "distillation: divergence from the source, nats per token",
            ("distillation/divergence", "distillation/label_weight"),
            labels=(("distillation/label_weight", "weight of the labels (right axis)"),),
            right="distillation/label_weight",
        ),
        Panel("distillation: the source's step", ("distillation/source_step",), counts=True),
    )

    @classmethod
    def is_on(cls, config: DistillationConfig) -> bool:
        return config.schedule != "off"

    @classmethod
    def check_values(cls, config: DistillationConfig) -> None:
        config.validate()
        if cls.is_on(config):
            config.check_used()
        elif (given := config.source or config.targets) and is_first_rank():
            logger.warning(
                f'[distillation] {given} is not read, as schedule is "off": choose a schedule to learn from it'
            )

    @classmethod
    def check_data(cls, config: DistillationConfig, facts: DataFacts) -> None:
        phases = sources.phases_on_disk(config, steps=facts.settings.steps)
        checkpoints = sorted({phase.checkpoint for phase in phases})
        if config.targets:
            check_targets(config, facts.dataset, checkpoints=checkpoints, num_ids=facts.num_ids)
            return
        for step in checkpoints:
            path = str(sources.checkpoint_of(config, step))
            try:
                facts.check_frozen(path, family=config.family, flavor=config.flavor, num_ids=facts.num_ids)
            except ValueError as error:
                raise ValueError(f"[distillation] source = {config.source}: {error}") from None
        check_tokenizer(config, facts.dataset)

    @classmethod
    def identity(cls, config: DistillationConfig, settings: RunSettings) -> dict[str, Any]:
        return {"distillation.source": sources.identity_of(config, steps=settings.steps)}

    @classmethod
    def plan(cls, config: DistillationConfig, facts: DataFacts, *, num_ranks: int) -> Planned:
        phases = sources.phases_on_disk(config, steps=facts.settings.steps)
        shown = ", ".join(f"step-{phase.checkpoint} from step {phase.first_step}" for phase in phases[:8])
        more = f", and {len(phases) - 8} more" if len(phases) > 8 else ""
        lines = (f"learns from {config.targets or config.source}, {shown}{more}.",)
        if config.targets:
            return Planned(lines, memory=(_memory_of_targets(config, phases, facts),))
        path = str(sources.checkpoint_of(config, phases[0].checkpoint))
        return Planned(lines, frozen=PlannedFrozen(path, config.family, config.flavor))

    config: DistillationConfig

    def __init__(self, run: Run, config: DistillationConfig):
        super().__init__(run, config)
        self.steps = run.settings.steps
        self.phases = sources.phases_on_disk(config, steps=self.steps)
        self.kernels = build_kernels(compiled=run.settings.compiles_loss, backend=run.settings.compile_backend)
        self.stored: dict[int, StoredTargets] = {}
        if config.targets:
            self.stored = {phase.checkpoint: sources.targets_of(config, phase.checkpoint) for phase in self.phases}
            has_weights = any(stored.facts.kind == TOP_K for stored in self.stored.values())
            self.columns = self.token_columns = (IDS, WEIGHTS) if has_weights else (IDS,)  # type: ignore[misc]
        self.training_seconds = sources.training_seconds(config, until=max(phase.checkpoint for phase in self.phases))
        self.frozen: Frozen | None = None
        self.loaded: int | None = None
        self.changes = 0
        self.source_flops = 0.0
        self._flops_of_example = 0.0
        mesh = run.mesh("batch")
        self._row_ranks = 1 if mesh is None else mesh.size()  # ranks with rows of their own, equally many each
        self._read_ahead: Any = None
        # Sum of the divergence and number of tokens since the last exchange, and the exchanged ones on the host.
        self._sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        self._shown = torch.zeros(2, dtype=torch.float64, pin_memory=run.device.type == "cuda")

    # -- the source -----------------------------------------------------------------------------------------------

    def before_first_step(self) -> None:
        step = self.run.step() + 1
        if is_first_rank():
            logger.info(
                f"Distillation: from {self.config.targets or self.config.source}: "
                + ", ".join(f"step-{phase.checkpoint} from step {phase.first_step}" for phase in self.phases)
            )
        self.loaded = source_at(self.phases, step)
        if self.stored:
            return
        with self.run.ledger.charge("source_load"):
            self.frozen = self.run.build_frozen(
                str(self._path(self.loaded)), family=self.config.family, flavor=self.config.flavor
            )
        self._flops_of_example = self._forward_flops()
        self._look_ahead(step - 1)

    def _path(self, checkpoint: int) -> Path:
        return sources.checkpoint_of(self.config, checkpoint)

    def _forward_flops(self) -> float:
        """FLOPs of the source's forward pass over one row of tokens; 0 on ranks that do not hold it."""
        if self.frozen is None:
            return 0.0
        model: Any = self.frozen.model
        args, seq_len = model.model_args, self.run.settings.seq_len
        products = product_flops(args, seq_len=seq_len) * args.n_layers
        return products + sum(matrix_flops(layer, args, seq_len=seq_len) for layer in model.modules())

    def _weight_of_labels(self) -> float:
        return label_weight(self.config, step=self.run.step(), steps=self.steps)

    def after_step(self) -> None:
        step = self.run.step()
        if (step + 1) % self.run.settings.log_every == 0:
            self._exchange()
        if step >= self.steps:
            return
        wanted = source_at(self.phases, step + 1)
        if wanted != self.loaded and not self.stored:
            with self.run.ledger.charge("source_load"):
                self.run.load_frozen(self.frozen, str(self._path(wanted)))
            self._read_ahead = None
        self.changes += wanted != self.loaded
        self.loaded = wanted
        if not self.stored:
            self._look_ahead(step)

    def _look_ahead(self, step: int) -> None:
        """Read the next source's files ahead of its first step. ``step``: the last one that is done."""
        change = next_change(self.phases, step + 1)
        if self._read_ahead is None and change is not None and change.first_step - step <= READ_AHEAD_STEPS:
            self._read_ahead = sources.read_ahead(self._path(change.checkpoint))

    def read_columns_of_step(self, example_ids: Tensor, step: int, *, skipped: Tensor | None = None) -> Columns:
        """Targets on disk of the source of that step: the loader reads ahead of a change of the source.

        Those of packed documents are where their tokens are; padding, which has no label, has ids of 0.
        """
        if not self.stored:
            return {}
        stored, dataset = self.stored[source_at(self.phases, step)], self.run.dataset
        if isinstance(dataset, DocumentDataset):
            places = dataset.pair_places(example_ids, skipped=skipped)
            ids, weights = stored.read_places(places, shape=(len(example_ids), dataset.seq_len))
        else:
            ids, weights = stored.read(example_ids)
        if WEIGHTS not in self.columns:
            return {IDS: ids}
        return {IDS: ids, WEIGHTS: torch.full(ids.shape, 1 / ids.shape[-1]) if weights is None else weights}

    # -- the loss -------------------------------------------------------------------------------------------------

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        """Return a x ``loss`` + (1 - a) x divergence, where each example has the weight that ``loss`` gave it."""

        def distilled(pred: Tensor, batch: Batch) -> StepLoss:
            a = self._weight_of_labels()
            if a == 1.0:
                return loss(pred, batch)
            source = None if self.stored else self._source_logits(batch)
            with torch.set_grad_enabled(a > 0.0):
                inner = loss(pred, batch)
            # After the labels' loss: its backward, which may overwrite the logits, then runs after this one's.
            sums_N, stats = self._divergences(pred, source, batch)
            weights_N = inner.stats.get("weight")
            total = sums_N.sum() if weights_N is None else (sums_N * weights_N).sum()
            to_differentiate = (1.0 - a) * total
            if a > 0.0:
                to_differentiate = to_differentiate + a * inner.to_differentiate
            return StepLoss(to_differentiate, inner.logged, inner.stats | stats)

        return distilled

    def _source_logits(self, batch: Batch) -> Tensor:
        assert self.frozen is not None
        with self.run.ledger.charge("source"):
            return self.frozen(batch.inputs, batch.columns.get("example_index"))

    def _token_divergences(self, pred: Tensor, source: Tensor | None, batch: Batch, valid: Tensor) -> Tensor:
        """fp32 [B, L]; without ``source``, from the targets in the batch."""
        config = self.config
        if source is not None and config.temperature > 0.0:
            return kl_divergence(
                pred,
                source,
                valid,
                source_temperature=config.temperature,
                student_temperature=config.student_temperature,
                overwrite=True,
                kernels=self.kernels,
            )
        ids, weights = (
            (batch.columns.get(IDS), batch.columns.get(WEIGHTS)) if source is None else (largest_id(source), None)
        )
        assert ids is not None
        return target_cross_entropy(
            pred, ids, weights, valid, student_temperature=config.student_temperature, kernels=self.kernels
        )

    def _divergences(self, pred: Tensor, source: Tensor | None, batch: Batch) -> tuple[Tensor, ExampleStats]:
        """The divergence of each example, summed over its valid tokens, fp32 [N]; the statistics."""
        valid = batch.labels != IGNORE_INDEX
        tokens = self._token_divergences(pred, source, batch, valid)
        num, index = batch.examples.numel(), batch.columns.get("example_index")
        if index is not None:  # packed
            index = index_in_batch(index, examples_per_row=batch.examples.shape[1])
        sums_N = fold(tokens, index, num_examples=num)
        counts_N = fold(valid, index, num_examples=num)
        return sums_N, {DIVERGENCE: sums_N.detach(), COUNT: counts_N}

    def after_microbatch(self, batch: Batch, stats: ExampleStats | None) -> None:
        if stats is not None and DIVERGENCE in stats:
            self._sums += torch.stack((stats[DIVERGENCE].sum(), stats[COUNT].sum()))
        if self._weight_of_labels() < 1.0:
            self.source_flops += self._flops_of_example * len(batch.labels) * self._row_ranks

    # -- scalars --------------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Sum up over the ranks, and copy to the host without waiting. A collective of 16 bytes on each mesh."""
        for name in ("batch", "cp", "pp"):  # tp ranks have equal sums; of a pipeline only the last stage has any
            mesh = self.run.mesh(name)
            if mesh is not None:
                dist.all_reduce(self._sums, group=mesh.get_group())
        # The next logged step reads it, after torchtitan has waited for the device to log the loss.
        self._shown.copy_(self._sums, non_blocking=True)
        self._sums.zero_()

    def metrics(self) -> dict[str, float]:
        config, (total, count) = self.config, self._shown.tolist()
        scalars = {
            "distillation/label_weight": self._weight_of_labels(),
            "distillation/source_step": float(source_at(self.phases, self.run.step())),
            "distillation/source_changes": float(self.changes),
            "distillation/source_flops": self.source_flops,
        }
        if count and math.isfinite(total):
            scalars["distillation/divergence"] = total / count
        if self.training_seconds:
            scalars["distillation/source_training_seconds"] = self.training_seconds
            scalars["distillation/source_training_seconds_per_student"] = self.training_seconds / config.students
        return scalars

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        seconds = {account.name: self.run.ledger.seconds[account.name] for account in self.accounts}
        state = {"changes": self.changes, "flops": self.source_flops, "seconds": seconds}
        return {"state": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        loaded = json.loads(state["state"])
        self.changes, self.source_flops = loaded["changes"], loaded["flops"]
        self.run.ledger.seconds |= loaded["seconds"]


def _memory_of_targets(config: DistillationConfig, phases: Sequence[Phase], facts: DataFacts) -> tuple[str, int, str]:
    """(part, bytes, how) of the targets in memory: those of the microbatches read ahead, and of the one in training."""
    settings = facts.settings
    stored = [sources.targets_of(config, phase.checkpoint).facts for phase in phases]
    has_weights = any(each.kind == TOP_K for each in stored)
    per_token = max(each.num for each in stored) * (8 if has_weights else 4)
    batches = settings.batches_read_ahead + 1
    tokens = settings.local_batch_size * settings.seq_len
    how = f"{per_token} bytes per token of {batches} microbatches"
    return "targets", batches * tokens * per_token, how
