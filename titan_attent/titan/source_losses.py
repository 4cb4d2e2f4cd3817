"""The mean loss of each data source, of a logged step and of a validation, where the data have several sources.

Of a logged step the mean is over all tokens of its global batch that have a loss. So these means, weighted by tokens,
average to ``loss_metrics/global_avg_loss``. A teacher's loss has the loss of every example already. Where the step has
torchtitan's own loss, the logits of a logged step are read once more, without a gradient.

Cost: 16 bytes per source. Nothing in steps that are not logged. In a logged step and in a validation, a few operations
on [B] per microbatch, and one all-reduce of 16 bytes per source per mesh at the end; with torchtitan's own loss another
forward pass of the loss, over 1,024 tokens at a time or compiled. No host sync before the end of the step.

Shapes: B examples of a microbatch, S sources.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.train import Trainer

from titan_attent.data.examples import Examples
from titan_attent.losses.folding import index_in_batch
from titan_attent.systems.system import Batch, ExampleStats, LossFunction, StepLoss
from titan_attent.titan.document_mask import EXAMPLE_INDEX
from titan_attent.titan.models.families import family_of
from titan_attent.titan.settings import settings_of

MESHES = ("loss", "pp")
"""Meshes whose ranks add up: data and context parallelism, and a pipeline, of which the last stage alone has losses."""
CHUNK_TOKENS = 1024


class SourceLosses:
    """Sums of losses and numbers of valid tokens by source, on the device.

    Args:
        sources: (name, first example id) of each span, as :attr:`~titan_attent.data.examples.Examples.sources`.
        dims: the parallelism of the run.
        device: the device of the losses.
    """

    def __init__(self, sources: Sequence[tuple[str, int]], *, dims: ParallelDims, device: torch.device):
        names, firsts = zip(*sources, strict=True)
        self.names = list(dict.fromkeys(names))
        self.meshes = [mesh for name in MESHES if (mesh := dims.get_optional_mesh(name)) is not None]
        self.borders = torch.tensor(firsts[1:], device=device)
        self.source_of_span = torch.tensor([self.names.index(name) for name in names], device=device)
        # fp64, so that neither the order of the sum nor the number of ranks changes what is logged.
        self.totals = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def add(self, example_ids: Tensor, stats: ExampleStats | None) -> None:
        """Add a microbatch.

        Args:
            example_ids: int64, [B] in any shape.
            stats: "loss", fp32 [B], the mean over the valid tokens that this rank has of an example, and "valid", fp32
                [B], their number. Without them, as on pipeline stages before the last, nothing is added.
        """
        if stats is None or "valid" not in stats:
            return
        spans = torch.bucketize(example_ids.flatten(), self.borders, right=True)
        valid = stats["valid"].double()
        sums = torch.stack((stats["loss"].double() * valid, valid), dim=1)
        self.totals.index_add_(0, self.source_of_span[spans], sums)

    def take(self) -> dict[str, float]:
        """The mean nats per token of each source of which anything was added, and begin anew. A collective."""
        for mesh in self.meshes:
            torch.distributed.all_reduce(self.totals, group=mesh.get_group())
        totals = self.totals.tolist()
        self.totals.zero_()
        return {name: total / valid for name, (total, valid) in zip(self.names, totals, strict=True) if valid}


def build_source_losses(
    dataset: Examples, job_config: JobConfig, *, dims: ParallelDims, device: torch.device
) -> SourceLosses | None:
    """None for data of one source, and where images are mixed, whose loss is that of two."""
    if len({name for name, _ in dataset.sources}) < 2 or "share" in dataset.columns:
        return None
    return SourceLosses(dataset.sources, dims=dims, device=device)


def build_measure(job_config: JobConfig, *, validation: bool = False) -> LossFunction:
    """Build a loss that measures every example of a microbatch, and of which nothing is differentiated.

    Args:
        validation: measure the loss that validation averages, which has no label smoothing.
    """
    section, settings = job_config.validation if validation else job_config.training, settings_of(job_config)
    loss = family_of(job_config).modality.example_loss(job_config, validation=validation)(
        vocab_parallel=settings.vocab_parallel,
        num_chunks=1 if settings.compiles_loss else -(-section.local_batch_size * section.seq_len // CHUNK_TOKENS),
        compile_loss=settings.compiles_loss,
        backend=settings.compile_backend,
    )

    @torch.no_grad()
    def measure(pred: Tensor, batch: Batch) -> StepLoss:
        ids, index = batch.examples, batch.columns.get(EXAMPLE_INDEX)
        ones = torch.ones(ids.numel(), device=ids.device)
        if index is not None:
            index = index_in_batch(index, examples_per_row=ids.shape[1])
        result = loss(pred.detach(), batch.labels, ones, example_index=index)
        return StepLoss(result.loss_sum, result.loss_sum, {"loss": result.losses, "valid": result.counts})

    return measure


class StepSources:
    """The losses by source of the steps that a trainer logs; its dataset must be open."""

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.sums = build_source_losses(
            self.trainer.loader.dataset, trainer.job_config, dims=trainer.parallel_dims, device=trainer.device
        )
        self._measure = build_measure(trainer.job_config)

    @property
    def in_this_step(self) -> bool:
        """Whether the current step logs them."""
        return self.sums is not None and bool(self.trainer.metrics_processor.should_log(self.trainer.step))

    def measure(self, pred: Tensor, batch: Batch) -> ExampleStats:
        """The statistics of a microbatch whose loss has none; empty where this step logs nothing by source."""
        return self._measure(pred, batch).stats if self.in_this_step else {}

    def add(self, batch: Batch, stats: ExampleStats | None) -> None:
        """Add a microbatch of the current step, if it logs them."""
        if self.sums is not None and self.in_this_step:
            self.sums.add(batch.examples, stats)

    def metrics(self) -> dict[str, float]:
        """The scalars of a logged step, by tag. A collective where the data have several sources."""
        means = {} if self.sums is None else self.sums.take()
        return {f"loss_metrics/by_source/{name}": loss for name, loss in means.items()}
