"""Validation over token shards: the same examples each time, the mean over all their valid tokens.

The stock validator hardwires the Hugging Face text loader, goes on where the last validation stopped (torchtitan
thread #2791) and averages step averages. This one reads ``data.validation_path`` from its start, and its result does
not depend on the batch size or, with ``validation.steps = -1`` (the whole set), on the number of ranks.
"""

from contextlib import AbstractContextManager

import titan_attent.compat  # noqa: F401

import torch
from torch import nn
from torchtitan.components.loss import LossFunction
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import ValidationContext, Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from titan_attent.data.loader import FixedLoader
from titan_attent.data.order import Pool
from titan_attent.data.shards import TokenDataset
from titan_attent.loss import IGNORE_INDEX


class ShardValidator(Validator):
    """torchtitan's Validator over a :class:`FixedLoader`; data parallelism only, as the trainer's check grants."""

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
    ):
        # Not super().__init__: it would build the text loader.
        self.job_config = job_config
        self.loader = loader
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log ``validation_metrics/loss``: nats a token over the validation set. A collective, on all ranks."""
        (model,) = model_parts
        model.eval()
        device = torch.device(utils.device_type)
        # float64: thousands of batch sums, whose order must not show.
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for input_dict, labels in self.loader:
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            input_dict = {name: tensor.to(device) for name, tensor in input_dict.items()}
            del input_dict["example_id"]
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
                input_dict, labels.to(device), model_parts
            )
            with self.validation_context(), self.maybe_enable_amp:
                loss_sum = self.loss_fn(model(inputs, **extra_inputs, **extra_kwargs), labels)
            totals += torch.stack((loss_sum.double(), (labels != IGNORE_INDEX).sum().double()))
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            torch.distributed.all_reduce(totals, group=mesh.get_group())
        loss_sum, num_tokens = totals.tolist()
        self.metrics_processor.log_validation(loss=loss_sum / num_tokens, step=step)
        model.train()


def build_shard_validator(
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer | None,
    parallel_dims: ParallelDims,
    loss_fn: LossFunction,
    validation_context: ValidationContext,
    maybe_enable_amp: AbstractContextManager[None],
    metrics_processor: MetricsProcessor,
    pp_schedule: object = None,
    pp_has_first_stage: bool | None = None,
    pp_has_last_stage: bool | None = None,
) -> ShardValidator:
    """torchtitan's ``build_validator_fn``."""
    validation, data = job_config.validation, job_config.data
    dataset = TokenDataset(data.validation_path, seq_len=validation.seq_len)
    num_examples = len(dataset)
    if validation.steps > 0:
        num_examples = min(num_examples, validation.steps * validation.local_batch_size * dp_world_size)
    return ShardValidator(
        job_config,
        loader=FixedLoader(
            dataset,
            Pool(len(dataset), size=num_examples),
            batch_size=validation.local_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            num_workers=data.num_workers,
        ),
        tokenizer=tokenizer,
        parallel_dims=parallel_dims,
        loss_fn=loss_fn,
        validation_context=validation_context,
        maybe_enable_amp=maybe_enable_amp,
        metrics_processor=metrics_processor,
    )
