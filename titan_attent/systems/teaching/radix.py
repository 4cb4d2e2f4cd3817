"""Exact order statistics of keys that are distributed over ranks: one radix descent finds several of them at once.

Every fp32 score has a 32-bit key, and the unsigned order of the keys is the order of the scores. A descent counts the
keys of all ranks by their highest byte. It then counts the keys that share this byte with a target by their second
byte, and so on. That takes 4 all-reduces of at most 256 counts per target. All sums are of integers, so the result is
the same for every number of ranks.

Keys may count as tokens (tokens.py): k is then a number of tokens, and the counts are sums of tokens. The key that is
found is the one with which the sum, from the largest key down, reaches k.

Cost per rank: two passes over the local keys, in blocks that stay in a CPU's cache. The first counts the upper halves.
The second copies the keys that share their upper half with a target, 4 bytes each, and 4 for their tokens; there are
few unless many scores are equal.

A key as a Python integer is in [0, 2^32). Tensors hold the key minus 2^31, as int32: torch has no arithmetic on uint32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.tokens import block_of, histogram

UNSEEN_KEY = 0xFF800000
"""The key of +inf. Scores are never NaN, so the 2^23 keys above it are used to order the examples that were never
scored.
"""

KEY_OFFSET = 1 << 31
"""The difference between a key and its int32 value in a tensor."""

_BROKEN_KEY = 0x007FFFFF  # the key of -inf
_HALF = 1 << 16


class KthLargest(NamedTuple):
    """The k-th largest key of all ranks, the number of keys strictly above it, and the number equal to it.

    Where keys count as tokens, the numbers are of tokens.
    """

    key: int
    num_above: int
    num_equal: int


BlockValues = Callable[[slice], Tensor]
"""A block of this rank's slots -> one number per slot. Every use evaluates it again, so that the numbers need not be
stored.
"""


def blocks(size: int, *, device: torch.device) -> Iterator[slice]:
    """Cut [0, size) into blocks: their temporaries stay in a CPU's cache, and are bounded on a GPU."""
    step = 1 << 17 if device.type == "cpu" else 1 << 22
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def ordered_keys(scores: Tensor) -> Tensor:
    """fp32 scores without NaN -> int32 keys with the same order; -0.0 and 0.0 are equal."""
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)


