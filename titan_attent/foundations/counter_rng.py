"""Counter-based random numbers: a hash of (key, example id) instead of a generator with a state.

A generator returns numbers in the order of the calls, so the number of an example depends on how many ranks share the
work. A hash depends on the example alone: any rank can evaluate any id, on CPU or GPU, in any order. The position in a
shuffled order is one integer of state.

- ``hash_ids``: keyed 64-bit hash, two rounds of the splitmix64 finaliser (Steele et al. 2014, variant 13 constants).
- ``uniform``, ``gumbel``: float64 noise computed from the hash.
- ``permute``: a keyed permutation of [0, n), n at most 2^62, evaluated on demand: a Feistel network over the next even
  power of two (Luby and Rackoff 1988) with cycle walking (Black and Rogaway 2002). Halves of one or two bits have too
  few functions. So below 7 elements, the elements are sorted by their hashes, which makes all n! orders equally likely.

Cost: about 20 integer operations per hash of an id. A permutation takes 6 rounds and walks fewer than 4 times on
average. On an accelerator it takes one host sync every 4 steps of the longest walk: 13 for a million ids at the worst
size. No memory beyond its operands. All arithmetic is int64 with wrap-around, identical on every device.
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
_STEPS_BETWEEN_SYNCS = 4
_MIN_NETWORK_SIZE = 7

_FIXED_STREAMS = {"order": 1, "noise": 2, "unseen": 3, "images": 4, "ties": 5}
"""Numbers that earlier versions gave these streams: kept so that their checkpoints and results stay valid."""


def stream(name: str) -> int:
    """The number of a stream of random numbers, as a field of :func:`derive_key`.

    Different streams are independent: the noise of a draw and the order of a pass do not share random numbers. A
    system names its own streams, for example "mysystem/noise"; the number is a hash of the name.
    """
    return _FIXED_STREAMS.get(name) or int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def signed(value: int) -> int:
    """The int64 with the same 64 bits, so that a constant above 2^63 can be combined with a tensor."""
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(z: int) -> int:
    z = (z ^ (z >> 30)) * _MIX_1 & _MASK
    z = (z ^ (z >> 27)) * _MIX_2 & _MASK
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """The finaliser, in place on ``z``, with one temporary. torch's >> on int64 copies the sign bit, hence the mask."""
    shifted = torch.empty_like(z)
    for bits, factor in ((30, signed(_MIX_1)), (27, signed(_MIX_2)), (31, 1)):
        torch.bitwise_right_shift(z, bits, out=shifted)
        z ^= shifted.bitwise_and_((1 << (64 - bits)) - 1)
        if factor != 1:
            z *= factor
    return z


def _mix_array(z: np.ndarray) -> np.ndarray:
    """The finaliser on uint64, in place."""
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
    """int64 ids -> float64 in the open interval (0, 1), 52 bits: with 53 bits the added 0.5 could round up to 1."""
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
    if size < _MIN_NETWORK_SIZE:
        return _small_order(size, key, device=positions.device)[positions]
    walk = _walk_on_host if positions.device.type == "cpu" else _walk_on_device
    return walk(positions.flatten(), size, *_network_keys(size, key)).view(positions.shape)


def unpermute(images: Tensor, size: int, key: int) -> Tensor:
    """The positions whose images under :func:`permute` these are; the same arguments and shapes, on the CPU."""
    if size < _MIN_NETWORK_SIZE:
        return _small_order(size, key, device=images.device).argsort()[images]
    half, round_keys = _network_keys(size, key)
    return _walk_on_host(images.flatten(), size, half, round_keys, inverse=True).view(images.shape)


def _small_order(size: int, key: int, *, device: torch.device) -> Tensor:
    """The whole permutation of a few elements, int64 [size]."""
    return hash_ids(torch.arange(size, dtype=torch.int64, device=device), key).argsort()


def _network_keys(size: int, key: int) -> tuple[int, list[int]]:
    """The bits of half an element, and the key of every round."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    assert half <= 31, "a permutation holds at most 2^62 elements"
    return half, [derive_key(key, i) for i in range(_FEISTEL_ROUNDS)]


# The network permutes [0, 4^half). An image at or above size is passed through the network again until it is below
# size. This stays a bijection: every cycle of the network that contains a number below size returns to one. The inverse
# walks the same cycles backwards.


def _walk_on_host(positions: Tensor, size: int, half: int, round_keys: list[int], *, inverse: bool = False) -> Tensor:
    """Uses numpy's uint64, which shifts without a mask: a call on a few ids takes a fifth of torch's time."""
    low, end = np.uint64((1 << half) - 1), np.uint64(size)
    keys = [(np.uint64(key), np.uint64(_mix_int(key ^ _GOLDEN))) for key in round_keys]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for key, second in keys:
            hashes = _mix_array(right + key)
            hashes ^= second
            left, right = right, left ^ (_mix_array(hashes) & low)
        return (left << np.uint64(half)) | right

    def inverse_network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for key, second in reversed(keys):
            hashes = _mix_array(left + key)
            hashes ^= second
            left, right = right ^ (_mix_array(hashes) & low), left
        return (left << np.uint64(half)) | right

    step = inverse_network if inverse else network
    result = step(positions.numpy().view(np.uint64))
    walking = np.flatnonzero(result >= end)
    while len(walking):
        result[walking] = images = step(result[walking])
        walking = walking[images >= end]
    return torch.from_numpy(result.view(np.int64))


def _walk_on_device(positions: Tensor, size: int, half: int, round_keys: list[int]) -> Tensor:
    """Reading how many images still walk is a host sync: done once every ``_STEPS_BETWEEN_SYNCS`` steps."""
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
        for _ in range(_STEPS_BETWEEN_SYNCS):
            images = torch.where(images >= size, network(images), images)
        result[walking] = images
        walking = walking[(images >= size).nonzero().flatten()]
    return result
