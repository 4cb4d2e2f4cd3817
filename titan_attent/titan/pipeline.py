"""The loss function of a pipeline schedule: the columns of the examples ride with the target.

torch's pipeline schedules call the loss on the last stage, once a microbatch, with that microbatch's rows of one target
tensor, and differentiate what it returns. So the target carries the inputs and the columns of the examples, too (their
ids, their weights, what systems add). What was seen of the examples is put aside here until the step has ended. On the
other stages nothing is seen; the loss buffer's exchange brings them what the last stage has recorded
(losses/buffer.py).

torchtitan 0.2.2 differentiates the SUM under a pipeline and divides by the number of valid tokens only what it logs, so
gradients are too large by that number (its thread #2972). Here the sum is divided before.

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
"""The integers of as many bytes as a float has."""

INPUTS = "inputs"
"""Rides beside the columns, under this name."""


def replica_sources_of(parallel_dims: ParallelDims, schedule: Any) -> list[tuple[DeviceMesh, int]]:
    """The mesh dimensions beside ``batch``, and the rank on each whose losses count."""
    sources = {"pp": 0, "cp": 0, "tp": 0}
    if parallel_dims.pp_enabled:
        # The schedules in the shape of a V end where they began.
        ends_on_first = isinstance(schedule, (ScheduleZBVZeroBubble, ScheduleDualPipeV))
        sources["pp"] = 0 if ends_on_first else parallel_dims.pp - 1
    meshes = {name: parallel_dims.get_optional_mesh(name) for name in sources}
    return [(mesh, sources[name]) for name, mesh in meshes.items() if mesh is not None]


def from_last_stage(values: Sequence[float], *, is_last: bool, mesh: DeviceMesh, device: torch.device) -> list[float]:
    """What the rank with the last stage has, on all ranks of the pipeline; the others' values are not read. A
    collective of 8 bytes per number."""
    mine = torch.tensor(values if is_last else [0.0] * len(values), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(mine, group=mesh.get_group())
    return mine.tolist()


def _as_integers(column: Tensor) -> Tensor:
    """int64 [B, n] of [B, ...]: floats as their bits."""
    if column.dtype.is_floating_point:
        column = column.contiguous().view(INTEGER_OF_SIZE[column.dtype.itemsize])
    return column.long().flatten(1) if column.ndim > 1 else column.long()[:, None]


def pack_target(labels_BL: Tensor, columns: Columns) -> Tensor:
    """int64 [B, L + numbers of all columns]: the labels, then each column, flattened; floats as their bits."""
    return torch.cat((labels_BL, *(_as_integers(column) for column in columns.values())), dim=1)


def unpack_target(target: Tensor, like: Columns) -> tuple[Tensor, Columns]:
    """Labels and columns of :func:`pack_target`; ``like``: columns of these dtypes and shapes, but for B, in order."""
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
    """What the loss saw of the ``num_microbatches`` of one step, on the last stage; nothing on the others.

    torch 2.13's schedules call the loss once more before the first training step, on memory that was never written, to
    learn the shapes of gradients. That call comes first, so only the last ones count.
    """

    def __init__(self, loss: LossFunction, batch: Batch, *, num_microbatches: int, divisor: Tensor | float) -> None:
        self.loss, self.labels = loss, batch.labels
        self.columns = {**batch.columns, INPUTS: batch.inputs}
        self.num_microbatches, self.divisor = num_microbatches, divisor
        self._logged: list[Tensor] = []
        self._seen: list[ExampleStats] = []

    def target(self) -> Tensor:
        """What the schedule is given as its target."""
        return pack_target(self.labels, self.columns)

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        labels, columns = unpack_target(target, self.columns)
        loss = self.loss(pred, Batch(columns.pop(INPUTS), labels, columns))
        self._logged.append(loss.logged)
        self._seen.append(loss.seen)
        return loss.to_differentiate / self.divisor

    def loss_sum(self) -> Tensor:
        """fp32 scalar: unweighted nats over all valid tokens of the step's microbatches."""
        return torch.stack(self._logged[-self.num_microbatches :]).sum()

    def seen(self) -> ExampleStats:
        """Of all microbatches, each [B]."""
        parts = self._seen[-self.num_microbatches :]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class PipelineLoss:
    """torchtitan's ``loss_fn`` under a pipeline: the stock loss, except in steps inside :meth:`step`."""

    def __init__(self, stock: StockLoss):
        self.stock = stock
        self._step: PipelineStep | None = None

    @contextmanager
    def step(
        self, loss: LossFunction, batch: Batch, *, num_microbatches: int, divisor: Tensor | float
    ) -> Iterator[PipelineStep]:
        """Let the schedule call ``loss``; its targets come from :meth:`PipelineStep.target`.

        Args:
            batch: of the step.
            num_microbatches: of the schedule.
            divisor: valid tokens of the global batch; what is differentiated is divided by it.
        """
        self._step = PipelineStep(loss, batch, num_microbatches=num_microbatches, divisor=divisor)
        try:
            yield self._step
        finally:
            self._step = None

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.stock(pred, target) if self._step is None else self._step(pred, target)
