"""TeachingTrainer: torchtitan's Trainer with the run's systems in its step (systems/system.py).

It names no system. It builds those that the TOML turns on, passes each a ``Run``, and calls them in a fixed order. Two
things differ from the stock step: a system may replace the loss, and systems are called after every microbatch and
every step. If no system changes the loss, torchtitan's own code runs.

Cost: none of its own. No host sync is added between forward and optimizer step.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.train import Trainer

from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.run_record import write_run_record
from titan_attent.foundations.ledger import Ledger
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.losses.mixed import mixing
from titan_attent.systems.system import Batch, Columns, ExampleStats, Frozen, LossFunction, Run, StepLoss
from titan_attent.titan.checks.load_sources import checkpoint_to_load
from titan_attent.titan.columns import take_columns
from titan_attent.titan.data_plan import DataPlan
from titan_attent.titan.document_mask import document_batch
from titan_attent.titan.forward_rows import forward_rows_of, static_shapes
from titan_attent.titan.frozen_model import FrozenModel, build_frozen, check_frozen
from titan_attent.titan.health import Health
from titan_attent.titan.joined_systems import JoinedSystems
from titan_attent.titan.loader import TeachingLoader
from titan_attent.titan.metrics import TeachingMetricsProcessor
from titan_attent.titan.models.families import family_of
from titan_attent.titan.owner import own_folders, release_folders
from titan_attent.titan.patches import compat
from titan_attent.titan.patches.checkpoint_manager import LEDGER, Checkpoints
from titan_attent.titan.pipeline import PipelineLoss, replica_sources_of
from titan_attent.titan.settings import describe, settings_of, systems_of
from titan_attent.titan.source_losses import StepSources
from titan_attent.titan.user_errors import fail, on_all_ranks


class TeachingTrainer(Trainer):
    """Trains with the systems that the TOML turns on.

    A run can be resumed on another number of data-parallel ranks if its global batch size stays the same.
    """

    num_labels: Tensor | float = 0
    """Number of labels with a loss in the global batch of the current step."""

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        self.loader = cast(TeachingLoader, self.dataloader)
        self.tokens_per_example = self.loader.dataset.tokens_per_example
        self.batch_size: int = self.loader.geometry["training.global_batch_size"]
        self.starts_anew = checkpoint_to_load(job_config) is None
        active = systems_of(job_config)
        self.ledger = Ledger(
            batch_size=self.batch_size,
            tokens_per_example=self.tokens_per_example,
            accounts=[account for system, _ in active for account in system.accounts],
        )
        self.plan = DataPlan(self, batch_size=self.batch_size)
        self.packer = self.plan.packer
        self.forward_rows = forward_rows_of(self, self.loader.dataset)
        self.sources = StepSources(self)
        try:
            self.systems = JoinedSystems(active, self._run(), self._stock_loss)
        except ValueError as error:
            fail(error)
        # Added to torchtitan's own states, whose keys stay as they are.
        self.checkpointer.states |= self.systems.states
        if "teacher" not in self.systems.states:  # a teacher saves the ledger in its own state
            self.checkpointer.states[LEDGER] = self.ledger
        self.loader.follow(
            self.systems.sampler or self.plan.sampler_of_all(),
            before_decision=self.checkpointer.maybe_wait_for_staging,
            step=lambda: self.step,
            **self.systems.for_loader,
        )
        if self.parallel_dims.pp_enabled:
            self.pp_schedule: Any = self.systems.wrap_schedule(self.pp_schedule)
            if job_config.validation.enable:
                self.validator.pp_schedule = self.pp_schedule
        self.health = Health(self)
        save = self.systems.during_pause(self.checkpointer.save, when=self.checkpointer._should_save)
        save = self.health.guarded(save)
        self.checkpointer.save = self.ledger.charged("save", save)
        if job_config.validation.enable:
            self.validator.validate = self.ledger.charged(
                "validate", self.systems.during_pause(self.validator.validate)
            )
        cast(TeachingMetricsProcessor, self.metrics_processor).follow(
            run_metrics=lambda: (
                self.ledger.metrics() | self.plan.metrics() | self.systems.metrics() | self.sources.metrics()
            ),
            logged=self.health.logged,
            validated=self.health.validated,
            tokens_per_image=self.tokens_per_example if family_of(job_config).modality.is_of_images else None,
            is_last_stage=not self.parallel_dims.pp_enabled or self.pp_has_last_stage,
            device=self.device,
        )
        cast(Checkpoints, self.checkpointer).weights_to_load = self.systems.weights_to_load
        # Created once: making it from a host number in each step would copy to the device.
        self.no_loss = torch.tensor([-1.0], device=self.device)

    def _run(self) -> Run:
        job_config, dims = self.job_config, self.parallel_dims
        return Run(
            dataset=self.loader.dataset,
            batch_size=self.batch_size,
            open_scores=self.loader.datasets.scores,
            settings=settings_of(job_config),
            device=self.device,
            mesh=dims.get_optional_mesh,
            rank=self.loader.dp_rank,
            num_ranks=self.loader.dp_world_size,
            microbatches=self.loader.microbatches,
            replica_sources=replica_sources_of(dims, self.pp_schedule if dims.pp_enabled else None),
            ledger=self.ledger,
            packer=self.packer,
            mixture=self.plan.mixture,
            proportions=self.plan.proportions,
            forward_rows=self.forward_rows,
            reader=self.loader.reader,
            step=lambda: self.step,
            served=lambda: self.loader.served,
            num_labels=lambda: int(self.num_labels),
            forward=self.forward,
            model_parts=self.model_parts,
            loss=family_of(job_config).modality.loss(job_config),
            build_example_loss=family_of(job_config).modality.example_loss(job_config),
            predict=self.predict,
            check_frozen=partial(check_frozen, job_config),
            build_frozen=self.build_frozen,
            load_frozen=self.load_frozen,
            log_text=cast(TeachingMetricsProcessor, self.metrics_processor).text_logger(step=lambda: self.step),
        )

    def _write_run_record(self) -> None:
        """Write data.json, which the report reads."""
        systems = [type(system) for system in self.systems]
        record = describe(
            self.job_config, self.loader.dataset, batch_size=self.batch_size, device=self.device, systems=systems
        )
        write_run_record(Path(self.job_config.job.dump_folder) / "teacher", record, losses=self.systems.folders_read())

    def init_distributed(self) -> ParallelDims:
        parallel_dims = super().init_distributed()
        own_folders(self.job_config)  # before anything is written there
        return parallel_dims

    def build_frozen(self, checkpoint: str, *, family: str = "", flavor: str = "") -> FrozenModel | None:
        """Build a second, frozen model; see :class:`Run`. A collective."""
        try:
            if self.parallel_dims.pp_enabled and not self.pp_has_last_stage:
                check_frozen(self.job_config, checkpoint, family=family, flavor=flavor)
                frozen = None
            else:
                frozen = build_frozen(
                    self.job_config,
                    checkpoint,
                    family=family,
                    flavor=flavor,
                    dims=self.parallel_dims,
                    device=self.device,
                    tokenizer=self.tokenizer,
                    precision=lambda: self.maybe_enable_amp,
                )
        except ValueError as error:
            fail(error)
        self.load_frozen(frozen, checkpoint)
        return frozen

    def load_frozen(self, frozen: Frozen | None, checkpoint: str) -> None:
        """Replace the weights of a frozen model; see :class:`Run`. A collective."""
        try:
            on_all_ranks(lambda: None if frozen is None else frozen.load(checkpoint))
        except ValueError as error:
            fail(error)

    # -- a microbatch ---------------------------------------------------------------------------------------------

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor) -> Any:
        """Prepare the model's inputs with torchtitan's method or, for document masks, with document_mask.py.

        Keeps inputs and labels for the systems' batch.
        """
        if self.job_config.data.document_mask:
            tp_mesh = self.parallel_dims.get_optional_mesh("tp")
            processed: Any = document_batch(self.model_parts[0], input_dict, labels, tp_mesh=tp_mesh)
        else:
            processed = super().post_dataloading_process(input_dict, labels)
        self.processed: tuple[Tensor, Tensor] = processed[:2]
        return processed

    def _stock_loss(self, pred: Tensor, batch: Batch) -> StepLoss:
        """torchtitan's own loss, which a system may wrap."""
        loss = cast(PipelineLoss, self.loss_fn).stock if self.parallel_dims.pp_enabled else self.loss_fn
        loss_sum = loss(pred, batch.labels, *mixing(batch.columns))
        if isinstance(loss_sum, DTensor):  # tensor parallelism shards the vocabulary; the sum is equal on its ranks
            loss_sum = loss_sum.full_tensor()
        return StepLoss(loss_sum, loss_sum.detach(), self.sources.measure(pred, batch))

    def _take_columns(self, input_dict: dict[str, Tensor]) -> Columns:
        """Remove the columns from ``input_dict``, which is passed to the model's forward, and return them."""
        names = (*self.systems.column_names, *self.loader.dataset.columns)
        cp_mesh, per_token = self.parallel_dims.get_optional_mesh("cp"), self.systems.token_columns
        return take_columns(input_dict, names, self.job_config, cp_mesh=cp_mesh, per_token=per_token)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """Run one microbatch; return the unweighted loss sum / global valid tokens, which is comparable across runs."""
        columns, seen = self._take_columns(input_dict), cast("ExampleStats | None", {})
        systems, self.num_labels = self.systems, global_valid_tokens
        dims = self.parallel_dims
        # DDP averages gradients that are already divided by the token count (torchtitan #2323); FSDP sums them.
        ddp_ranks = 1 if dims.fsdp_enabled else dims.dp_replicate
        divisor = global_valid_tokens / ddp_ranks
        if dims.pp_enabled:
            with systems.around_backward():
                batch, loss_sum, seen = self._pipeline_step(input_dict, labels, columns, systems.loss, divisor=divisor)
            logged = self.no_loss if loss_sum is None else loss_sum / divisor
        elif systems.loss == self._stock_loss and not mixing(columns) and not self.sources.in_this_step:
            with systems.around_backward():
                loss = super().forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=divisor)
            batch = Batch(*self.processed, columns)
            logged = loss / ddp_ranks
        else:
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
            (model,) = self.model_parts
            with self.train_context():
                with self.maybe_enable_amp:
                    pred = model(inputs, **extra_inputs, **extra_kwargs)
                    batch = Batch(inputs, labels, columns)
                    to_differentiate, loss_sum, seen = systems.loss(pred, batch)
                del pred  # before the backward, to lower its peak memory
                with systems.around_backward():
                    (to_differentiate / divisor).backward()
            logged = loss_sum / global_valid_tokens
        systems.after_microbatch(batch, seen)
        self.sources.add(batch, seen)
        self.health.saw(logged)
        return logged

    def _pipeline_step(
        self,
        input_dict: dict[str, Tensor],
        labels: Tensor,
        columns: Columns,
        loss: LossFunction,
        *,
        divisor: Tensor | float,
        backward: bool = True,
    ) -> tuple[Batch, Tensor | None, ExampleStats | None]:
        """Run one of the trainer's microbatches through the pipeline, which splits it into pipeline microbatches.

        Returns:
            (batch, unweighted loss sum, statistics of the examples); the last two are None on ranks without the last
            stage.
        """
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        run = self.pp_schedule.step if backward else self.pp_schedule.eval
        first = ((inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
        loss_fn, config = cast(PipelineLoss, self.loss_fn), self.job_config
        batch = Batch(inputs, labels, columns)
        num_microbatches = config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
        with (
            self.train_context(),
            loss_fn.step(loss, batch, num_microbatches=num_microbatches, divisor=divisor) as step,
        ):
            run(
                *first[0],
                **first[1],
                **extra_kwargs,
                target=step.target() if self.pp_has_last_stage else None,
                return_outputs=False,
            )
        return (batch, step.loss_sum(), step.seen()) if self.pp_has_last_stage else (batch, None, None)

    @torch.no_grad()
    def forward(self, batches: Iterable[ReadBatch], loss: LossFunction) -> Iterator[tuple[Batch, ExampleStats | None]]:
        """Yield each batch and the statistics that ``loss`` computes from it, in eval mode; see :class:`Run`.

        A collective.
        """
        for part in self.model_parts:
            part.eval()
        with self.systems.paused(), compat.expert_counts_kept(self.model_parts):
            for input_dict, labels in batches:
                input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
                labels, columns = labels.to(self.device), self._take_columns(input_dict)
                if self.parallel_dims.pp_enabled:
                    batch, _, seen = self._pipeline_step(input_dict, labels, columns, loss, divisor=1.0, backward=False)
                else:
                    inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
                    with static_shapes(self.forward_rows), self.train_context(), self.maybe_enable_amp:
                        batch = Batch(inputs, labels, columns)
                        seen = loss(self.model_parts[0](inputs, **extra_inputs, **extra_kwargs), batch).stats
                yield batch, seen
        for part in self.model_parts:
            part.train()

    @contextmanager
    def predict(self, inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits and labels of a differentiable forward pass; see :class:`Run`. A collective."""
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
            {"input": inputs.to(self.device)}, labels.to(self.device)
        )
        (model,) = self.model_parts
        with compat.expert_counts_kept(self.model_parts), self.train_context():
            with self.maybe_enable_amp:
                pred = model(inputs, **extra_inputs, **extra_kwargs)
            yield pred, labels

    # -- a step ---------------------------------------------------------------------------------------------------

    def train_step(self, data_iterator: Iterator[ReadBatch]) -> None:
        with self.ledger.charge("train"):
            super().train_step(data_iterator)
        self.systems.after_step()

    def batch_generator(self, data_iterable: Any) -> Iterator[ReadBatch]:
        # torchtitan calls this once, after it loaded the checkpoint and before the first step.
        self.health.begin()
        if self.step == 0 and self.starts_anew:
            self.systems.set_initial_weights()
        if is_first_rank():
            self._write_run_record()
        self.systems.before_first_step()
        self.ledger.start()
        return self._charged_batches(super().batch_generator(data_iterable))

    def _charged_batches(self, batches: Iterator[ReadBatch]) -> Iterator[ReadBatch]:
        next_batch = self.ledger.charged("load", lambda: next(batches, None))
        while (batch := next_batch()) is not None:
            # torchtitan counts labels instead of tokens. It also counts whole sequences on every context parallel rank
            # and sums over these ranks (#2990).
            num_labels, num_tokens = batch[1].numel(), len(batch[1]) * self.tokens_per_example
            self.metrics_processor.ntokens_since_last_log += num_tokens - num_labels
            self.ntokens_seen += num_tokens // self.parallel_dims.cp - num_labels
            yield batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torchtitan restores the tokens of one rank, which is wrong if the number of ranks has changed.
        tokens_per_step = self.batch_size * self.tokens_per_example
        self.ntokens_seen = self.step * tokens_per_step // (self.loader.dp_world_size * self.parallel_dims.cp)

    def close(self) -> None:
        if hasattr(self, "systems"):
            self.systems.close()
        cast(TeachingLoader, self.dataloader).close()
        super().close()
        release_folders(self.job_config)
