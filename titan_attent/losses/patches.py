"""Per-example squared error of predicted patches, for masked autoencoding: the contract of cross_entropy.py.

The loss of He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3): the mean
squared error between predicted and true numbers of the masked patches. Here a sum over numbers, which the trainer
divides by how many of them are valid in the global batch, as it does with the tokens of a text.

Cost: one pass over predictions and targets in fp32. No collective, no host sync.

Shapes: B examples, M masked patches, D numbers of a patch.
"""

from functools import partial

import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX, ExampleLosses, WeightedLoss
from titan_attent.losses.window import capped_linear_weights


def per_example_squared_error(pred_BMD: Tensor, labels_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error summed over each example's valid numbers.

    Args:
        pred_BMD: any float dtype; the loss is computed in fp32.
        labels_BMD: fp32 targets, ``IGNORE_INDEX`` where a number does not count: everywhere in a padded example.

    Returns:
        (sums, counts), both fp32 [B]; 0 and 0 for an example without a valid number.
    """
    valid_BMD = labels_BMD != IGNORE_INDEX
    squared_BMD = torch.where(valid_BMD, pred_BMD.float() - labels_BMD, 0.0).square()
    return squared_BMD.sum(dim=(1, 2)), valid_BMD.sum(dim=(1, 2), dtype=torch.float32)


def squared_error_sum(pred_BMD: Tensor, labels_BMD: Tensor) -> Tensor:
    """fp32 scalar: the squared error summed over all valid numbers; arguments as above."""
    return per_example_squared_error(pred_BMD, labels_BMD)[0].sum()


def weighted_squared_error(
    pred_BMD: Tensor,
    labels_BMD: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
    *,
    with_gradient: bool = False,
    temperature: float | None = None,
) -> ExampleLosses:
    """The scalar to differentiate, the unweighted one to log, and what the buffer records of each example.

    Args:
        pred_BMD, labels_BMD: as in :func:`per_example_squared_error`.
        weights_B, statistics, with_gradient, temperature: as in ``weighted_cross_entropy``.

    Returns:
        (weighted sum, unweighted sum, mean_B, norms_B): two fp32 scalars, squared errors summed over valid numbers;
        fp32 [B] mean squared error a valid number (0 for an example without one); fp32 [B] norm of the functional
        gradient, sqrt(mean over valid numbers of (prediction - target)^2), which is that of half the squared error; or
        None. All but the first are detached.
    """
    sums_B, counts_B = per_example_squared_error(pred_BMD, labels_BMD)
    detached_B = sums_B.detach()
    mean_B = detached_B / counts_B.clamp(min=1.0)
    if temperature is not None:
        assert statistics is not None
        weights_B = weights_B * capped_linear_weights(mean_B, statistics, temperature=temperature)
    return (sums_B * weights_B).sum(), detached_B.sum(), mean_B, mean_B.sqrt() if with_gradient else None


def build_patch_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    temperature: float | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """:func:`weighted_squared_error` of four arguments, compiled into one graph when ``compile_loss`` is set."""
    loss = partial(weighted_squared_error, with_gradient=with_gradient, temperature=temperature)
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
