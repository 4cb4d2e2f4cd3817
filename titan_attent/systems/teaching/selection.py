"""Exact top-k over scores that are distributed over ranks.

Every example has a 32-bit key, and the unsigned order of the keys is the order of the scores. A radix descent
(radix.py) finds the k-th largest key of all ranks. If more keys equal it than fit, a second descent over a hash of
(seed of the draw, example id) decides among them, so that ties do not favour the start of the data set. The selection
is sent as a bitmask. N is the size of the pool; in a pool of all examples a slot is an example id.

Where examples differ in length, k is a number of tokens (tokens.py). Examples are taken in the same order, each while
the tokens of those before it are fewer than k. So the last one may reach beyond k, on any number of ranks the same.

Cost per rank and selection: 12 KiB of counts, N/8 bytes of bitmask, 3 passes over the N / ranks local keys; no scores
are sent. Ties cost one more pass, a hash per tied local example, and 4 all-reduces of at most 256 counts. Host syncs
are allowed here: selection happens between rounds only. All sums are of integers, so the result is the same for every
number of ranks. With tokens there is one more all-reduce, of 4 bytes.

Soft selection is Gumbel-top-k (Kool et al. 2019, "Stochastic Beams and Where to Find Them", equations 5-6). Adding
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
from titan_attent.systems.teaching.tokens import Tokens, block_of, histogram

_FLOOR_BINS = 1 << 16


def select_top_k(
    keys: Tensor,
    *,
    k: int,
    sharding: ExampleSharding,
    ids: Callable[[Tensor], Tensor] | None = None,
    seed: tuple[int, ...] = (),
    tokens: Tokens | None = None,
) -> tuple[Tensor, int]:
    """The k examples with the largest keys. Of those with the k-th largest key, the ones with the largest hashes are
    taken. With ``tokens`` they are the first examples of this order whose tokens reach k.

    Args:
        keys: int32 [num_local], this rank's keys in the order of its slots (radix.py).
        k: 1 to N; with ``tokens`` 1 to their total.
        ids: local slots, int64 [n], each in [0, num_local) -> the ids of the examples in them. Without it the smallest
            slots win ties; they also win ties of equal hashes.
        seed: seed of the draw.
        tokens: tokens of the examples; None to count examples.

    Returns:
        (chosen, threshold): bool [num_local], and the largest key that is not chosen, -1 if everything is chosen.
    """
    total = sharding.num_examples if tokens is None else tokens.total
    assert 1 <= k <= total
    local_tokens = None if tokens is None else tokens.local
    kth, *next_largest = largest_keys(
        lambda block: keys[block],
        # Of tokens, k + 1 may still be of the last chosen example.
        lambda *_: [k] if k == total or tokens is not None else [k, k + 1],
        sharding=sharding,
        device=keys.device,
        tokens=local_tokens,
    )
    num_ties_chosen, num_equal = k - kth.num_above, kth.num_equal
    chosen = keys >= kth.key - KEY_OFFSET
    tied = (keys == kth.key - KEY_OFFSET).nonzero().flatten() if num_ties_chosen < num_equal else keys[:0]
    if num_ties_chosen < num_equal and ids is not None:
        hashes = (hash_ids(ids(tied), derive_key(stream("ties"), *seed)) >> 32).int()
        (last_hash,) = largest_keys(
            lambda block: hashes[block],
            lambda *_: [num_ties_chosen],
            sharding=sharding,
            device=keys.device,
            num_local=len(tied),
            tokens=None if local_tokens is None else local_tokens[tied],
        )
        chosen[tied[hashes < last_hash.key - KEY_OFFSET]] = False
        tied = tied[hashes == last_hash.key - KEY_OFFSET]
        num_ties_chosen, num_equal = num_ties_chosen - last_hash.num_above, last_hash.num_equal
    if num_ties_chosen < num_equal:
        of_each = torch.ones_like(tied) if local_tokens is None else local_tokens[tied].long()
        counts, _ = sharding.gather(of_each.sum()[None])
        num_before = of_each.cumsum(0) - of_each + counts[: sharding.rank].sum()
        chosen[tied[num_before >= num_ties_chosen]] = False
    if tokens is not None:
        return chosen, _largest_left_out(keys, chosen, sharding=sharding)
    return chosen, next_largest[0].key if next_largest else -1


def _largest_left_out(keys: Tensor, chosen: Tensor, *, sharding: ExampleSharding) -> int:
    """The largest key of all ranks that is not chosen, -1 if there is none. A collective."""
    lowest = torch.full((), -1 - KEY_OFFSET, dtype=torch.int64, device=keys.device)
    for block in blocks(len(keys), device=keys.device):
        left_out = keys[block].long().masked_fill_(chosen[block], -1 - KEY_OFFSET)
        lowest = torch.maximum(lowest, left_out.max())
    return int(sharding.max(lowest)) + KEY_OFFSET


def log_probabilities(scores: Tensor, *, temperature: float, normalization: str) -> Tensor:
    """Unnormalised log-probability of each example; the temperature is applied before any noise.

    Args:
        scores: fp32 [n]; infinities stay.
        temperature: above 0; larger is closer to uniform.
        normalization: "softmax" (log p = score / T + constant) or "sigmoid" (log p = log sigmoid(score) / T). The
            constant is the same for all examples and changes neither the draw nor the inclusion probabilities. It is
            left out, so no global sum is needed.

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
    sharding: ExampleSharding, device: torch.device, tokens: Tokens | None = None,
) -> float:  # fmt: skip
    """The smallest log-probability allowed: smaller ones are raised to it, so that each is drawn with at least
    ``minimum``.

    With a threshold kappa, example i is drawn with q_i = 1 - exp(-exp(phi_i - kappa)). kappa is such that the q_i, none
    below the floor, sum to k. The sum runs over a histogram of 2^16 bins (integer counts, one all-reduce of 512 KiB),
    so it is equal on all ranks. The floor holds up to the bin width, and up to the O(1/k) difference between the
    expected and the drawn threshold. It cannot exceed k/N, the probability of the uniform draw.

    Args:
        phi: float64 log-probabilities. Examples with +inf (never scored) are drawn first and those with -inf never:
            neither counts here.
        ends: the smallest and the largest finite log-probability of all ranks.
        num_infinite: number of log-probabilities of all ranks that are +inf, and that are -inf.
        k: number of examples to draw.
        minimum: in [0, 1).
        tokens: tokens of the examples; ``num_infinite`` and k are then of tokens, and the expected tokens are k.

    Returns:
        -inf if none has to be raised.
    """
    (low, high), (num_first, num_never) = ends, num_infinite
    total = sharding.num_examples if tokens is None else tokens.total
    num_finite, budget = total - num_first - num_never, k - num_first
    local_tokens = None if tokens is None else tokens.local
    if minimum == 0 or budget <= 0 or num_finite <= budget or high == low:
        return float("-inf")
    width = (high - low) / _FLOOR_BINS
    counted = torch.zeros(_FLOOR_BINS, dtype=torch.int64, device=device)
    for block in blocks(sharding.num_local, device=device):
        bins = (phi(block) - low).div_(width).clamp_(0, _FLOOR_BINS - 1)
        counted += histogram(bins.int(), block_of(local_tokens, block), num_bins=_FLOOR_BINS)
    totals = sharding.sum(counted).cpu().numpy()
    totals[0] -= num_never  # infinities were counted in the first and the last bin
    totals[-1] -= num_first
    nonempty = totals.nonzero()[0]
    counts, centres = totals[nonempty].astype(np.float64), low + (nonempty + 0.5) * width
    floor = min(minimum, budget / num_finite)

    def expected(kappa: float) -> float:
        drawn = -np.expm1(-np.exp(np.minimum(centres - kappa, 30.0)))
        return float((counts * np.maximum(drawn, floor)).sum())

    # At the left end every example is drawn, at the right end none is above the floor: bisect between them.
    left, right = low - 40.0, high + 40.0
    while left < (middle := (left + right) / 2) < right:
        left, right = (middle, right) if expected(middle) > budget else (left, middle)
    return right + float(np.log(-np.log1p(-floor)))


