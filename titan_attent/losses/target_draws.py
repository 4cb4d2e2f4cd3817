"""A few target ids per token in place of a source's whole distribution, for targets on disk (scores/targets.py).

draws    N ids of a systematic sample: the points (i + u) / N, i = 0 .. N - 1, on the cumulated probabilities, with one
         uniform u per token. The expected share of draws of an id is its probability, so that cross-entropy with the
         draws has the expected gradient of KL; its count is the whole number below or above N p, so its variance is at
         most 1 / (4 N^2), where independent draws have p (1 - p) / N.
top_k    the k largest probabilities. Biased: what is left out is given to the k ids in proportion, so the student
         learns a sharper distribution, and never hears of rare ids.

The uniform number is a hash of (seed, example, position): the same draws on any number of ranks, in any batch.

Cost: per chunk of tokens 24 bytes per logit of scratch memory in fp64. No host sync.

Shapes: T tokens, V vocabulary, N draws.
"""

import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import derive_key, stream, uniform

CHUNK_NUMBERS = 2**22
"""Logits of a chunk: 100 MB of scratch memory."""


def draw_targets(logits: Tensor, tokens: Tensor, *, num: int, temperature: float, seed: int) -> Tensor:
    """Draw ``num`` ids per token from softmax(logits / temperature).

    Args:
        logits: [T, V] of any float dtype.
        tokens: int64 [T], a number of each token that is its own in the data set.
        temperature: above 0.
        seed: another seed gives another sample.

    Returns:
        int32 [T, N], ascending.
    """
    key = derive_key(seed, stream("distillation/targets"))
    rows = max(1, CHUNK_NUMBERS // logits.shape[1])
    drawn = [
        _draw(some, numbers, num=num, temperature=temperature, key=key)
        for some, numbers in zip(logits.split(rows), tokens.split(rows), strict=True)
    ]
    return torch.cat(drawn)


def _draw(logits_CV: Tensor, tokens_C: Tensor, *, num: int, temperature: float, key: int) -> Tensor:
    cumulated_CV = (logits_CV.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    total_C = cumulated_CV[:, -1:]
    points_CN = torch.arange(num, device=tokens_C.device) + uniform(tokens_C, key)[:, None]
    # Below the total, so that an id of probability 0 is never drawn, not even by rounding.
    points_CN = torch.minimum(points_CN / num * total_C, torch.nextafter(total_C, torch.zeros_like(total_C)))
    return torch.searchsorted(cumulated_CV, points_CN.contiguous(), right=True).int()


def top_targets(logits: Tensor, *, num: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The ``num`` most probable ids and their probabilities under softmax(logits / temperature): int32, fp16 [T, N]."""
    rows = max(1, CHUNK_NUMBERS // logits.shape[1])
    tops = [(some.double() / temperature).softmax(dim=-1).topk(num, dim=-1) for some in logits.split(rows)]
    return torch.cat([top.indices for top in tops]).int(), torch.cat([top.values for top in tops]).half()
