"""What a share of the data counts: tokens where examples differ in length, else examples.

Where documents are the unit, a ratio is a share of all tokens, since tokens are what training costs. The sums are of
integers, so they are the same for every number of ranks.

Cost: 4 bytes per local example, only where examples differ in length.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of candidates.

    Attributes:
        local: int32 [num_local], tokens of each of this rank's candidates, at least 1.
        total: tokens of the candidates of all ranks.
    """

    local: Tensor
    total: int


class Amounts(NamedTuple):
    """The size of the data and of a global batch, in what ratios and repeats count.

    Attributes:
        data: examples of the data set, or their tokens.
        batch: examples of a global batch, or the mean number of its tokens in a full pass.
        noun: "examples" or "tokens", for messages.
    """

    data: int
    batch: int
    noun: str = "examples"


class Below(NamedTuple):
    """How much of a pool scores lower than each of some scores, in ascending order.

    Attributes:
        examples: number of examples.
        num_examples: size of the pool.
        tokens, num_tokens: the same in tokens; None if all examples are equally long.
    """

    examples: list[int]
    num_examples: int
    tokens: list[int] | None = None
    num_tokens: int | None = None


def histogram(bins: Tensor, tokens: Tensor | None, *, num_bins: int) -> Tensor:
    """int64 [num_bins], the number of elements in each bin, or the sum of their tokens.

    Args:
        bins: int32 or int64 [n], each in [0, num_bins).
        tokens: int32 [n]; None to count elements.
    """
    if tokens is None:
        return torch.bincount(bins, minlength=num_bins)
    # Not bincount with weights: it sums floats, and on a GPU it is refused in deterministic mode.
    return torch.zeros(num_bins, dtype=torch.int64, device=bins.device).index_add_(0, bins, tokens.long())


def block_of(tokens: Tensor | None, block: slice) -> Tensor | None:
    """The tokens of a block of slots; None where there are none."""
    return None if tokens is None else tokens[block]
