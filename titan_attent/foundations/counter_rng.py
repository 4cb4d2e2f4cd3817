"""Counter-based randomness: a hash of (key, example id) instead of a generator with a state.

A generator hands out numbers in the order they are asked for, so what an example gets depends on how many ranks
share the work. A hash depends on the example alone: any rank evaluates any id, on CPU or GPU, in any order, and a
position in a shuffled order is one integer of state.

- ``hash_ids``: 64-bit hash, two rounds of the splitmix64 finaliser (Steele et al. 2014, variant 13 constants), keyed.
- ``uniform``, ``gumbel``: the hash read as float64 noise.
- ``permute``: a keyed permutation of [0, n), any n below 2^62, evaluated on demand: a Feistel network over the next
  even power of two (Luby and Rackoff 1988) with cycle walking (Black and Rogaway 2002). Halves of one or two bits know
  few functions: below 7 elements the order is that of the elements' hashes, so that all n! orders come equally often.

Cost: about 20 integer operations an id for a hash; a permutation takes 6 rounds and walks fewer than 4 times on
average, with a host sync every 4 steps of the longest walk: 13 for a million ids at the worst size. No memory beyond
its operands. All arithmetic is int64 with wrap-around, identical on every device.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FEISTEL_ROUNDS = 6
_STEPS_BETWEEN_LOOKS = 4
_LEAST_FOR_A_NETWORK = 7

_NUMBERS = {"order": 1, "noise": 2, "unseen": 3, "images": 4, "ties": 5}
"""Of the streams that had a number before they had a name: checkpoints and results of before keep their meaning."""


def stream(name: str) -> int:
    """The number of a stream of random numbers, for :func:`derive_key`.

    What a key is used for is part of it, so that the noise of a draw and the order of a pass are independent. A system
    names streams of its own, as "mysystem/noise": each name is a hash of its own.
    """
    return _NUMBERS.get(name) or int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def signed(value: int) -> int:
    """The int64 with the same 64 bits, so that a constant above 2^63 can meet a tensor."""
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(z: int) -> int:
    z = (z ^ (z >> 30)) * _MIX_1 & _MASK
    z = (z ^ (z >> 27)) * _MIX_2 & _MASK
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """The finaliser, in place on ``z`` and one temporary: torch's >> on int64 copies the sign bit, hence the mask."""
    shifted = torch.empty_like(z)
    for bits, factor in ((30, signed(_MIX_1)), (27, signed(_MIX_2)), (31, 1)):
        torch.bitwise_right_shift(z, bits, out=shifted)
        z ^= shifted.bitwise_and_((1 << (64 - bits)) - 1)
        if factor != 1:
            z *= factor
    return z


def _mix_array(z: np.ndarray) -> np.ndarray:
    """The same on uint64, in place."""
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        z ^= z >> np.uint64(bits)
        if factor != 1:
            z *= np.uint64(factor)
    return z


def derive_key(*fields: int) -> int:
    """One 64-bit key from integers such as (seed, stream, round, pass); order matters."""
    key = 0
    for field in fields:
        key = _mix_int((key + _GOLDEN + _mix_int((field + _GOLDEN) & _MASK)) & _MASK)
    return key


def hash_ids(ids: Tensor, key: int) -> Tensor:
    """int64 ids, any shape -> int64 hashes, all 64 bits used."""
    return _mix(_mix(ids + signed(key)).bitwise_xor_(signed(_mix_int(key ^ _GOLDEN))))


def uniform(ids: Tensor, key: int) -> Tensor:
    """int64 ids -> float64 in the open interval (0, 1), 52 bits: with 53 the half would round up to 1."""
    bits = (hash_ids(ids, key) >> 12).bitwise_and_((1 << 52) - 1)
    return bits.double().add_(0.5).mul_(2.0**-52)


def gumbel(ids: Tensor, key: int) -> Tensor:
    """int64 ids -> float64 standard Gumbel noise, finite."""
    return uniform(ids, key).log_().neg_().log_().neg_()


def permute(positions: Tensor, size: int, key: int) -> Tensor:
    """The images of ``positions`` under the keyed permutation of [0, size).

    Args:
        positions: int64, any shape, each in [0, size).
        size: number of elements permuted, 1 to 2^62.
        key: from :func:`derive_key`; another key gives another permutation.

    Returns:
        int64 of the same shape, in [0, size), distinct for distinct positions.
    """
    if size < _LEAST_FOR_A_NETWORK:
        return hash_ids(torch.arange(size, dtype=torch.int64, device=positions.device), key).argsort()[positions]
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    assert half <= 31, "a permutation holds at most 2^62 elements"
    round_keys = [derive_key(key, i) for i in range(_FEISTEL_ROUNDS)]
    walk = _walk_on_host if positions.device.type == "cpu" else _walk_on_device
    return walk(positions.flatten(), size, half, round_keys).view(positions.shape)


# The network permutes [0, 4^half); an image beyond size is fed back until it falls inside, which stays a bijection
# because the cycle of a start inside must come back inside. Only the images outside walk on.


def _walk_on_host(positions: Tensor, size: int, half: int, round_keys: list[int]) -> Tensor:
    """In numpy's uint64, which shifts without a mask: a call on a few ids takes a fifth of torch's time."""
    low, end = np.uint64((1 << half) - 1), np.uint64(size)
    keys = [(np.uint64(key), np.uint64(_mix_int(key ^ _GOLDEN))) for key in round_keys]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for key, second in keys:
            hashes = _mix_array(right + key)
            hashes ^= second
            left, right = right, left ^ (_mix_array(hashes) & low)
        return (left << np.uint64(half)) | right

    result = network(positions.numpy().view(np.uint64))
    walking = np.flatnonzero(result >= end)
    while len(walking):
        result[walking] = images = network(result[walking])
        walking = walking[images >= end]
    return torch.from_numpy(result.view(np.int64))


def _walk_on_device(positions: Tensor, size: int, half: int, round_keys: list[int]) -> Tensor:
    """A look at how many walk on is a host sync: a few steps between two."""
    low = (1 << half) - 1

    def network(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (hash_ids(right, round_key) & low)
        return (left << half) | right

    result = network(positions)
    walking = (result >= size).nonzero().flatten()
    while len(walking):
        images = result[walking]
        for _ in range(_STEPS_BETWEEN_LOOKS):
            images = torch.where(images >= size, network(images), images)
        result[walking] = images
        walking = walking[(images >= size).nonzero().flatten()]
    return result
