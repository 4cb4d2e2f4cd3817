"""Exact top-k over scores that no rank holds together.

Every example has a 32-bit key whose unsigned order is the order of its score. The k-th largest key of all ranks is
found by radix descent (radix.py). Where more keys equal it than are wanted, a hash of (seed of the draw, example id)
decides among them, by a second descent: what stands first in the data set is not preferred. The chosen set travels as
a bitmask. N is the size of the pool, and a place in a pool of all examples is the example's id.

Cost a rank and selection: 12 KiB of counts, N/8 bytes of bitmask, 3 passes over the N / ranks local keys; no scores
travel. Ties cost one pass more, a hash of each example tied here, and 4 all-reduces of at most 256 counts. Host syncs
are allowed here: selection happens between rounds only. All sums are of integers, so the result is the same for every
number of ranks.

Soft selection (Gumbel-top-k; Kool et al. 2019, "Stochastic Beams and Where to Find Them", equations 5-6): adding
independent Gumbel noise to log-probabilities and taking the k largest keys draws k examples without replacement,
exactly as k sequential draws in proportion to the probabilities would.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from titan_attent.foundations.counter_rng import derive_key, gumbel, hash_ids, stream
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import KEY_OFFSET, UNSEEN_KEY, BlockValues, blocks, largest_keys, ordered_keys

_FLOOR_BINS = 1 << 16


def select_top_k(
    keys: Tensor,
    *,
    k: int,
    sharding: ExampleSharding,
    ids: Callable[[Tensor], Tensor] | None = None,
    seed: tuple[int, ...] = (),
) -> tuple[Tensor, int]:
    """The k examples with the largest keys; of those that tie at the last one, the largest hashes.

    Args:
        keys: int32 [num_local], this rank's keys in the order of its places (radix.py).
        k: 1 to N.
        ids: int64 [n], each in [0, num_local) -> the ids of the examples there. Without it ties go to the smallest
            places, as do those of equal hashes.
        seed: of the draw.

    Returns:
        (chosen, threshold): bool [num_local], and the (k+1)-th largest key, -1 when everything is chosen.
    """
    assert 1 <= k <= sharding.num_examples
    last = k == sharding.num_examples
    kth, *after = largest_keys(
        lambda block: keys[block], lambda *_: [k] if last else [k, k + 1], sharding=sharding, device=keys.device
    )
    num_wanted, num_equal = k - kth.num_above, kth.num_equal
    chosen = keys >= kth.key - KEY_OFFSET
    tied = (keys == kth.key - KEY_OFFSET).nonzero().flatten() if num_wanted < num_equal else keys[:0]
    if num_wanted < num_equal and ids is not None:
        hashes = (hash_ids(ids(tied), derive_key(stream("ties"), *seed)) >> 32).int()
        (last_hash,) = largest_keys(
            lambda block: hashes[block],
            lambda *_: [num_wanted],
            sharding=sharding,
            device=keys.device,
            num_local=len(tied),
        )
        chosen[tied[hashes < last_hash.key - KEY_OFFSET]] = False
        tied = tied[hashes == last_hash.key - KEY_OFFSET]
        num_wanted, num_equal = num_wanted - last_hash.num_above, last_hash.num_equal
    if num_wanted < num_equal:
        counts, _ = sharding.gather(torch.tensor([len(tied)], device=keys.device))
        taken_before = int(counts[: sharding.rank].sum())
        chosen[tied[max(0, num_wanted - taken_before) :]] = False
    return chosen, after[0].key if after else -1


def log_probabilities(scores: Tensor, *, temperature: float, normalization: str) -> Tensor:
    """Unnormalised log-probability of each example, the temperature applied before any noise.

    Args:
        scores: fp32 [n]; infinities pass through.
        temperature: above 0; larger is closer to uniform.
        normalization: "softmax" (log p = score / T + constant) or "sigmoid" (log p = log sigmoid(score) / T). The
            constant is the same for all examples: it changes neither the draw nor the inclusion probabilities, so it
            is left out and no global sum is needed.

    Returns:
        float64 [n].
    """
    phi = scores.to(torch.float64, copy=True)
    if normalization == "sigmoid":
        finite = torch.isfinite(phi)
        phi = torch.where(finite, torch.nn.functional.logsigmoid(phi), phi)
    else:
        assert normalization == "softmax"
    return phi if temperature == 1.0 else phi.div_(temperature)


def lowest_log_probability(
    phi: BlockValues, *, ends: tuple[float, float], num_infinite: tuple[int, int], k: int, minimum: float,
    sharding: ExampleSharding, device: torch.device,
) -> float:  # fmt: skip
    """The log-probability up to which smaller ones are raised, so that none is drawn with less than ``minimum``.

    With a threshold kappa, example i is drawn with q_i = 1 - exp(-exp(phi_i - kappa)). kappa is found such that the
    q_i, none below the floor, sum to k. The sum runs over a histogram of 2^16 bins (integer counts, one all-reduce of
    512 KiB), so it is equal on all ranks; the floor is met to the bin width and to the O(1/k) between the expected and
    the drawn threshold. It cannot exceed k/N: that is the uniform draw.

    Args:
        phi: float64 log-probabilities. +inf (never scored) is drawn first and -inf never: neither takes part.
        ends: the smallest and the largest finite one of all ranks.
        num_infinite: how many of all ranks are +inf, and -inf.
        k: number of examples to draw.
        minimum: in [0, 1).

    Returns:
        -inf where nothing is to be raised.
    """
    (low, high), (num_first, num_never) = ends, num_infinite
    num_finite, budget = sharding.num_examples - num_first - num_never, k - num_first
    if minimum == 0 or budget <= 0 or num_finite <= budget or high == low:
        return float("-inf")
    width = (high - low) / _FLOOR_BINS
    histogram = torch.zeros(_FLOOR_BINS, dtype=torch.int64, device=device)
    for block in blocks(sharding.num_local, device=device):
        bins = (phi(block) - low).div_(width).clamp_(0, _FLOOR_BINS - 1)
        histogram += torch.bincount(bins.int(), minlength=_FLOOR_BINS)
    totals = sharding.sum(histogram).cpu().numpy()
    totals[0] -= num_never  # infinities fell into the bins at the ends
    totals[-1] -= num_first
    used = totals.nonzero()[0]
    counts, centres = totals[used].astype(np.float64), low + (used + 0.5) * width
    floor = min(minimum, budget / num_finite)

    def expected(kappa: float) -> float:
        drawn = -np.expm1(-np.exp(np.minimum(centres - kappa, 30.0)))
        return float((counts * np.maximum(drawn, floor)).sum())

    # Below the left end everything is drawn, above the right end only the floor is: bisect between.
    left, right = low - 40.0, high + 40.0
    while left < (middle := (left + right) / 2) < right:
        left, right = (middle, right) if expected(middle) > budget else (left, middle)
    return right + float(np.log(-np.log1p(-floor)))


def soft_keys(phi: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gumbel keys of the examples ``ids``, int32 [n]: rounding to fp32 makes them independent of SIMD tails."""
    return ordered_keys(gumbel(ids, derive_key(stream("noise"), *seed)).add_(phi).float())