def score_of_key(key: int) -> float:
    """The fp32 value with this key; the inverse of :func:`ordered_keys` for keys below those of unseen examples."""
    bits = key - KEY_OFFSET if key >= KEY_OFFSET else 0xFFFFFFFF - key
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def largest_keys(
    keys: BlockValues,
    ks_of: Callable[[int, int], list[int]],
    *,
    sharding: ExampleSharding,
    device: torch.device,
    num_local: int | None = None,
    tokens: Tensor | None = None,
) -> list[KthLargest]:
    """The k-th largest of all ranks' keys, for several k at once. A collective: 4 all-reduces, or 1 if there is no k.

    Args:
        keys: int32, the keys of this rank's ``sharding.num_local`` slots.
        ks_of: (number of keys of +inf and above, number of keys of -inf and below) -> each k to find, 1 to N.
        num_local: number of this rank's keys, if they are not those of its slots.
        tokens: int32, what each key counts as, at least 1; every number is then one of tokens. None: each counts as 1.
    """
    num_local = sharding.num_local if num_local is None else num_local
    upper = torch.zeros(_HALF, dtype=torch.int64, device=device)
    for block in blocks(num_local, device=device):
        upper += histogram((keys(block) >> 16).add_(_HALF // 2), block_of(tokens, block), num_bins=_HALF)
    infinite = torch.stack((upper[UNSEEN_KEY >> 16 :].sum(), upper[: (_BROKEN_KEY >> 16) + 1].sum()))
    by_byte = upper.view(256, 256)
    first = sharding.sum(torch.cat((by_byte.sum(dim=1), infinite))).cpu().numpy()
    targets = [_Target(k) for k in ks_of(*first[256:].tolist())]
    if not targets:
        return []
    for target in targets:
        target.narrow(first[:256])
    rows = [target.prefix for target in targets]
    _narrow(targets, by_byte[torch.tensor(rows, device=device)], sharding=sharding)
    prefixes = {target.prefix for target in targets}
    matching, their_tokens = _with_prefixes(keys, tokens, prefixes, num_local=num_local, device=device)
    for num_bits in (16, 24):
        counts = _count_next(matching, their_tokens, [target.prefix for target in targets], num_bits)
        _narrow(targets, counts, sharding=sharding)
    return [KthLargest(target.prefix, target.num_above, target.num_equal) for target in targets]


class _Target:
    """One k: the leading bytes of its key so far, the number of keys above them, and the number of keys with them."""

    def __init__(self, k: int):
        self.k, self.prefix, self.num_above, self.num_equal = k, 0, 0, 0

    def narrow(self, counts: np.ndarray) -> None:
        """Find the next byte. ``counts``: int64 [256], the number of keys with this prefix, by their next byte."""
        num_from_top = counts[::-1].cumsum()
        i = int(np.searchsorted(num_from_top, self.k - self.num_above))
        self.num_equal = int(counts[255 - i])
        self.num_above += int(num_from_top[i]) - self.num_equal
        self.prefix = self.prefix << 8 | (255 - i)


def _narrow(targets: list[_Target], counts: Tensor, *, sharding: ExampleSharding) -> None:
    """Sum ``counts`` over the ranks and narrow every target. ``counts``: int64 [targets, 256], this rank's keys."""
    totals = sharding.sum(counts.contiguous()).cpu().numpy()
    for target, row in zip(targets, totals, strict=True):
        target.narrow(row)


def _with_prefixes(
    keys: BlockValues, tokens: Tensor | None, prefixes: set[int], *, num_local: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """int32 [n], the keys of this rank that begin with one of the 16-bit ``prefixes``, and their tokens if given."""
    is_target = torch.zeros(_HALF, dtype=torch.bool)
    is_target[list(prefixes)] = True
    is_target = is_target.to(device)
    matching = [torch.zeros(0, dtype=torch.int32, device=device)]
    their_tokens = list(matching)
    for block in blocks(num_local, device=device):
        block_keys = keys(block)
        matches = is_target.index_select(0, (block_keys >> 16).add_(_HALF // 2))
        matching.append(block_keys[matches])
        if tokens is not None:
            their_tokens.append(tokens[block][matches])
    return torch.cat(matching), None if tokens is None else torch.cat(their_tokens)


def _count_next(keys: Tensor, tokens: Tensor | None, prefixes: list[int], num_bits: int) -> Tensor:
    """int64 [prefixes, 256]: number of int32 keys with each prefix of ``num_bits`` bits, by the byte that follows.

    With ``tokens``, int32 [n], it is the sum of the tokens of these keys.
    """
    shift, distinct = 32 - num_bits, sorted(set(prefixes))
    offset_prefixes = [prefix - (KEY_OFFSET >> shift) for prefix in distinct]
    bounds = torch.tensor(offset_prefixes, dtype=torch.int32, device=keys.device)
    counts = torch.zeros(len(distinct) * 256, dtype=torch.int64, device=keys.device)
    for block in blocks(len(keys), device=keys.device):
        block_keys = keys[block]
        prefix = block_keys >> shift
        row = torch.bucketize(prefix, bounds).clamp_(max=len(distinct) - 1)
        digit = row * 256 + (block_keys >> (shift - 8)).bitwise_and_(255)
        matches = bounds[row] == prefix
        block_tokens = None if tokens is None else tokens[block][matches]
        counts += histogram(digit[matches], block_tokens, num_bins=len(counts))
    return counts.view(-1, 256)[[distinct.index(prefix) for prefix in prefixes]]
