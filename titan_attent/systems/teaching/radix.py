"""Exact order statistics of keys that no rank holds together: one radix descent finds several of them at once.

Every fp32 score has a 32-bit key whose unsigned order is its own. A descent asks all ranks for the counts of the keys
by their highest byte, then by the next one among the keys that share the first with a key looked for, and so on: 4
all-reduces of at most 256 counts a key looked for. All sums are of integers, so the result is the same for every
number of ranks.

Cost a rank: two passes over the local keys, in blocks that stay in a CPU's cache: a count of the upper halves, and a
copy of those that share theirs with a key looked for, 4 bytes each, few unless many scores are equal.

A key as a Python integer is in [0, 2^32). Tensors hold it less 2^31, as int32: torch has no arithmetic on uint32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding

UNSEEN_KEY = 0xFF800000
"""Key of +inf. NaN has no place among scores, so the 2^23 keys above it order the examples never scored."""

KEY_OFFSET = 1 << 31

_BROKEN_KEY = 0x007FFFFF  # of -inf
_HALF = 1 << 16


class Found(NamedTuple):
    """The k-th largest key of all ranks: itself, how many lie strictly above it, how many equal it."""

    key: int
    num_above: int
    num_equal: int


BlockValues = Callable[[slice], Tensor]
"""A stretch of this rank's places -> a number for each, evaluated anew for every use, so that none need be kept."""


def blocks(size: int, *, device: torch.device) -> Iterator[slice]:
    """Cut elementwise work so that its temporaries stay in a CPU's cache, and are bounded on a GPU."""
    step = 1 << 17 if device.type == "cpu" else 1 << 22
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def is_positive(values: Tensor) -> Tensor:
    """fp32 values of at least 0 -> int32, 1 where above 0: without a mask, which costs a CPU several times as much."""
    return values.view(torch.int32).clamp(max=1)


def replace_bits(values: Tensor, others: Tensor | int, *, where: Tensor) -> None:
    """int32 values, in place, become ``others`` where the int32 mask ``where`` is -1, and stay where it is 0."""
    values ^= (values ^ others).bitwise_and_(where)


def ordered_keys(scores: Tensor) -> Tensor:
    """fp32 scores without NaN -> int32 keys with the same order; -0.0 and 0.0 are equal."""
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)


def score_of_key(key: int) -> float:
    """The fp32 value whose key this is; the inverse of :func:`ordered_keys` below the keys of unseen examples."""
    bits = key - KEY_OFFSET if key >= KEY_OFFSET else 0xFFFFFFFF - key
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def largest_keys(
    keys: BlockValues,
    ranks: Callable[[int, int], list[int]],
    *,
    sharding: ExampleSharding,
    device: torch.device,
    num_local: int | None = None,
) -> list[Found]:
    """The k-th largest of all ranks' keys, for several k at once. A collective: 4 all-reduces, or 1 for no k.

    Args:
        keys: int32, of this rank's ``sharding.num_local`` places.
        ranks: from the numbers of keys of +inf and above, and of -inf and below, to the k looked for, each 1 to N.
        num_local: of this rank's keys, where they are of other things than its places.
    """
    num_local = sharding.num_local if num_local is None else num_local
    upper = torch.zeros(_HALF, dtype=torch.int64, device=device)
    for block in blocks(num_local, device=device):
        upper += torch.bincount((keys(block) >> 16).add_(_HALF // 2), minlength=_HALF)
    infinite = torch.stack((upper[UNSEEN_KEY >> 16 :].sum(), upper[: (_BROKEN_KEY >> 16) + 1].sum()))
    by_byte = upper.view(256, 256)
    first = sharding.sum(torch.cat((by_byte.sum(dim=1), infinite))).cpu().numpy()
    targets = [_Target(k) for k in ranks(*first[256:].tolist())]
    if not targets:
        return []
    for target in targets:
        target.narrow(first[:256])
    rows = [target.prefix for target in targets]
    _narrow(targets, by_byte[torch.tensor(rows, device=device)], sharding=sharding)
    few = _with_prefixes(keys, {target.prefix for target in targets}, num_local=num_local, device=device)
    for num_bits in (16, 24):
        _narrow(targets, _count_next(few, [target.prefix for target in targets], num_bits), sharding=sharding)
    return [Found(target.prefix, target.num_above, target.num_equal) for target in targets]


class _Target:
    """A key looked for: its leading bytes so far, the keys above all that have these, and those that have them."""

    def __init__(self, k: int):
        self.k, self.prefix, self.num_above, self.num_equal = k, 0, 0, 0

    def narrow(self, counts: np.ndarray) -> None:
        """Go on to the next byte. ``counts``: int64 [256], of the keys with this prefix, by that byte."""
        from_the_top = counts[::-1].cumsum()
        place = int(np.searchsorted(from_the_top, self.k - self.num_above))
        self.num_equal = int(counts[255 - place])
        self.num_above += int(from_the_top[place]) - self.num_equal
        self.prefix = self.prefix << 8 | (255 - place)


def _narrow(targets: list[_Target], counts: Tensor, *, sharding: ExampleSharding) -> None:
    """``counts``: int64 [targets, 256], this rank's."""
    totals = sharding.sum(counts.contiguous()).cpu().numpy()
    for target, row in zip(targets, totals, strict=True):
        target.narrow(row)


def _with_prefixes(keys: BlockValues, prefixes: set[int], *, num_local: int, device: torch.device) -> Tensor:
    """int32 [n], the keys of this rank that begin with one of the 16-bit ``prefixes``."""
    wanted = torch.zeros(_HALF, dtype=torch.bool)
    wanted[list(prefixes)] = True
    wanted = wanted.to(device)
    few = [torch.zeros(0, dtype=torch.int32, device=device)]
    for block in blocks(num_local, device=device):
        here = keys(block)
        few.append(here[wanted.index_select(0, (here >> 16).add_(_HALF // 2))])
    return torch.cat(few)


def _count_next(keys: Tensor, prefixes: list[int], num_bits: int) -> Tensor:
    """int64 [prefixes, 256]: int32 keys by the byte after their first ``num_bits``, of those with each prefix."""
    shift, different = 32 - num_bits, sorted(set(prefixes))
    kept = [prefix - (KEY_OFFSET >> shift) for prefix in different]
    bounds = torch.tensor(kept, dtype=torch.int32, device=keys.device)
    counts = torch.zeros(len(different) * 256, dtype=torch.int64, device=keys.device)
    for block in blocks(len(keys), device=keys.device):
        part = keys[block]
        prefix = part >> shift
        row = torch.bucketize(prefix, bounds).clamp_(max=len(different) - 1)
        digit = row * 256 + (part >> (shift - 8)).bitwise_and_(255)
        counts += torch.bincount(digit[bounds[row] == prefix], minlength=len(counts))
    return counts.view(-1, 256)[[different.index(prefix) for prefix in prefixes]]