def random_keys(ids: Tensor, *, seed: tuple[int, ...]) -> Tensor:
    """Keys that know nothing of the losses, int32 [n]: the top k of them is a random subset of size k."""
    return (hash_ids(ids, derive_key(stream("noise"), *seed)) >> 32).int().bitwise_xor_(-KEY_OFFSET)


def unseen_first(keys: Tensor, unseen: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """``keys``, but above them all the unseen examples in keyed random order (2^23 distinct places)."""
    order = (hash_ids(ids, derive_key(stream("unseen"), *seed)) >> 20).bitwise_and_(0x7FFFFF).int()
    return torch.where(unseen, order.add_(UNSEEN_KEY - KEY_OFFSET), keys)


def gather_bitmask(chosen: Tensor, *, sharding: ExampleSharding) -> np.ndarray:
    """Local choices -> the bitmask over all N places, on every rank.

    Args:
        chosen: bool [num_local].

    Returns:
        uint8 [ceil(N / 8)], bit i % 8 (little) of byte i // 8 is place i. Moves and holds about N/8 bytes a rank.
    """
    chunk = sharding.chunk
    segment = np.zeros(-(-chunk // 8), dtype=np.uint8)
    packed = np.packbits(chosen.cpu().numpy(), bitorder="little")
    segment[: packed.size] = packed
    gathered, _ = sharding.gather(torch.from_numpy(segment).to(chosen.device))
    segments = gathered.cpu().numpy()
    num_bytes = -(-sharding.num_examples // 8)
    mask = np.zeros(-(-sharding.size * chunk // 8), dtype=np.uint8)
    # A shard need not start on a byte. Of eight ranks in a row each starts at another bit of its byte, and the next
    # eight do so ``chunk`` bytes on: each eighth of the ranks is shifted and laid into the mask at once.
    for first in range(min(8, sharding.size)):
        byte, shift = divmod(first * chunk, 8)
        part = segments[first::8]
        width = -(-(shift + chunk) // 8)
        rows = as_strided(mask[byte:], shape=(len(part), width), strides=(chunk, 1))
        rows[:, : part.shape[1]] |= part << shift
        if shift:
            rows[:, 1:] |= (part >> (8 - shift))[:, : width - 1]
    return mask[:num_bytes]
