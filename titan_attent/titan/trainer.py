"""TeachingTrainer: torchtitan's Trainer with a teacher beside it.

What differs from the stock step: the loss is taken per example and weighted (not under ``uniform``, which keeps
torchtitan's own loss and step untouched), the losses go to the buffer, and after the step the teacher may start an
asynchronous exchange. No host sync is added between forward and optimizer step.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torchtitan.config import JobConfig
from torchtitan.train import Trainer

from titan_attent.data.fixed import FixedLoader
from titan_attent.data.order import Pool
from titan_attent.data.reader import Batch
from titan_attent.foundations.json_lines import JsonLines
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.vocab_parallel import valid_counts, whole_example_means
from titan_attent.losses.window import LossWindow, neutral_statistics
from titan_attent.teacher.advice import log_plan
from titan_attent.teacher.teacher import Teacher
from titan_attent.titan import compat
from titan_attent.titan.loader import TeachingLoader
from titan_attent.titan.metrics import TeachingMetricsProcessor
from titan_attent.titan.pipeline import PipelineLoss, pack_target
from titan_attent.titan.train_spec import build_example_loss


class TeachingTrainer(Trainer):
    """Trains what the teacher chooses; resumable on any number of data-parallel ranks with the same global batch."""

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        loader = cast(TeachingLoader, self.dataloader)
        teacher_config, data_config = job_config.teacher, job_config.data
        self.buffer = LossBuffer(
            len(loader.dataset),
            mesh=self.parallel_dims.get_optional_mesh("batch"),
            device=self.device,
            with_gradient=teacher_config.importance == "functional_gradient",
            window=self._loss_window(),
            copies=self._copies(),
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
        # Made of host numbers, which a step must not copy to the device.
        self.neutral_statistics = neutral_statistics(self.device)
        self.no_loss = torch.tensor([-1.0], device=self.device)
        self.weighted_loss = build_example_loss(job_config, parallel_dims=self.parallel_dims)
        # Of rank 0, from the first step on.
        self.trace: JsonLines | None = None
        self.rounds: JsonLines | None = None
        self.quarantine: JsonLines | None = None
        log_plan(self.teacher, total_steps=job_config.training.steps)

    def _reference_losses(self) -> Tensor | None:
        """fp32 [num_local], those of the examples that this rank owns; None unless the importance reads them."""
        reference, sharding = cast(TeachingLoader, self.dataloader).reference, self.buffer.sharding
        return None if reference is None else reference.read(sharding.start, sharding.stop).to(self.device)

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

    def _copies(self) -> list[tuple[DeviceMesh, int]]:
        """The mesh dimensions beside ``batch``, and the rank on each whose losses count."""
        sources = {"pp": 0, "cp": 0, "tp": 0}
        if self.parallel_dims.pp_enabled:
            # The schedules in the shape of a V end where they began.
            ends_on_first = isinstance(self.pp_schedule, (ScheduleZBVZeroBubble, ScheduleDualPipeV))
            sources["pp"] = 0 if ends_on_first else self.parallel_dims.pp - 1
        meshes = {name: self.parallel_dims.get_optional_mesh(name) for name in sources}
        return [(mesh, sources[name]) for name, mesh in meshes.items() if mesh is not None]

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One microbatch. Returns the unweighted loss sum / global valid tokens, so that runs compare."""
        example_ids = input_dict.pop("example_id")  # before it becomes an argument of the model's forward
        weights = input_dict.pop("weight")
        dims = self.parallel_dims
        # DDP averages gradients that were divided already (torchtitan #2323); FSDP sums them.
        ddp_ranks = 1 if dims.fsdp_enabled else dims.dp_replicate
        divisor = global_valid_tokens / ddp_ranks
        if dims.pp_enabled:
            return self._pipeline_step(input_dict, labels, example_ids, weights, divisor=divisor)
        if not self.teaching:
            return (
                super().forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=divisor)
                / ddp_ranks
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
            (weighted_sum / divisor).backward()
        self._record(example_ids, losses, gradients, valid_counts(labels), step=self.step)
        return loss_sum / global_valid_tokens

    def _record(
        self,
        example_ids: Tensor,
        losses: Tensor,
        gradients: Tensor | None,
        counts: Tensor,
        *,
        step: int,
        trained: bool = True,
    ) -> None:
        """Give the buffer the losses of whole examples. A collective on the ``cp`` mesh, without a host sync."""
        mesh = self.parallel_dims.get_optional_mesh("cp")
        if mesh is not None:
            losses, gradients = whole_example_means(losses, gradients, counts, group=mesh.get_group())
        self.buffer.record(example_ids, losses, step=step, gradients=gradients, trained=trained)

    def _pipeline_step(
        self,
        input_dict: dict[str, Tensor],
        labels: Tensor,
        example_ids: Tensor,
        weights: Tensor,
        *,
        divisor: Tensor,
        scored_at: int | None = None,
    ) -> Tensor:
        """:meth:`forward_backward_step` through the pipeline; only the forward, at a step, with ``scored_at``.

        Returns -1 where the last stage is not, as torchtitan does.
        """
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        run = self.pp_schedule.step if scored_at is None else self.pp_schedule.eval
        first = ((inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
        statistics = self.teacher.loss_statistics(self.step) if scored_at is None else self.neutral_statistics

        def weighted_loss(
            logits: Tensor, labels: Tensor, weights: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            return self.weighted_loss(logits, labels, weights, statistics)

        target = pack_target(labels, example_ids, weights) if self.teaching else labels
        loss_fn, config = cast(PipelineLoss, self.loss_fn), self.job_config
        num_microbatches = config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
        with (
            self.train_context(),
            loss_fn.step(
                num_microbatches=num_microbatches, divisor=divisor, weighted=weighted_loss if self.teaching else None
            ) as seen,
        ):
            run(
                *first[0],
                **first[1],
                **extra_kwargs,
                target=target if self.pp_has_last_stage else None,
                return_outputs=False,
            )
        if self.teaching:
            if self.pp_has_last_stage:
                example_ids, losses, gradients, counts = seen.examples()
            else:  # the buffer's exchange brings them
                losses = counts = torch.zeros_like(weights)
                gradients = losses if self.teacher.config.importance == "functional_gradient" else None
            step, trained = (self.step, True) if scored_at is None else (scored_at, False)
            self._record(example_ids, losses, gradients, counts, step=step, trained=trained)
        return seen.loss_sum() / divisor if self.pp_has_last_stage else self.no_loss

    @torch.no_grad()
    def score_examples(self, step: int, pool: Pool) -> None:
        """Record the loss of every example of ``pool`` by a forward pass in eval mode; each rank takes its share.

        A collective, on all ranks; about a third of the compute of a training pass over the pool.
        """
        loader = cast(TeachingLoader, self.dataloader)
        for part in self.model_parts:
            part.eval()
        batches = FixedLoader(
            loader.dataset,
            pool,
            batch_size=self.job_config.teacher.scoring_batch_size or self.job_config.training.local_batch_size,
            dp_rank=loader.dp_rank,
            dp_world_size=loader.dp_world_size,
            reader=loader.reader,
        )
        with compat.expert_counts_kept(self.model_parts):
            for i, (input_dict, labels) in enumerate(batches):
                input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
                labels, example_ids = labels.to(self.device), input_dict.pop("example_id")
                weights = torch.ones_like(example_ids, dtype=torch.float32)
                if self.parallel_dims.pp_enabled:
                    one = torch.ones_like(weights[0])
                    self._pipeline_step(input_dict, labels, example_ids, weights, divisor=one, scored_at=step)
                else:
                    (model,) = self.model_parts
                    inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
                    with self.train_context(), self.maybe_enable_amp:
                        pred = model(inputs, **extra_inputs, **extra_kwargs)
                        _, _, losses, gradients = self.weighted_loss(pred, labels, weights, self.neutral_statistics)
                    self._record(example_ids, losses, gradients, valid_counts(labels), step=step, trained=False)
                if (i + 1) % self.buffer.flush_every == 0:
                    self.buffer.flush()
        for part in self.model_parts:
            part.train()

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

    def _charged_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        next_batch = self.teacher.ledger.charged("load", lambda: next(batches, None))
        while (batch := next_batch()) is not None:
            # torchtitan counts whole sequences on every context parallel rank, then adds the ranks up (#2990).
            num_tokens = batch[1].numel()
            self.ntokens_seen -= num_tokens - num_tokens // self.parallel_dims.cp
            yield batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torchtitan counts a rank's own tokens; at another number of ranks a rank's share is another.
        loader = cast(TeachingLoader, self.dataloader)
        tokens_per_step = loader.geometry["training.global_batch_size"] * self.job_config.training.seq_len
        self.ntokens_seen = self.step * tokens_per_step // (loader.dp_world_size * self.parallel_dims.cp)

    def close(self) -> None:
        for name in ("trace", "rounds", "quarantine"):
            if (lines := getattr(self, name, None)) is not None:
                lines.close()
        cast(TeachingLoader, self.dataloader).close()
        super().close()
