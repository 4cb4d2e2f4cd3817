"""The teacher as a system of a run: it decides which examples are trained, and its loss fills the loss buffer.

    loader -> example_id, weight -> weighted loss -> one loss per example -> buffer -> teacher -> loader

With ``strategy = "uniform"`` it is off: the plan of the data decides the order (data/plan), and the step is
torchtitan's own. So it is with ``level = "span"``, where span_masks.py masks labels. With ``weighting = "worst_case"``
it is on: all examples are trained, in the order of the plan, and the gradient of the step is that of a q-norm of the
losses of its inputs (losses/worst_case.py).

Cost per step: :meth:`LossBuffer.record`, and with context parallelism one all-reduce of 8 bytes per example (12 with
functional gradients); of the q-norm, one all-reduce of 16 bytes and one pass over the gradients. Everything else
happens between steps (buffer.py) or between passes (teacher.py).
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.json_lines import JsonLines
from titan_attent.foundations.ledger import TEACHING_ACCOUNTS
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.folding import ExampleLosses, LossRule, index_in_batch
from titan_attent.losses.mixed import mixing
from titan_attent.losses.vocab_parallel import whole_example_means
from titan_attent.losses.window import CappedLinear, LossWindow, neutral_statistics
from titan_attent.losses.worst_case import PowerWeights, WorstCase, scale_gradients
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import (
    Batch,
    Columns,
    DataFacts,
    ExampleStats,
    LossFunction,
    Planned,
    Run,
    StepLoss,
    System,
)
from titan_attent.systems.teaching import checks
from titan_attent.systems.teaching.advice import log_plan, warn_of_mixed_windows, warn_of_unread_keys
from titan_attent.systems.teaching.config import FORMER_KEYS, WORST_CASE, TeacherConfig
from titan_attent.systems.teaching.config_checks import SPAN, check_config, check_scores_named
from titan_attent.systems.teaching.importance import reads
from titan_attent.systems.teaching.panels import PANELS, UNITS
from titan_attent.systems.teaching.planned import planned
from titan_attent.systems.teaching.rule import check_rule, with_rule
from titan_attent.systems.teaching.shown import show_first_selection
from titan_attent.systems.teaching.teacher import Record, Teacher


class Teaching(System):
    """The system of the section ``[teacher]``."""

    name = "teacher"
    former_keys = FORMER_KEYS
    columns = ("weight",)
    accounts = TEACHING_ACCOUNTS
    keeps_state = True
    panels = PANELS
    tag_units = UNITS

    @classmethod
    def is_on(cls, config: TeacherConfig) -> bool:
        return (config.strategy != "uniform" or config.weighs_worst_case) and config.level != SPAN

    @classmethod
    def check_values(cls, config: TeacherConfig) -> None:
        check_config(config)
        if cls.is_on(config):
            check_scores_named(config)
        if config.strategy == "uniform":
            warn_of_unread_keys(config)

    @classmethod
    def check_given(cls, config: TeacherConfig, given: Collection[str]) -> None:
        check_rule(config, given=given)

    @classmethod
    def check(cls, config: TeacherConfig, settings: RunSettings) -> None:
        checks.check_run(with_rule(config), settings)

    @classmethod
    def check_data(cls, config: TeacherConfig, facts: DataFacts) -> None:
        checks.check_data(with_rule(config), facts)

    @classmethod
    def identity(cls, config: TeacherConfig, settings: RunSettings) -> dict[str, Any]:
        config = with_rule(config)
        settings_of_state: dict[str, Any] = {
            "teacher.seed": config.seed,
            "teacher.pool_size": config.pool_size,
            # These decide which tensors the teacher's state has.
            "functional gradients kept": "gradient" in reads(config.importance),
            "streaks for the quarantine kept": config.keeps_streaks,
            "recent losses kept": config.weighting == "loss",
        }
        if config.weighs_worst_case:
            settings_of_state["teacher.weighting"] = WORST_CASE  # it has a state of its own
        return settings_of_state | ({"records of mixtures kept": True} if settings.mixes_examples else {})

    @classmethod
    def plan(cls, config: TeacherConfig, facts: DataFacts, *, num_ranks: int) -> Planned:
        return planned(config, facts, num_ranks=num_ranks)

    config: TeacherConfig

    def __init__(self, run: Run, config: TeacherConfig):
        config = with_rule(config)
        super().__init__(run, config)
        settings = run.settings
        self.with_gradient = "gradient" in reads(config.importance)
        self.rule: LossRule | None = None
        self.worst_case: WorstCase | None = None
        self.microbatches = 0  # of the current step
        window = None
        if config.weighting == "loss":
            self.rule = CappedLinear(config.temperature)
            slots = 1 if run.packer is None else run.packer.max_examples
            window = LossWindow(batch_size=run.batch_size * slots, temperature=config.temperature, device=run.device)
        elif config.weighs_worst_case:
            self.rule = PowerWeights(config.q, settings.group_size)
            mesh, first = run.mesh("batch"), run.dataset.chance_loss
            self.worst_case = WorstCase(
                self.rule,
                first_scale=first if first > 0 else 1.0,
                device=run.device,
                group=None if mesh is None else mesh.get_group(),
            )
        self.buffer = LossBuffer(
            len(run.dataset),
            mesh=run.mesh("batch"),
            device=run.device,
            with_gradient=self.with_gradient,
            with_shares="share" in run.dataset.columns,
            window=window,
            replica_sources=run.replica_sources,
        )
        self.teacher = Teacher(
            self.buffer,
            replace(config, weighting="none") if config.weighs_worst_case else config,
            batch_size=run.batch_size,
            total_steps=settings.steps,
            data_seed=settings.data_seed,
            ledger=run.ledger,
            **self._losses_on_disk(),
            chance_loss=run.dataset.chance_loss,
            sources=run.dataset.sources,
            score=self.score_examples,
            on_decision=self._write_decision,
            on_quarantine=self._write_quarantined,
            packer=run.packer,
            within=run.proportions,
            group_size=settings.group_size,
        )
        if run.log_text is not None and isinstance(run.dataset, (TokenDataset, DocumentDataset)):
            show_first_selection(self.teacher.draws, run.dataset, run.log_text)
        self.sampler = TeachingSampler(
            self.teacher, rank=run.rank, num_ranks=run.num_ranks, microbatches=run.microbatches, mixture=run.mixture
        )
        self.weighted_loss = run.build_example_loss(
            vocab_parallel=settings.vocab_parallel,
            num_chunks=config.loss_chunks,
            compile_loss=settings.compiles_loss,
            with_gradient=self.with_gradient,
            rule=self.rule,
            backend=settings.compile_backend,
        )
        # Copied to the device once, here: a step must not copy host numbers.
        self.neutral_statistics = neutral_statistics(run.device)
        # Log files of the first rank, opened before the first step.
        self.rounds: JsonLines | None = None
        self.quarantine: JsonLines | None = None
        log_plan(
            self.config,
            self.teacher.plan,
            num_examples=len(run.dataset),
            batch_size=self.teacher.batch_examples,
            total_steps=settings.steps,
        )

    def _losses_on_disk(self) -> dict[str, Any]:
        """The teacher's arguments from scores on disk: fp32 [num_local] losses of this rank's examples, trusted
        differences.
        """
        config, sharding, arguments, ledger = self.config, self.buffer.sharding, dict[str, Any](), self.run.ledger
        ledger.prepaid_seconds = 0.0
        for name, path in checks.folders_of_scores(config, self.run).items():
            losses = self.run.open_scores(path)
            local = losses.read_for(self.run.dataset, sharding.start, sharding.stop)
            arguments[name] = local.to(self.run.device)
            ledger.prepaid_seconds += losses.device_seconds / int(os.environ.get("WORLD_SIZE", "1"))
        if checks.needs_trusted(config):
            arguments["trusted"] = checks.trusted_differences(config, self.run)
        return arguments

    def folders_read(self) -> Sequence[str]:
        return list(checks.folders_of_scores(self.config, self.run).values())

    # -- steps ----------------------------------------------------------------------------------------------------

    def before_first_step(self) -> None:
        if not is_first_rank():
            return
        warn_of_mixed_windows(self.config, self.run.dataset)
        folder, step = self.run.settings.dump_folder / "teacher", self.run.step()
        self.rounds = JsonLines(folder / "rounds.jsonl", step=step)
        if self.config.keeps_streaks:
            self.quarantine = JsonLines(folder / "quarantine.jsonl", step=step)

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        """Replace the stock loss by the weighted loss of every example; with weights of 1 the two are the same."""
        return self._training_loss

    def _training_loss(self, pred: Tensor, batch: Batch) -> StepLoss:
        columns = batch.columns
        if self.worst_case is not None:
            statistics = self.worst_case.scale
        else:
            statistics = self.teacher.loss_statistics(self.run.step())
        return self._example_loss(pred, batch, columns["weight"], statistics, *mixing(columns))

    def _scoring_loss(self, pred: Tensor, batch: Batch) -> StepLoss:
        assert self.worst_case is None, "a forward pass for scores, where nothing is selected"
        ones = torch.ones_like(batch.examples, dtype=torch.float32)
        return self._example_loss(pred, batch, ones, self.neutral_statistics)

    def _example_loss(self, pred: Tensor, batch: Batch, weights: Tensor, *more: Tensor) -> StepLoss:
        index = batch.columns.get("example_index")
        if index is None:
            result = self.weighted_loss(pred, batch.labels, weights, *more)
        else:  # packed
            index = index_in_batch(index, examples_per_row=weights.shape[1])
            result = self.weighted_loss(pred, batch.labels, weights.flatten(), *more, example_index=index)
        stats = {"loss": result.losses, "valid": result.counts, "weight": self._applied(weights, result, more[0])}
        if result.gradients is not None:
            stats["gradient"] = result.gradients
        return StepLoss(result.weighted_sum, result.loss_sum, stats)

    def _applied(self, weights: Tensor, result: ExampleLosses, statistics: Tensor) -> Tensor:
        """The weights that the loss has applied, fp32 [N]: the teacher's, times those computed from the loss."""
        if self.rule is None:
            return weights.flatten()
        return weights.flatten() * self.rule(result.losses, result.counts, statistics)

    def after_microbatch(self, batch: Batch, seen: ExampleStats | None) -> None:
        self._record(batch.columns, seen, step=self.run.step(), trained=True)
        if self.worst_case is not None and seen is not None:
            self.worst_case.add(seen["loss"], seen["valid"])
            self.microbatches = (self.microbatches + 1) % self.run.microbatches
            if self.microbatches == 0:
                factor = self.worst_case.finish()
                scale_gradients((p for part in self.run.model_parts for p in part.parameters()), factor)

    def _record(self, columns: Columns, stats: ExampleStats | None, *, step: int, trained: bool) -> None:
        """Record the losses of whole examples in the buffer. A collective on the ``cp`` mesh, without a host sync."""
        ids = columns["example_id"].flatten()
        if stats is None:  # not the last stage of a pipeline: the buffer's exchange brings the losses
            zeros = torch.zeros_like(ids, dtype=torch.float32)
            stats = dict.fromkeys(("loss", "valid", "gradient") if self.with_gradient else ("loss", "valid"), zeros)
        losses, gradients = stats["loss"], stats.get("gradient")
        mesh = self.run.mesh("cp")
        if mesh is not None:
            losses, gradients = whole_example_means(losses, gradients, stats["valid"], group=mesh.get_group())
        shares = None
        if self.buffer.with_shares:  # the loss of a mixture is recorded for both of its examples
            shares = columns.get("share", torch.ones_like(losses))
            if "share" in columns:  # the two records are neighbours, so that all records are in the order of the batch
                ids = torch.stack((ids, columns["other_id"]), dim=1).flatten()
                shares = torch.stack((shares, 1 - shares), dim=1).flatten()
                losses = losses.repeat_interleave(2)
                gradients = None if gradients is None else gradients.repeat_interleave(2)
        self.buffer.record(ids, losses, step=step, gradients=gradients, shares=shares, trained=trained)

    def after_step(self) -> None:
        self.teacher.step_done()

    def score_examples(self, step: int, pool: Pool) -> None:
        """Record the loss of every example of ``pool`` by a forward pass; each rank takes its share.

        A collective, on all ranks; about a third of the compute of a training pass over the pool.
        """
        run = self.run
        batches = FixedLoader(
            run.dataset,
            pool,
            batch_size=self.config.scoring_batch_size or run.settings.local_batch_size,
            dp_rank=run.rank,
            dp_world_size=run.num_ranks,
            reader=run.reader,
            forward_rows=run.forward_rows,
        )
        for i, (batch, seen) in enumerate(run.forward(batches, self._scoring_loss)):
            self._record(batch.columns, seen, step=step, trained=False)
            if (i + 1) % self.buffer.flush_every == 0:
                self.buffer.flush()

    # -- metrics and logs -----------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        scalars = self.teacher.decision_metrics()
        if self.worst_case is not None:
            # The q-norm of the step, unless a loss was not finite. torchtitan waited for the device to log the loss.
            scalars["teacher/worst_case_loss"] = self.worst_case.shown.item()
        return scalars

    def _write_decision(self, record: Record) -> None:
        if self.rounds is not None:
            self.rounds.write(record)

    def _write_quarantined(self, record: Record) -> None:
        """Write one line of teacher/quarantine.jsonl: the quarantined example and its location in the data set."""
        if self.quarantine is not None:
            self.quarantine.write(record | self.run.dataset.location(record["example_id"]))

    def close(self) -> None:
        for log in (self.rounds, self.quarantine):
            if log is not None:
                log.close()

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = self.teacher.state_dict()
        return state if self.worst_case is None else state | {"worst_case_scale": self.worst_case.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state)
        if self.worst_case is not None:
            self.worst_case.scale.copy_(state["worst_case_scale"])
