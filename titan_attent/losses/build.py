"""Selects the loss that a run computes; all have the same arguments and results (cross_entropy.py, folding.py)."""

from collections.abc import Callable
from functools import partial

from titan_attent.losses.chunked import build_chunked_loss
from titan_attent.losses.cross_entropy import WeightedLoss, build_weighted_loss
from titan_attent.losses.folding import LossRule
from titan_attent.losses.vocab_parallel import build_vocab_parallel_loss


def build_example_loss(
    *,
    vocab_parallel: bool = False,
    num_chunks: int = 1,
    compile_loss: bool = False,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """Build the function that computes the weighted loss of every example.

    When it is called with ``example_index``, the tokens of an example may be anywhere in the batch. There is one weight
    per example, so the number of weights is the number of examples.

    Args:
        vocab_parallel: the logits are DTensors, sharded along the vocabulary. Such a loss is a collective.
        num_chunks: into which the tokens of a microbatch are split; not read where the vocabulary is sharded.
        compile_loss: compile the loss into one graph.
        with_gradient: also measure the norm of the functional gradient of every example.
        rule: computes further weights from the losses within the step; None for no such weights.
        backend: the backend of torch.compile.
    """
    build: Callable[..., WeightedLoss] = build_weighted_loss
    if vocab_parallel:
        build = build_vocab_parallel_loss
    elif num_chunks > 1:
        build = partial(build_chunked_loss, num_chunks=num_chunks)
    return build(compile_loss=compile_loss, with_gradient=with_gradient, rule=rule, backend=backend)
