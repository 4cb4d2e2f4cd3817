"""The loss function of a pipeline schedule; the target tensor also carries the columns of the examples.

torch's pipeline schedules call the loss on the last stage, once per microbatch, with the rows of that microbatch from
one target tensor, and differentiate the result. So the target also carries the inputs and the columns of the examples:
their ids, their weights, and the columns that systems add. This module keeps the statistics of the examples until the
step ends. The other stages compute no losses; the loss buffer's exchange sends them the records of the last stage
(losses/buffer.py).

Under a pipeline, torchtitan 0.2.2 differentiates the SUM, and divides only the logged loss by the number of valid
tokens. So its gradients are too large by that factor (its issue #2972). Here the sum is divided before the backward.

Shapes: B examples, L labels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torchtitan.distributed import ParallelDims

from titan_attent.systems.system import Batch, Columns, ExampleStats, LossFunction

StockLoss = Callable[[Tensor, Tensor], Tensor]

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element of a float -> the integer dtype of the same size."""

INPUTS = "inputs"
"""The name of the column that holds the inputs of the model."""


def replica_sources_of(parallel_dims: ParallelDims, schedule: Any) -> list[tuple[DeviceMesh, int]]:
    """Each mesh whose ranks train the same examples (pp, cp, tp), with the local rank whose losses count."""
    sources = {"pp": 0, "cp": 0, "tp": 0}
    if parallel_dims.pp_enabled:
        # In V-shaped schedules, the first rank also has the last stage.
        ends_on_first = isinstance(schedule, (ScheduleZBVZeroBubble, ScheduleDualPipeV))
        sources["pp"] = 0 if ends_on_first else parallel_dims.pp - 1
    meshes = {name: parallel_dims.get_optional_mesh(name) for name in sources}
    return [(mesh, sources[name]) for name, mesh in meshes.items() if mesh is not None]


def from_last_stage(values: Sequence[float], *, is_last: bool, mesh: DeviceMesh, device: torch.device) -> list[float]:
    """The values of the rank with the last stage, on all ranks of the pipeline; ``values`` of other ranks are ignored.
    A collective of 8 bytes per number."""
    numbers = torch.tensor(values if is_last else [0.0] * len(values), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(numbers, group=mesh.get_group())
    return numbers.tolist()


def _as_integers(column: Tensor) -> Tensor:
    """A column [B, ...] as int64 [B, n]; floats as their bits."""
    if column.dtype.is_floating_point:
        column = column.contiguous().view(INTEGER_OF_SIZE[column.dtype.itemsize])
    return column.long().flatten(1) if column.ndim > 1 else column.long()[:, None]


def pack_target(labels_BL: Tensor, columns: Columns) -> Tensor:
    """The labels, then each column flattened, as int64 [B, L + elements per row of all columns]; floats as bits."""
    return torch.cat((labels_BL, *(_as_integers(column) for column in columns.values())), dim=1)


def unpack_target(target: Tensor, like: Columns) -> tuple[Tensor, Columns]:
    """The labels and columns of :func:`pack_target`; ``like``: columns of the same order, dtypes and shapes but B."""
    widths = [column[:1].numel() for column in like.values()]
    labels, *packed = target.split((target.shape[1] - sum(widths), *widths), dim=1)
    columns = {}
    for (name, column), numbers in zip(like.items(), packed, strict=True):
        shape = (len(target), *column.shape[1:])
        if column.dtype.is_floating_point:
            numbers = numbers.to(INTEGER_OF_SIZE[column.dtype.itemsize]).contiguous().view(column.dtype)
        columns[name] = numbers.to(column.dtype).reshape(shape)
    return labels, columns


class PipelineStep:
    """The losses and statistics of the ``num_microbatches`` of one step, on the last stage; empty on other stages.

    To find the shapes of gradients, torch 2.13's schedules call the loss once more before the first training step, on
    uninitialized memory. That call comes first, so only the last ``num_microbatches`` calls count.
    """

    def __init__(self, loss: LossFunction, batch: Batch, *, num_microbatches: int, divisor: Tensor | float) -> None:
        self.loss, self.labels = loss, batch.labels
        self.columns = {**batch.columns, INPUTS: batch.inputs}
        self.num_microbatches, self.divisor = num_microbatches, divisor
        self._logged: list[Tensor] = []
        self._seen: list[ExampleStats] = []

    def target(self) -> Tensor:
        """The target tensor for the schedule."""
        return pack_target(self.labels, self.columns)

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        labels, columns = unpack_target(target, self.columns)
        loss = self.loss(pred, Batch(columns.pop(INPUTS), labels, columns))
        self._logged.append(loss.logged)
        self._seen.append(loss.stats)
        return loss.to_differentiate / self.divisor

    def loss_sum(self) -> Tensor:
        """Unweighted nats summed over all valid tokens of the step's microbatches, an fp32 scalar."""
        return torch.stack(self._logged[-self.num_microbatches :]).sum()

    def seen(self) -> ExampleStats:
        """The statistics of the examples of all microbatches, each [B]."""
        microbatches = self._seen[-self.num_microbatches :]
        return {name: torch.cat([stats[name] for stats in microbatches]) for name in microbatches[0]}


class PipelineLoss:
    """torchtitan's ``loss_fn`` under a pipeline: the stock loss, except inside the context of :meth:`step`."""

    def __init__(self, stock: StockLoss):
        self.stock = stock
        self._step: PipelineStep | None = None

    @contextmanager
    def step(
        self, loss: LossFunction, batch: Batch, *, num_microbatches: int, divisor: Tensor | float
    ) -> Iterator[PipelineStep]:
        """Let the schedule call ``loss`` with targets from :meth:`PipelineStep.target`.

        Args:
            batch: the batch of the step.
            num_microbatches: the number of microbatches of the schedule.
            divisor: the number of valid tokens of the global batch; the differentiated sum is divided by it.
        """
        self._step = PipelineStep(loss, batch, num_microbatches=num_microbatches, divisor=divisor)
        try:
            yield self._step
        finally:
            self._step = None

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.stock(pred, target) if self._step is None else self._step(pred, target)
