"""Squared error per example of predicted patches, for masked autoencoding: the contract of cross_entropy.py.

The loss of He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3): the mean
squared error between predicted and true numbers of the masked patches. Here a sum over numbers, which the trainer
divides by how many of them are valid in the global batch, as it does with the tokens of a text.

Cost: one pass over predictions and targets in fp32. No collective, no host sync.

Shapes: B examples, M masked patches, D numbers per patch, K = M D.
"""

from functools import partial

import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX, WeightedLoss
from titan_attent.losses.folding import ExampleLosses, finish, refuse_index


def _squared_errors(pred_BMD: Tensor, labels_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each number, fp32 [B, K], 0 where it is not valid; and whether it is, bool [B, K]."""
    valid_BMD = labels_BMD != IGNORE_INDEX
    squared_BMD = torch.where(valid_BMD, pred_BMD.float() - labels_BMD, 0.0).square()
    return squared_BMD.flatten(1), valid_BMD.flatten(1)


def squared_error_sum(pred_BMD: Tensor, labels_BMD: Tensor) -> Tensor:
    """fp32 scalar: the squared error summed over all valid numbers; arguments as below."""
    return _squared_errors(pred_BMD, labels_BMD)[0].sum(dim=1).sum()


def weighted_squared_error(
    pred_BMD: Tensor,
    labels_BMD: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
    *,
    with_gradient: bool = False,
    temperature: float | None = None,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """The scalar to differentiate, the unweighted one to log, and what the buffer records of each example.

    Args:
        pred_BMD: any float dtype; the loss is computed in fp32.
        labels_BMD: fp32 targets, ``IGNORE_INDEX`` where a number does not count: everywhere in a padded example.
        weights_B, statistics, with_gradient, temperature: as in ``weighted_cross_entropy``.
        example_index: refused by a ValueError: an image is a row.

    Returns:
        Squared errors, where a "token" of :class:`ExampleLosses` is a number. The functional gradient is prediction -
        target, that of half the squared error.
    """
    refuse_index(example_index, loss="loss of patches")
    errors_BK, valid_BK = _squared_errors(pred_BMD, labels_BMD)
    losses = finish(errors_BK, valid_BK, weights_B, statistics, temperature=temperature)
    # The squared norm of the gradient is the squared error itself.
    return losses._replace(gradients=losses.losses.sqrt()) if with_gradient else losses


def build_patch_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    temperature: float | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """:func:`weighted_squared_error` without its options, compiled into one graph when ``compile_loss`` is set."""
    loss = partial(weighted_squared_error, with_gradient=with_gradient, temperature=temperature)
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
