"""Validation on the same examples every time: the mean loss over all their valid tokens.

torchtitan's validator always uses the Hugging Face text loader, starts where the last validation stopped (its issue
#2791), and averages the averages of steps. This validator reads ``data.validation_path`` from its start. Its result
does not depend on the batch size, the number of ranks, or the rows in which documents are read. With
``validation.steps`` above 0 it reads a random sample of steps x global batch examples from all data sources, which is
the same in every run on that data. The loss is computed with the plain labels, even if training uses label smoothing or
mixing.

Where the validation data have several sources, the loss of every example is measured, and the mean of each source is
logged, too (source_losses.py). With ``[data] exact_match`` so is the share of examples that are answered right
(losses/exact_match.py), and with ``group_size`` the majority's vote and the worst inputs (losses/votes.py). Bits per
byte are the sum of the losses over the bytes of the tokens that they are of (data/text/token_bytes.py): they compare
between tokenizers.

With ``[data.validation_sets]`` there are several sets. Each is measured as a single one is, and ``TAG/NAME`` is its
value; ``validation_metrics/loss`` is the mean by the sets' weights.

Cost beside the forward passes: of bits per byte, a look-up per label, and the table of a rank, 8 bytes per token id.
"""

import math
from collections.abc import Mapping, Sequence
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

from titan_attent.data.validation_sets import common, mean_of_sets
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.exact_match import NAME as EXACT_MATCH
from titan_attent.losses.exact_match import TOKENS as TOKEN_ACCURACY
from titan_attent.losses.exact_match import most_likely
from titan_attent.losses.votes import MATCH_P95, MATCH_WORST, VOTE
from titan_attent.systems.system import Batch, ExampleStats, StepLoss
from titan_attent.systems.system import LossFunction as SystemLoss
from titan_attent.titan.columns import take_columns
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.document_mask import EXAMPLE_INDEX, document_batch
from titan_attent.titan.forward_rows import static_shapes
from titan_attent.titan.measured_sets import MeasuredSet, build_sets
from titan_attent.titan.metrics import perplexity
from titan_attent.titan.models.families import family_of
from titan_attent.titan.patches import compat
from titan_attent.titan.pipeline import PipelineLoss
from titan_attent.titan.source_losses import build_measure


