"""TeachingTrainer: torchtitan's Trainer with a teacher beside it.

What differs from the stock step: the loss is taken per example and weighted (not under ``uniform``, which keeps
torchtitan's own loss and step untouched), the losses go to the buffer, and after the step the teacher may start an
asynchronous exchange. No host sync is added between forward and optimizer step.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import titan_attent.compat  # noqa: F401

import torch
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from titan_attent import preflight
from titan_attent.data.loader import FixedLoader, TeachingLoader
from titan_attent.data.order import Pool
from titan_attent.loss import build_weighted_loss
from titan_attent.loss_buffer import LossBuffer
from titan_attent.loss_window import LossWindow, neutral_statistics
from titan_attent.metrics import TeachingMetricsProcessor
from titan_attent.reference import ReferenceLosses
from titan_attent.teacher.teacher import Teacher
from titan_attent.teacher.trace import JsonLines


class TeachingTrainer(Trainer):
    """Trains what the teacher chooses; resumable on any number of data-parallel ranks with the same global batch."""

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        loader = cast(TeachingLoader, self.dataloader)
        teacher_config, data_config = job_config.teacher, job_config.data
        with_gradient = teacher_config.importance == "functional_gradient"
        self.buffer = LossBuffer(
            len(loader.dataset),
            mesh=self.parallel_dims.get_optional_mesh("batch"),
            device=self.device,
            with_gradient=with_gradient,
            window=self._loss_window(),
        )
        self.teacher = Teacher(
            self.buffer,
            teacher_config,
            batch_size=loader.geometry["training.global_batch_size"],
            total_steps=job_config.training.steps,
            data_seed=data_config.seed,
            tokens_per_example=job_config.training.seq_len,
            reference=self._reference_losses(),
            vocab_size=loader.dataset.shards.index.tokenizer["vocab_size"],
            sources=loader.dataset.sources,
            score=self.score_examples,
            on_decision=lambda record: self.rounds.write(record) if self.rounds is not None else None,
            on_quarantine=self._write_quarantined,
        )
        ledger = self.teacher.ledger
        self.checkpointer.save = ledger.charged("save", self.checkpointer.save)
        if job_config.validation.enable:
            self.validator.validate = ledger.charged("validate", self.validator.validate)
        loader.attach(self.teacher, before_decision=self.checkpointer.maybe_wait_for_staging)
        cast(TeachingMetricsProcessor, self.metrics_processor).teacher_metrics = self.teacher.metrics
        # Beside torchtitan's own states, so that stock keys stay stock.
        self.checkpointer.states["teacher"] = self.teacher
        self.teaching = teacher_config.strategy != "uniform"
        compile_config = job_config.compile
        self.weighted_loss = build_weighted_loss(
            compile_loss=compile_config.enable and "loss" in compile_config.components,
            with_gradient=with_gradient,
            temperature=teacher_config.temperature if teacher_config.weighting == "loss" else None,
            backend=compile_config.backend,
        )
        # Of rank 0, from the first step on.
        self.trace: JsonLines | None = None
        self.rounds: JsonLines | None = None
        self.quarantine: JsonLines | None = None
        self._log_plan()

    def init_distributed(self) -> ParallelDims:
        parallel_dims = super().init_distributed()
        if self.job_config.data.verify_checksums:
            try:
                preflight.check_checksums(self.job_config)
            except ValueError as error:
                preflight.fail(error)
        return parallel_dims

    def _reference_losses(self) -> Tensor | None:
        """fp32 [num_local], those of the examples that this rank owns; None unless the importance reads them."""
        config = self.job_config.teacher
        if config.importance != "excess_loss":
            return None
        sharding = self.buffer.sharding
        return ReferenceLosses(config.reference_path).read(sharding.start, sharding.stop).to(self.device)

    def _loss_window(self) -> LossWindow | None:
        config = self.job_config.teacher
        if config.weighting != "loss":
            return None
        batch_size = cast(TeachingLoader, self.dataloader).geometry["training.global_batch_size"]
        return LossWindow(batch_size=batch_size, temperature=config.temperature, device=self.device)

    def _write_quarantined(self, record: dict[str, Any]) -> None:
        """One line of teacher/quarantine.jsonl: what was set aside, and where its tokens stand."""
        if self.quarantine is not None:
            shard, first = cast(TeachingLoader, self.dataloader).dataset.locate(record["example_id"])
            place = {"shard": shard, "first_token": first, "num_tokens": self.job_config.training.seq_len + 1}
            self.quarantine.write(record | place)

    def _log_plan(self) -> None:
        teacher, plan, steps = self.teacher, self.teacher.plan, self.job_config.training.steps
        logger.info(
            f"Teacher: {teacher.config.strategy}, {teacher.num_examples:,} examples, warm-up {plan.warmup_steps} "
            f"steps, full data again from step {plan.anneal_start + 1} of {steps}"
        )
        if self.teaching and plan.warmup_steps >= plan.anneal_start:
            logger.warning(
                f"The teacher never selects: its warm-up of {teacher.config.warmup_passes} full passes takes "
                f"{plan.warmup_steps} steps and the last part on the full data starts at {plan.anneal_start}. "
                "Train for more steps, or lower teacher.warmup_passes or teacher.anneal_fraction"
            )
        visits = steps * teacher.batch_size / teacher.num_examples
        if self.teaching and visits <= 1 and teacher.config.strategy != "random":
            if teacher.config.scoring == "train":
                logger.warning(
                    f"An example is trained {visits:.2g} times in this run: its loss of training comes too late to "
                    'choose it by. Use teacher.scoring = "forward" with a teacher.pool_size and warmup_passes = 0, or '
                    'weights alone (teacher.weighting = "loss")'
                )
            if teacher.config.importance == "learnability":
                logger.warning(
                    f"An example is trained {visits:.2g} times in this run: learnability needs two readings of its "
                    "loss and falls back to the loss itself"
                )
        if teacher.config.strategy == "hard" and teacher.config.weighting == "inverse_probability":
            logger.info("Hard selection has equal weights: no weight corrects for examples dropped with certainty")

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One microbatch. Returns the unweighted loss sum / global valid tokens, so that runs compare."""
        example_ids = input_dict.pop("example_id")  # before it becomes an argument of the model's forward
        weights = input_dict.pop("weight")
        if not self.teaching:
            return super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        (model,) = self.model_parts
        with self.train_context():
            with self.maybe_enable_amp:
                pred = model(inputs, **extra_inputs, **extra_kwargs)
                weighted_sum, loss_sum, losses, gradients = self.weighted_loss(
                    pred, labels, weights, self.teacher.loss_statistics(self.step)
                )
            del pred  # before the backward, whose peak it would raise
            (weighted_sum / global_valid_tokens).backward()
        self.buffer.record(example_ids, losses, step=self.step, gradients=gradients)
        return loss_sum / global_valid_tokens

    @torch.no_grad()
    def score_examples(self, step: int, pool: Pool) -> None:
        """Record the loss of every example of ``pool`` by a forward pass in eval mode; each rank takes its share.

        A collective, on all ranks; about a third of the compute of a training pass over the pool.
        """
        loader = cast(TeachingLoader, self.dataloader)
        (model,) = self.model_parts
        model.eval()
        batches = FixedLoader(
            loader.dataset,
            pool,
            batch_size=self.job_config.teacher.scoring_batch_size or self.job_config.training.local_batch_size,
            dp_rank=loader.dp_rank,
            dp_world_size=loader.dp_world_size,
            num_workers=loader.num_workers,
        )
        for i, (input_dict, labels) in enumerate(batches):
            input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
            example_ids = input_dict.pop("example_id")
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
                input_dict, labels.to(self.device)
            )
            with self.train_context(), self.maybe_enable_amp:
                pred = model(inputs, **extra_inputs, **extra_kwargs)
                weights, neutral = torch.ones_like(example_ids).float(), neutral_statistics(self.device)
                _, _, losses, gradients = self.weighted_loss(pred, labels, weights, neutral)
            self.buffer.record(example_ids, losses, step=step, gradients=gradients, trained=False)
            if (i + 1) % self.buffer.flush_every == 0:
                self.buffer.flush()
        model.train()

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        with self.teacher.ledger.charge("train"):
            super().train_step(data_iterator)
            self.teacher.step_done()
        if self.trace is not None:
            served = cast(TeachingLoader, self.dataloader).served
            assert served is not None
            current, batch = served
            ids = current.ids(batch, batch + 1).tolist()
            self.trace.write({"step": self.step, "round": current.round, "strategy": current.strategy, "ids": ids})

    def batch_generator(self, data_iterable: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        # Called once, after the checkpoint was loaded and before the first step: the resumed step is known here.
        if torch.distributed.get_rank() == 0:
            folder = Path(self.job_config.job.dump_folder) / "teacher"
            self.rounds = JsonLines(folder / "rounds.jsonl", step=self.step)
            if self.job_config.teacher.quarantine_after:
                self.quarantine = JsonLines(folder / "quarantine.jsonl", step=self.step)
            if self.job_config.teacher.trace:
                self.trace = JsonLines(folder / "trace.jsonl", step=self.step)
        self.teacher.ledger.start()
        return self._charged_batches(super().batch_generator(data_iterable))

    def _charged_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        next_batch = self.teacher.ledger.charged("load", lambda: next(batches, None))
        while (batch := next_batch()) is not None:
            yield batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torchtitan counts a rank's own tokens; at another number of ranks a rank's share is another.
        loader = cast(TeachingLoader, self.dataloader)
        tokens_per_step = loader.geometry["training.global_batch_size"] * self.job_config.training.seq_len
        self.ntokens_seen = self.step * tokens_per_step // loader.dp_world_size

    def close(self) -> None:
        for name in ("trace", "rounds", "quarantine"):
            if (lines := getattr(self, name, None)) is not None:
                lines.close()
        super().close()