def soft_keys(phi: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gumbel keys of the examples ``ids``, int32 [n]. They are rounded to fp32: float64 results may depend on SIMD
    tails.
    """
    return ordered_keys(gumbel(ids, derive_key(stream("noise"), *seed)).add_(phi).float())


def random_keys(ids: Tensor, *, seed: tuple[int, ...]) -> Tensor:
    """Keys that do not depend on losses, int32 [n]: the k largest are a random subset of size k."""
    return (hash_ids(ids, derive_key(stream("noise"), *seed)) >> 32).int().bitwise_xor_(-KEY_OFFSET)


def unseen_first(keys: Tensor, unseen: Tensor, *, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """``keys``, with the keys of unseen examples replaced by random ones above all others (2^23 distinct values)."""
    order = (hash_ids(ids, derive_key(stream("unseen"), *seed)) >> 20).bitwise_and_(0x7FFFFF).int()
    return torch.where(unseen, order.add_(UNSEEN_KEY - KEY_OFFSET), keys)


def gather_bitmask(chosen: Tensor, *, sharding: ExampleSharding) -> np.ndarray:
    """Local choices -> the bitmask over all N slots, on every rank.

    Args:
        chosen: bool [num_local].

    Returns:
        uint8 [ceil(N / 8)], bit i % 8 (little-endian) of byte i // 8 is slot i. Sends and holds about N/8 bytes per
            rank.
    """
    chunk = sharding.chunk
    segment = np.zeros(-(-chunk // 8), dtype=np.uint8)
    packed = np.packbits(chosen.cpu().numpy(), bitorder="little")
    segment[: packed.size] = packed
    gathered, _ = sharding.gather(torch.from_numpy(segment).to(chosen.device))
    segments = gathered.cpu().numpy()
    num_bytes = -(-sharding.num_examples // 8)
    mask = np.zeros(-(-sharding.size * chunk // 8), dtype=np.uint8)
    # A shard may start within a byte. Ranks whose numbers differ by 8 start at the same bit, ``chunk`` bytes apart, so
    # every eighth segment needs the same shift: eight operations place all segments.
    for first in range(min(8, sharding.size)):
        byte, shift = divmod(first * chunk, 8)
        shifted = segments[first::8]
        width = -(-(shift + chunk) // 8)
        rows = as_strided(mask[byte:], shape=(len(shifted), width), strides=(chunk, 1))
        rows[:, : shifted.shape[1]] |= shifted << shift
        if shift:
            rows[:, 1:] |= (shifted >> (8 - shift))[:, : width - 1]
    return mask[:num_bytes]
