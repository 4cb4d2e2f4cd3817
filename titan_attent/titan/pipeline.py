"""The loss function of a pipeline schedule: example ids and weights ride with the target.

torch's pipeline schedules call the loss on the last stage, once a microbatch, with that microbatch's rows of one target
tensor, and differentiate what it returns. So the target carries two more columns, the example's id and the bits of its
weight, and the losses of the examples are put aside here until the step has ended. On the other stages nothing is
seen; the loss buffer's exchange brings them what the last stage has recorded (losses/buffer.py).

torchtitan 0.2.2 differentiates the SUM under a pipeline and divides by the number of valid tokens only what it logs, so
gradients are too large by that number (its thread #2972). Here the sum is divided before.

Shapes: B examples, L labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import ExampleLosses
from titan_attent.losses.vocab_parallel import valid_counts

StockLoss = Callable[[Tensor, Tensor], Tensor]
ExampleLoss = Callable[[Tensor, Tensor, Tensor], ExampleLosses]
"""``weighted_cross_entropy`` of logits, labels and weights."""


def pack_target(labels_BL: Tensor, example_ids: Tensor, weights_B: Tensor) -> Tensor:
    """int64 [B, L + 2]: the labels, the id, and the fp32 weight's bits."""
    bits_B = weights_B.float().view(torch.int32).long()
    return torch.cat((labels_BL, example_ids[:, None], bits_B[:, None]), dim=1)


def unpack_target(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, ids and weights of :func:`pack_target`."""
    return target[:, :-2], target[:, -2], target[:, -1].to(torch.int32).view(torch.float32)


class Seen:
    """What the loss saw of the ``num_microbatches`` of one step, on the last stage; nothing on the others.

    torch 2.13's schedules call the loss once more before the first training step, on memory that was never written, to
    learn the shapes of gradients. That call comes first, so only the last ones count.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches
        self.loss_sums: list[Tensor] = []
        self.rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []  # ids, mean losses, norms, valid counts

    def loss_sum(self) -> Tensor:
        """fp32 scalar: unweighted nats over all valid tokens of the step's microbatches."""
        return torch.stack(self.loss_sums[-self.num_microbatches :]).sum()

    def examples(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(ids, mean losses, norms or None, valid counts) of all microbatches, each [B]."""
        ids, losses, norms, counts = zip(*self.rows[-self.num_microbatches :], strict=True)
        return torch.cat(ids), torch.cat(losses), None if norms[0] is None else torch.cat(norms), torch.cat(counts)


class PipelineLoss:
    """torchtitan's ``loss_fn`` under a pipeline: the stock loss, but for steps inside :meth:`step`."""

    def __init__(self, stock: StockLoss):
        self.stock = stock
        self._seen: Seen | None = None
        self._weighted: ExampleLoss | None = None
        self._divisor: Tensor | float = 1.0

    @contextmanager
    def step(
        self, *, num_microbatches: int, divisor: Tensor | float, weighted: ExampleLoss | None = None
    ) -> Iterator[Seen]:
        """Divide by ``divisor`` what is differentiated, and put the step's losses aside.

        Args:
            num_microbatches: of the schedule.
            divisor: valid tokens of the global batch.
            weighted: the per-example loss, whose target is that of :func:`pack_target`; None for the stock one.
        """
        self._seen, self._weighted, self._divisor = Seen(num_microbatches), weighted, divisor
        try:
            yield self._seen
        finally:
            self._seen, self._weighted, self._divisor = None, None, 1.0

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        if self._seen is None:
            return self.stock(pred, target)
        if self._weighted is None:
            to_differentiate = loss_sum = self.stock(pred, target)
        else:
            labels_BL, example_ids, weights_B = unpack_target(target)
            to_differentiate, loss_sum, losses_B, norms_B = self._weighted(pred, labels_BL, weights_B)
            self._seen.rows.append((example_ids, losses_B, norms_B, valid_counts(labels_BL)))
        self._seen.loss_sums.append(loss_sum.detach())
        return to_differentiate / self._divisor