class ShardValidator(Validator):
    """torchtitan's Validator over :class:`FixedLoader`, with every parallelism that the trainer supports.

    Args:
        sets: the validation sets, at least one.
    """

    def __init__(
        self,
        job_config: JobConfig,
        *,
        sets: Sequence[MeasuredSet],
        tokenizer: BaseTokenizer | None,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: ValidationContext,
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MetricsProcessor,
        pp_schedule: _PipelineSchedule | None,
        pp_has_first_stage: bool | None,
        pp_has_last_stage: bool | None,
    ):
        # super().__init__ is not called, as it builds the text loader.
        self.job_config = job_config
        self.modality = family_of(job_config).modality
        self.sets = sets
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage, self.pp_has_last_stage = pp_has_first_stage, pp_has_last_stage

    def _loss_of(self, measured: MeasuredSet) -> SystemLoss:
        """The loss of a batch; of every example where the data have several sources, or inputs with several rows."""
        of_all = measured.sources is None and measured.votes is None
        return self._stock_loss if of_all else build_measure(self.job_config, validation=True)

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
        """Log the metrics of every set (:meth:`_measure`) and their means. A collective, on all ranks."""
        for part in model_parts:
            part.eval()
        with compat.expert_counts_kept(model_parts):
            found = {measured.info.name: self._measure(measured, model_parts) for measured in self.sets}
        sets = [measured.info for measured in self.sets]
        means: dict[str, float] = {}
        for metric in common([list(one) for one in found.values()]):
            mean = mean_of_sets(sets, {name: one[metric] for name, one in found.items()})
            if mean is not None and (len(sets) == 1 or "/" not in metric):
                means[metric] = mean
        loss = means.pop("loss")
        logged = {f"validation_metrics/{metric}": value for metric, value in means.items()}
        for info in sets if sets[0].name else ():
            of_set = found[info.name]
            if not self.modality.is_of_images:
                of_set["perplexity"] = perplexity(of_set["loss"])
            for metric, value in of_set.items():
                first, *rest = metric.split("/", 1)
                logged["/".join(("validation_metrics", first, info.name, *rest))] = value
        shares = {metric: share for metric, share in means.items() if self._is_share(metric)}
        if shares:
            logger.info(
                f"validate step: {step:2}  " + "  ".join(f"{name}: {share:.2%}" for name, share in shares.items())
            )
        if sets[0].name:
            losses = "  ".join(f"{name}: {of_set['loss']:7.4f}" for name, of_set in found.items())
            logger.info(f"validate step: {step:2}  loss of {losses}")
        self.metrics_processor.log_validation(loss=loss, step=step, extra_metrics=logged)
        for part in model_parts:
            part.train()

    def _is_share(self, metric: str) -> bool:
        return metric in self.modality.metrics or metric.partition("/")[0] in (
            EXACT_MATCH,
            TOKEN_ACCURACY,
            VOTE,
            MATCH_P95,
            MATCH_WORST,
        )

    def _measure(self, measured: MeasuredSet, model_parts: list[nn.Module]) -> dict[str, float]:
        """The metrics of a set by name: ``loss``, the mean over its valid tokens, of each of its sources if there are
        several (``by_source/SOURCE``), ``bits_per_byte`` where the bytes of tokens are known, the modality's metrics as
        shares of the valid tokens, and with ``[data] exact_match`` its shares. A collective."""
        device, loader, loss = torch.device(utils.device_type), measured.loader, self._loss_of(measured)
        # float64, so that the order of thousands of batch sums does not change the result.
        num_metrics, exact_match = len(self.modality.metrics), measured.exact_match
        num_counts = num_metrics + (exact_match.num_counts if exact_match else 0)
        totals = torch.zeros(3 + num_counts, dtype=torch.float64, device=device)
        cp_mesh = self.parallel_dims.get_optional_mesh("cp")
        for input_dict, labels in loader:
            self.metrics_processor.ntokens_since_last_log += loader.num_tokens(labels)
            input_dict = {name: tensor.to(device) for name, tensor in input_dict.items()}
            columns = take_columns(input_dict, ("example_id", EXAMPLE_INDEX), self.job_config, cp_mesh=cp_mesh)
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
                input_dict, labels.to(device), model_parts
            )
            counted, batch = [], Batch(inputs, labels, columns)
            with static_shapes(loader.forward_rows), self.validation_context():
                if self.pp_schedule is not None:
                    keep = exact_match is not None
                    loss_sum, seen, pred = self._pipeline_loss(loss, batch, extra_inputs, extra_kwargs, keep=keep)
                else:
                    with self.maybe_enable_amp:
                        pred = model_parts[0](inputs, **extra_inputs, **extra_kwargs)
                        _, loss_sum, seen = loss(pred, batch)
                    if self.modality.metrics:
                        counted.append(self.modality.count_correct(pred, labels))
                if exact_match is not None and pred is not None:
                    ids, example_index, predicted = columns["example_id"], columns.get(EXAMPLE_INDEX), most_likely(pred)
                    counted.append(exact_match.count(predicted, labels, ids, example_index))
                    if measured.votes is not None and seen is not None:
                        measured.votes.add(predicted, labels, seen["loss"], seen["valid"])
            if loss_sum is None:
                continue  # an earlier pipeline stage
            if measured.sources is not None:
                measured.sources.add(batch.examples, seen)
            is_valid = labels != IGNORE_INDEX
            num_bytes = bytes_of_labels(labels, measured.token_bytes)
            sums = torch.stack((loss_sum.double(), is_valid.sum().double(), num_bytes))
            totals += torch.cat((sums, *counted))
        # Sum over the context parallel shards of the sequence, whose number torchtitan's validator multiplies by
        # (#3257); under a pipeline, send the sums of the last stage to all stages.
        for name in ("loss", "pp"):
            mesh = self.parallel_dims.get_optional_mesh(name)
            if mesh is not None:
                torch.distributed.all_reduce(totals, group=mesh.get_group())
        total_loss, num_valid, total_bytes, *counts = totals.tolist()
        found = {"loss": total_loss / num_valid}
        if total_bytes:
            found["bits_per_byte"] = total_loss / math.log(2) / total_bytes
        of_modality = zip(self.modality.metrics, counts[:num_metrics], strict=True)
        found |= {name: count / num_valid for name, count in of_modality}
        if exact_match is not None:
            found |= exact_match.shares(counts[num_metrics:], num_labels=num_valid)
        if measured.votes is not None:
            found |= measured.votes.take()
        by_source = {} if measured.sources is None else measured.sources.take()
        return found | {f"by_source/{name}": value for name, value in by_source.items()}

    def _pipeline_loss(
        self,
        loss: SystemLoss,
        batch: Batch,
        extra_inputs: dict[str, Tensor],
        extra_kwargs: dict[str, Any],
        *,
        keep: bool,
    ) -> tuple[Tensor | None, ExampleStats | None, Tensor | None]:
        """The loss sum, the statistics and, with ``keep``, the logits of a batch on the last stage; else None."""
        assert self.pp_schedule is not None
        config, loss_fn = self.job_config, cast(PipelineLoss, self.loss_fn)
        num_microbatches = config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
        first: Any = ((batch.inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
        with loss_fn.step(loss, batch, num_microbatches=num_microbatches, divisor=1.0) as step:
            pred = self.pp_schedule.eval(
                *first[0],
                **first[1],
                **extra_kwargs,
                target=step.target() if self.pp_has_last_stage else None,
                return_outputs=keep,
            )
        return (step.loss_sum(), step.seen(), pred) if self.pp_has_last_stage else (None, None, None)


def bytes_of_labels(labels: Tensor, token_bytes: Tensor | None) -> Tensor:
    """fp64 [], the bytes of all labels that count; 0 without a table.

    Args:
        labels: int64 [B, L], ``IGNORE_INDEX`` where a token does not count.
        token_bytes: int64 [V].
    """
    if token_bytes is None:
        return torch.zeros((), dtype=torch.float64, device=labels.device)
    is_valid = labels != IGNORE_INDEX
    return (token_bytes[labels.masked_fill(~is_valid, 0)] * is_valid).sum().double()


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
    sets = build_sets(
        datasets, flavors, job_config, dp_world_size=dp_world_size, dp_rank=dp_rank, parallel_dims=parallel_dims
    )
    return ShardValidator(
        job_config,
        sets=sets,
        tokenizer=tokenizer,
        parallel_dims=parallel_dims,
        loss_fn=loss_fn,
        validation_context=validation_context,
        maybe_enable_amp=maybe_enable_amp,
        metrics_processor=metrics_processor,
        pp_schedule=pp_schedule,
        pp_has_first_stage=pp_has_first_stage,
        pp_has_last_stage=pp_has_last_stage,
    )
