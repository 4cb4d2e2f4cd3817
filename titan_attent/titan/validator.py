"""Validation on the same examples every time: the mean loss over all their valid tokens.

torchtitan's validator always uses the Hugging Face text loader, starts where the last validation stopped (its issue
#2791), and averages the averages of steps. This validator reads ``data.validation_path`` from its start. Its result
does not depend on the batch size, the number of ranks, or the rows in which documents are read. With
``validation.steps`` above 0 it reads a random sample of steps x global batch examples from all data sources, which is
the same in every run on that data. The loss is computed with the plain labels, even if training uses label smoothing or
mixing.

Where the validation data have several sources, the loss of every example is measured, and the mean of each source is
logged, too (source_losses.py). With ``[data] exact_match`` so is the share of examples that are answered right
(losses/exact_match.py).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import LossFunction
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import ValidationContext, Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_attent.data.examples import Examples
from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.plan.order import Key, Pool
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.exact_match import ExactMatch
from titan_attent.systems.system import Batch, ExampleStats, StepLoss
from titan_attent.titan.columns import take_columns
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.document_mask import EXAMPLE_INDEX, document_batch
from titan_attent.titan.forward_rows import build_forward_rows, static_shapes
from titan_attent.titan.loader import global_batch_size
from titan_attent.titan.models.families import family_of
from titan_attent.titan.patches import compat
from titan_attent.titan.pipeline import PipelineLoss
from titan_attent.titan.source_losses import SourceLosses, build_measure, build_source_losses

SAMPLE_ORDER: Key = (0, 0, 0)
"""The key of the random order whose first examples are the sample; independent of data.seed, so that runs compare."""


class ShardValidator(Validator):
    """torchtitan's Validator over a :class:`FixedLoader`, with every parallelism that the trainer supports."""

    def __init__(
        self,
        job_config: JobConfig,
        *,
        loader: FixedLoader,
        tokenizer: BaseTokenizer | None,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: ValidationContext,
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MetricsProcessor,
        pp_schedule: _PipelineSchedule | None,
        pp_has_first_stage: bool | None,
        pp_has_last_stage: bool | None,
        sources: SourceLosses | None = None,
        exact_match: ExactMatch | None = None,
    ):
        # super().__init__ is not called, as it builds the text loader.
        self.job_config = job_config
        self.modality = family_of(job_config).modality
        self.loader = loader
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage, self.pp_has_last_stage = pp_has_first_stage, pp_has_last_stage
        self.sources, self.exact_match = sources, exact_match
        self.loss = self._stock_loss if sources is None else build_measure(job_config, validation=True)

    def _stock_loss(self, pred: Tensor, batch: Batch) -> StepLoss:
        loss = self.loss_fn.stock if isinstance(self.loss_fn, PipelineLoss) else self.loss_fn
        loss_sum = loss(pred, batch.labels)
        if isinstance(loss_sum, DTensor):
            loss_sum = loss_sum.full_tensor()
        return StepLoss(loss_sum, loss_sum, {})

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """The same as the trainer's; torchtitan's validator passes some models masks that their attention refuses."""
        if self.job_config.data.document_mask:
            tp_mesh = self.parallel_dims.get_optional_mesh("tp")
            return document_batch(model_parts[0], input_dict, labels, tp_mesh=tp_mesh)
        inputs = input_dict.pop("input")
        extra_kwargs: dict[str, Any] = {}
        model: Any = model_parts[0]
        if getattr(model.model_args, "attn_type", "sdpa") in ("flex", "varlen"):
            extra_kwargs["attention_masks"] = model.get_attention_masks(
                input_batch=inputs, tokenizer=self.tokenizer, extra_inputs=input_dict
            )
        mesh = self.parallel_dims.get_optional_mesh("cp")
        if mesh is not None:
            balancer = self.job_config.parallelism.context_parallel_load_balancer
            inputs, labels, extra_kwargs = prepare_context_parallel_input(
                inputs, labels, extra_kwargs, mesh, inputs.device, balancer
            )
        return inputs, labels, input_dict, extra_kwargs

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log ``validation_metrics/loss``, the mean over the validation set, that of each of its sources if there are
        several, the modality's other metrics as shares of its valid tokens, and with ``[data] exact_match`` its shares.
        A collective, on all ranks."""
        for part in model_parts:
            part.eval()
        device = torch.device(utils.device_type)
        # float64, so that the order of thousands of batch sums does not change the result.
        num_metrics, exact_match = len(self.modality.metrics), self.exact_match
        num_counts = num_metrics + (exact_match.num_counts if exact_match else 0)
        totals = torch.zeros(2 + num_counts, dtype=torch.float64, device=device)
        cp_mesh = self.parallel_dims.get_optional_mesh("cp")
        with compat.expert_counts_kept(model_parts):
            for input_dict, labels in self.loader:
                self.metrics_processor.ntokens_since_last_log += self.loader.num_tokens(labels)
                input_dict = {name: tensor.to(device) for name, tensor in input_dict.items()}
                columns = take_columns(input_dict, ("example_id", EXAMPLE_INDEX), self.job_config, cp_mesh=cp_mesh)
                inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
                    input_dict, labels.to(device), model_parts
                )
                counted, batch = [], Batch(inputs, labels, columns)
                with static_shapes(self.loader.forward_rows), self.validation_context():
                    if self.pp_schedule is not None:
                        loss_sum, seen, pred = self._pipeline_loss(batch, extra_inputs, extra_kwargs)
                    else:
                        with self.maybe_enable_amp:
                            pred = model_parts[0](inputs, **extra_inputs, **extra_kwargs)
                            _, loss_sum, seen = self.loss(pred, batch)
                        if self.modality.metrics:
                            counted.append(self.modality.count_correct(pred, labels))
                    if exact_match is not None and pred is not None:
                        ids, example_index = columns["example_id"], columns.get(EXAMPLE_INDEX)
                        counted.append(exact_match.count(pred, labels, ids, example_index))
                if loss_sum is None:
                    continue  # an earlier pipeline stage
                if self.sources is not None:
                    self.sources.add(batch.examples, seen)
                sums = torch.stack((loss_sum.double(), (labels != IGNORE_INDEX).sum().double()))
                totals += torch.cat((sums, *counted))
        # Sum over the context parallel shards of the sequence, whose number torchtitan's validator multiplies by
        # (#3257); under a pipeline, send the sums of the last stage to all stages.
        for name in ("loss", "pp"):
            mesh = self.parallel_dims.get_optional_mesh(name)
            if mesh is not None:
                torch.distributed.all_reduce(totals, group=mesh.get_group())
        loss_sum, num_valid, *counts = totals.tolist()
        of_modality = zip(self.modality.metrics, counts[:num_metrics], strict=True)
        shares = {name: count / num_valid for name, count in of_modality}
        if exact_match is not None:
            shares |= exact_match.shares(counts[num_metrics:], num_labels=num_valid)
        if shares:
            logger.info(
                f"validate step: {step:2}  " + "  ".join(f"{name}: {share:.2%}" for name, share in shares.items())
            )
        by_source = {} if self.sources is None else self.sources.take()
        logged = shares | {f"by_source/{name}": loss for name, loss in by_source.items()}
        self.metrics_processor.log_validation(
            loss=loss_sum / num_valid,
            step=step,
            extra_metrics={f"validation_metrics/{name}": value for name, value in logged.items()},
        )
        for part in model_parts:
            part.train()

    def _pipeline_loss(
        self, batch: Batch, extra_inputs: dict[str, Tensor], extra_kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, ExampleStats | None, Tensor | None]:
        """The loss sum, the statistics and, for exact match, the logits of a batch on the last stage; else None."""
        assert self.pp_schedule is not None
        config, loss_fn = self.job_config, cast(PipelineLoss, self.loss_fn)
        num_microbatches = config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
        first: Any = ((batch.inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
        with loss_fn.step(self.loss, batch, num_microbatches=num_microbatches, divisor=1.0) as step:
            pred = self.pp_schedule.eval(
                *first[0],
                **first[1],
                **extra_kwargs,
                target=step.target() if self.pp_has_last_stage else None,
                return_outputs=self.exact_match is not None,
            )
        return (step.loss_sum(), step.seen(), pred) if self.pp_has_last_stage else (None, None, None)


def sample(dataset: Examples, *, num_examples: int) -> Pool:
    """The first ``num_examples`` of ``dataset`` in a fixed random order; all examples if it has no more."""
    if num_examples >= len(dataset):
        return Pool.whole(len(dataset))
    return Pool(len(dataset), order=SAMPLE_ORDER, size=num_examples)


def build_validator(
    datasets: DataSets,
    flavors: Mapping[str, BaseModelArgs],
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer | None,
    parallel_dims: ParallelDims,
    loss_fn: LossFunction,
    validation_context: ValidationContext,
    maybe_enable_amp: AbstractContextManager[None],
    metrics_processor: MetricsProcessor,
    pp_schedule: _PipelineSchedule | None = None,
    pp_has_first_stage: bool | None = None,
    pp_has_last_stage: bool | None = None,
) -> ShardValidator:
    """Implements torchtitan's ``build_validator_fn``, with the flavors of the model."""
    validation, data = job_config.validation, job_config.data
    dataset = family_of(job_config).modality.open(datasets, job_config, validation=True)
    num_examples = len(dataset)
    if validation.steps > 0:
        num_examples = validation.steps * global_batch_size(job_config, dp_world_size=dp_world_size)
    pool = sample(dataset, num_examples=num_examples)
    loss_name = family_of(job_config).modality.validated(job_config)
    device, cp_mesh = torch.device(utils.device_type), parallel_dims.get_optional_mesh("cp")
    logger.info(f"Validation: {pool.size:,} of {len(dataset):,} examples, the same each time; the loss is {loss_name}")
    return ShardValidator(
        job_config,
        loader=FixedLoader(
            dataset,
            pool,
            batch_size=validation.local_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            reader=datasets.reader(data.num_workers),
            forward_rows=build_forward_rows(
                job_config,
                dataset,
                flavors[job_config.model.flavor],
                dims=parallel_dims,
                device=device,
            ),
        ),
        tokenizer=tokenizer,
        parallel_dims=parallel_dims,
        loss_fn=loss_fn,
        validation_context=validation_context,
        maybe_enable_amp=maybe_enable_amp,
        metrics_processor=metrics_processor,
        pp_schedule=pp_schedule,
        pp_has_first_stage=pp_has_first_stage,
        pp_has_last_stage=pp_has_last_stage,
        sources=build_source_losses(dataset, job_config, dims=parallel_dims, device=device),
        exact_match=ExactMatch(dataset.sources, cp_mesh=cp_mesh, device=device) if data.exact_match else None,
    )
