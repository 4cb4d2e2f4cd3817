"""titan/pipeline.py: columns of any dtype are packed into the target and unpacked bit for bit."""

import torch
from torch import Tensor

from titan_attent.systems.system import Batch, StepLoss
from titan_attent.titan.pipeline import PipelineLoss, pack_target, unpack_target

LABELS = torch.tensor([[1, 2, -100], [4, 5, 6]])
COLUMNS = {
    "example_id": torch.tensor([0, 2**40 + 1]),
    "weight": torch.tensor([-0.3, float("inf")]),
    "is_odd": torch.tensor([0, 1]),
    "top_ids": torch.tensor([[3, 1, 4], [1, 5, 9]], dtype=torch.int32),
    "top_logits": torch.tensor([[[0.5, -3.0]], [[float("nan"), 7.0]]], dtype=torch.bfloat16),
    "wide": torch.tensor([[1e-300], [-0.0]], dtype=torch.float64),
    "flags": torch.tensor([[True, False], [False, False]]),
}


def test_columns_are_unpacked_bit_for_bit() -> None:
    labels, columns = unpack_target(pack_target(LABELS, COLUMNS), COLUMNS)
    assert labels.equal(LABELS) and list(columns) == list(COLUMNS)
    for name, column in COLUMNS.items():
        assert columns[name].dtype == column.dtype and columns[name].shape == column.shape
        assert columns[name].contiguous().view(torch.uint8).equal(column.view(torch.uint8))


def test_without_columns_the_target_is_the_labels() -> None:
    labels, columns = unpack_target(pack_target(LABELS, {}), {})
    assert labels.equal(LABELS) and columns == {}


def test_microbatches_see_their_own_rows_and_only_the_last_calls_count() -> None:
    def loss(pred: Tensor, batch: Batch) -> StepLoss:
        assert batch.inputs.equal(10 * batch.labels)
        return StepLoss((pred * batch.examples).sum(), pred.sum(), {"id": batch.examples})

    stock = PipelineLoss(lambda pred, labels: pred.sum())
    batch = Batch(10 * LABELS, LABELS, {"example_id": torch.tensor([7, 8])})
    with stock.step(loss, batch, num_microbatches=2, divisor=4.0) as step:
        target = step.target()
        stock(torch.full((1,), 99.0), target[:1])  # the call that finds the shapes of gradients
        results = [float(stock(torch.full((1,), i + 1.0), target[i : i + 1])) for i in range(2)]
    assert results == [7 / 4, 16 / 4] and float(step.loss_sum()) == 3.0
    assert step.seen()["id"].tolist() == [7, 8]
    assert float(stock(torch.ones(3), LABELS)) == 3.0  # outside of a step: the stock loss
