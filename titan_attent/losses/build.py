"""Which of the losses a run computes: they all take and return the same (cross_entropy.py, folding.py)."""

from collections.abc import Callable
from functools import partial

from titan_attent.losses.chunked import build_chunked_loss
from titan_attent.losses.cross_entropy import WeightedLoss, build_weighted_loss
from titan_attent.losses.vocab_parallel import build_vocab_parallel_loss


def build_example_loss(
    *,
    vocab_parallel: bool = False,
    num_chunks: int = 1,
    compile_loss: bool = False,
    with_gradient: bool = False,
    temperature: float | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """The weighted loss of every example, for logits as the parallelism leaves them.

    Called with ``example_index``, the tokens of an example may stand anywhere in the batch; there is one weight per
    example, and their number is that of the examples.

    Args:
        vocab_parallel: the logits are DTensors, cut along the vocabulary. Such a loss is a collective.
        num_chunks: of the tokens of a microbatch; not read where the vocabulary is cut.
        compile_loss: compile the loss into one graph.
        with_gradient: also measure the functional gradient of every example.
        temperature: of weights that follow the loss within the step; None for none.
        backend: of torch.compile.
    """
    build: Callable[..., WeightedLoss] = build_weighted_loss
    if vocab_parallel:
        build = build_vocab_parallel_loss
    elif num_chunks > 1:
        build = partial(build_chunked_loss, num_chunks=num_chunks)
    return build(compile_loss=compile_loss, with_gradient=with_gradient, temperature=temperature, backend=backend)
