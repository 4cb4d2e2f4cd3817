"""Exact top-k over scores that no rank holds together.

Every example has a 32-bit key whose unsigned order is the order of its score. The k-th largest key of all ranks is
found by radix descent: 4 all-reduces of 256 counts, from the high byte to the low one. Ties at that key go to the
smallest places, which takes one all-gather of a count a rank. The chosen set travels as a bitmask. N is the size of the
pool, and a place in a pool of all examples is the example's id.

Cost a rank and selection: 8 KiB of counts, N/8 bytes of bitmask, 2 passes over the N / ranks local keys; no scores
travel. Host syncs are allowed here: selection happens between rounds only. All sums are of integers, so the result is
the same for every number of ranks.

Soft selection (Gumbel-top-k; Kool et al. 2019, "Stochastic Beams and Where to Find Them", equations 5-6): adding
independent Gumbel noise to log-probabilities and taking the k largest keys draws k examples without replacement,
exactly as k sequential draws in proportion to the probabilities would.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from titan_attent.keyed import STREAM_NOISE, STREAM_UNSEEN, fold_key, gumbel, hash_ids
from titan_attent.sharding import ExampleSharding

UNSEEN_KEY = 0xFF800000
"""Key of +inf. NaN has no place among scores, so the 2^23 keys above it order the examples never scored."""

_FLOOR_BINS = 1 << 16


def ordered_keys(scores: Tensor) -> Tensor:
    """fp32 scores without NaN -> int64 keys in [0, 2^32) with the same order; -0.0 and 0.0 are equal."""
    bits = (scores.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def score_of_key(key: int) -> float:
    """The fp32 value whose key this is; the inverse of :func:`ordered_keys` below the keys of unseen examples."""
    bits = key - (1 << 31) if key >= 1 << 31 else 0xFFFFFFFF - key
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def kth_largest_key(keys: Tensor, *, k: int, sharding: ExampleSharding) -> tuple[int, int]:
    """The k-th largest of all ranks' keys, and how many keys lie strictly above it.

    Args:
        keys: int64 [num_local], in [0, 2^32).
        k: 1 to N.
    """
    assert 1 <= k <= sharding.num_examples
    candidates, prefix, above = keys, 0, 0
    for place in (3, 2, 1, 0):
        # One byte of every little-endian int64, without temporaries of 8 bytes a key.
        digits = candidates.view(torch.uint8)[place::8].contiguous()
        totals = sharding.sum(torch.bincount(digits, minlength=256)).tolist()
        byte = 255
        while above + totals[byte] < k:
            above += totals[byte]
            byte -= 1
        prefix = prefix << 8 | byte
        candidates = candidates[digits == byte]
    return prefix, above


def select_top_k(keys: Tensor, *, k: int, sharding: ExampleSharding) -> tuple[Tensor, int]:
    """The k examples with the largest keys, ties by smallest place.

    Args:
        keys: int64 [num_local], this rank's keys in the order of its places.
        k: 1 to N.

    Returns:
        (chosen, threshold): bool [num_local], and the (k+1)-th largest key, -1 when everything is chosen.
    """
    kth, num_above = kth_largest_key(keys, k=k, sharding=sharding)
    tied = (keys == kth).nonzero().flatten()
    counts, _ = sharding.gather(torch.tensor([len(tied)], device=keys.device))
    num_tied = counts.flatten().tolist()
    taken_before = sum(num_tied[: sharding.rank])
    take_here = max(0, min(num_tied[sharding.rank], k - num_above - taken_before))
    chosen = keys > kth
    chosen[tied[:take_here]] = True
    if num_above + sum(num_tied) > k:
        return chosen, kth
    next_key = torch.where(keys < kth, keys, -1).max() if len(keys) else torch.tensor(-1, device=keys.device)
    return chosen, int(sharding.max(next_key))


def log_probabilities(scores: Tensor, *, temperature: float, normalization: str) -> Tensor:
    """Unnormalised log-probability of each example, the temperature applied before any noise.

    Args:
        scores: fp32 [num_local]; infinities pass through.
        temperature: above 0; larger is closer to uniform.
        normalization: "softmax" (log p = score / T + constant) or "sigmoid" (log p = log sigmoid(score) / T). The
            constant is the same for all examples: it changes neither the draw nor the inclusion probabilities, so it
            is left out and no global sum is needed.

    Returns:
        float64 [num_local].
    """
    phi = scores.double()
    if normalization == "sigmoid":
        finite = torch.isfinite(phi)
        phi = torch.where(finite, torch.nn.functional.logsigmoid(phi), phi)
    else:
        assert normalization == "softmax"
    return phi / temperature


def floor_log_probabilities(phi: Tensor, *, k: int, minimum: float, sharding: ExampleSharding) -> Tensor:
    """Raise small log-probabilities so that every example is drawn with probability of at least ``minimum``.

    With a threshold kappa, example i is drawn with q_i = 1 - exp(-exp(phi_i - kappa)). kappa is found such that the
    q_i, none below the floor, sum to k. The sum runs over a histogram of 2^16 bins (integer counts, one all-reduce of
    512 KiB), so it is equal on all ranks; the floor is met to the bin width and to the O(1/k) between the expected and
    the drawn threshold. It cannot exceed k/N: that is the uniform draw.

    Args:
        phi: float64 [num_local]. +inf (never scored) is drawn first and -inf never: neither takes part.
        k: number of examples to draw.
        minimum: in [0, 1).
    """
    finite = torch.isfinite(phi)
    num_first = (phi == float("inf")).sum()
    num_first, num_finite = sharding.sum(torch.stack((num_first, finite.sum()))).tolist()
    if minimum == 0 or num_first >= k or num_finite <= k - num_first:
        return phi
    budget = k - num_first
    bounds = phi.new_full((2,), float("-inf"))
    known = phi[finite]
    if len(known):
        bounds = torch.stack((known.max(), -known.min()))
    high, low = (v * s for v, s in zip(sharding.max(bounds).tolist(), (1, -1), strict=True))
    if high == low:
        return phi

    width = (high - low) / _FLOOR_BINS
    histogram = torch.zeros(_FLOOR_BINS, dtype=torch.int64, device=phi.device)
    for block in _blocks(known):
        bins = ((known[block] - low) / width).long().clamp(0, _FLOOR_BINS - 1)
        histogram += torch.bincount(bins, minlength=_FLOOR_BINS)
    totals = sharding.sum(histogram).cpu().numpy()
    used = totals.nonzero()[0]
    counts, centres = totals[used].astype(np.float64), low + (used + 0.5) * width
    floor = min(minimum, budget / num_finite)

    def expected(kappa: float) -> float:
        drawn = -np.expm1(-np.exp(np.minimum(centres - kappa, 30.0)))
        return float((counts * np.maximum(drawn, floor)).sum())

    # Below the left end everything is drawn, above the right end only the floor is: bisect between.
    left, right = low - 40.0, high + 40.0
    for _ in range(100):
        middle = (left + right) / 2
        left, right = (middle, right) if expected(middle) > budget else (left, middle)
    lowest = right + float(np.log(-np.log1p(-floor)))
    return torch.where(finite, phi.clamp(min=lowest), phi)


def soft_keys(phi: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gumbel keys of the examples ``ids``, int64 [n]: rounding to fp32 makes them independent of SIMD tails."""
    noise_key, keys = fold_key(STREAM_NOISE, *seed), torch.empty_like(ids)
    for block in _blocks(ids):
        noisy = phi[block] + gumbel(ids[block], noise_key)
        keys[block] = with_unseen_first(noisy.float(), phi[block] == float("inf"), ids=ids[block], seed=seed)
    return keys


