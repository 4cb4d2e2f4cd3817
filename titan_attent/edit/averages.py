"""The mean of the last checkpoints of a run, and the decay of the learning rate that it stands for.

A checkpoint is the first one plus the updates since. So in a mean with weights c_1, .., c_N each update counts with
the sum of the weights of the checkpoints after it. Seen from the updates, the mean has scaled their learning rates by

    w_i = c_(i+1) + .. + c_N            between the checkpoints i and i + 1

which falls from 1 towards 0: a decay, after the fact, of a run that trained with a constant learning rate. For a decay
d(x), from d(0) = 1 to d(1) = 0, c_i = w_(i-1) - w_i with w_i = d at the middle of the interval i. The decay begins half
an interval before the first checkpoint and ends half an interval after the last, so that equal weights of checkpoints
at equal distances are the linear decay. To first order: the run's own gradients did not feel it.

Source: WSM, https://arxiv.org/abs/2507.17634 (theorem 1); Megatron-LM's offline merge (pull request 5114).
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}
"""Name -> share of the learning rate at x of the decay's length; ``sqrt`` is 1 - sqrt(x)."""


def decay_weights(steps: Sequence[int], decay: str) -> list[float]:
    """The weights of checkpoints at these rising ``steps`` for a decay of :data:`DECAYS`; they sum to 1.

    One checkpoint has the weight 1.
    """
    if len(steps) == 1:
        return [1.0]
    start, stop = _span(steps)
    middles = [((first + second) / 2 - start) / (stop - start) for first, second in pairwise(steps)]
    shares = [1.0, *map(DECAYS[decay], middles), 0.0]
    return [before - after for before, after in pairwise(shares)]


def update_shares(weights: Sequence[float]) -> list[float]:
    """How much of the updates between each two checkpoints a mean with ``weights``, of sum 1, keeps."""
    return list(accumulate(reversed(weights)))[-2::-1]


def _span(steps: Sequence[int]) -> tuple[float, float]:
    return steps[0] - (steps[1] - steps[0]) / 2, steps[-1] + (steps[-1] - steps[-2]) / 2


def replaced_decay(steps: Sequence[int], weights: Sequence[float], *, decay: str) -> str:
    """A sentence that says which decay of the learning rate the mean replaces; ``decay`` is empty for given weights."""
    if len(steps) == 1:
        return "one checkpoint: a copy of its weights, which replaces no decay"
    start, stop = _span(steps)
    shape = f"a {decay} decay" if decay else "a decay"
    shares = update_shares(weights)
    listed = [f"{share:.3g}" for share in (shares if len(shares) <= 8 else [*shares[:3], *shares[-3:]])]
    if len(shares) > 8:
        listed.insert(3, "..")
    return (
        f"the mean replaces {shape} of the learning rate over steps {start:g} to {stop:g}: the updates between its "
        f"checkpoints count {', '.join(listed)} of what they were"
    )