def _blocks(x: Tensor) -> Iterator[slice]:
    """Cut elementwise work so that its temporaries stay in a CPU's cache, and are bounded on a GPU."""
    size = 1 << 16 if x.device.type == "cpu" else 1 << 26
    return (slice(start, start + size) for start in range(0, len(x), size))


def with_unseen_first(scores: Tensor, unseen: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Keys of ``scores``, and above them all the unseen examples in keyed random order (2^23 distinct places)."""
    order = (hash_ids(ids, fold_key(STREAM_UNSEEN, *seed)) >> 20) & 0x7FFFFF
    return torch.where(unseen, UNSEEN_KEY + order, ordered_keys(scores))


def random_keys(ids: Tensor, *, seed: tuple[int, ...]) -> Tensor:
    """Keys that know nothing of the losses: the top k of them is a random subset of size k."""
    return (hash_ids(ids, fold_key(STREAM_NOISE, *seed)) >> 32) & 0xFFFFFFFF


def gather_bitmask(chosen: Tensor, *, sharding: ExampleSharding) -> np.ndarray:
    """Local choices -> the bitmask over all N places, on every rank.

    Args:
        chosen: bool [num_local].

    Returns:
        uint8 [ceil(N / 8)], bit i % 8 (little) of byte i // 8 is place i. Moves and holds about N/8 bytes a rank.
    """
    segment = np.zeros(-(-sharding.chunk // 8), dtype=np.uint8)
    packed = np.packbits(chosen.cpu().numpy(), bitorder="little")
    segment[: packed.size] = packed
    gathered, _ = sharding.gather(torch.from_numpy(segment).to(chosen.device))
    segments = gathered.cpu().numpy()
    # A shard need not start on a byte: each segment is shifted to its first bit; what a shift pushes out of a byte
    # goes to the next one.
    mask = np.zeros(-(-sharding.num_examples // 8) + segment.size + 1, dtype=np.uint8)
    for rank in range(sharding.size):
        start, stop = sharding.range_of(rank)
        if start == stop:
            break
        byte, shift = divmod(start, 8)
        mask[byte : byte + segment.size] |= segments[rank] << shift
        if shift:
            mask[byte + 1 : byte + 1 + segment.size] |= segments[rank] >> (8 - shift)
    return mask[: -(-sharding.num_examples // 8)]
