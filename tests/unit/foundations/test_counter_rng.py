"""counter_rng.py against splitmix64 and a Feistel network in plain Python integers, and statistical tests."""

import itertools
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import chi_square, chi_square_critical

from titan_attent.foundations import counter_rng
from titan_attent.foundations.counter_rng import derive_key, gumbel, hash_ids, permute, stream, uniform, unpermute

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
KEYS = st.integers(0, MASK)


def mix(z: int) -> int:
    """splitmix64's finaliser."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def unshift(z: int, bits: int) -> int:
    """The x with x ^ (x >> bits) == z."""
    x = z
    for _ in range(64 // bits + 1):
        x = z ^ (x >> bits)
    return x


def unmix(z: int) -> int:
    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return unshift(z, 30)


def plain_fold(*fields: int) -> int:
    key = 0
    for field in fields:
        key = mix((key + GOLDEN + mix((field + GOLDEN) & MASK)) & MASK)
    return key


def plain_hash(id: int, key: int) -> int:
    return mix(mix((id + key) & MASK) ^ mix(key ^ GOLDEN))


def feistel_rounds(key: int) -> list[int]:
    return [plain_fold(key, i) for i in range(6)]


def plain_permute(position: int, size: int, key: int) -> int:
    if size < 7:  # the order of their hashes, read as signed
        return sorted(range(size), key=lambda i: plain_hash(i, key) ^ 1 << 63)[position]
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    while True:
        left, right = divmod(position, 1 << half)
        for round_key in feistel_rounds(key):
            left, right = right, left ^ (plain_hash(right, round_key) % (1 << half))
        position = (left << half) + right
        if position < size:
            return position


def plain_unpermute(image: int, size: int, key: int) -> int:
    if size < 7:
        return [plain_permute(position, size, key) for position in range(size)].index(image)
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    while True:
        left, right = divmod(image, 1 << half)
        for round_key in reversed(feistel_rounds(key)):
            left, right = right ^ (plain_hash(left, round_key) % (1 << half)), left
        image = (left << half) + right
        if image < size:
            return image


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def spread(size: int, *, num: int, seed: int = 0) -> torch.Tensor:
    """Distinct positions of [0, size): both ends, and random positions in between."""
    generator = np.random.default_rng(seed)
    ends = np.arange(min(1000, size))
    inner = generator.integers(0, size, num, dtype=np.int64)
    return torch.from_numpy(np.unique(np.concatenate((ends, size - 1 - ends, inner))))


def test_the_reference_is_splitmix64():
    # The published first outputs of the generator for the seeds 0 and 1234567.
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert mix(1234567 + GOLDEN) == 6457827717110365317
    assert all(unmix(mix(z)) == z for z in (0, 1, GOLDEN, MASK))


@given(st.lists(INT64, min_size=1, max_size=8), KEYS)
def test_hash_is_the_plain_integer_hash(ids, key):
    assert [h & MASK for h in hash_ids(tensor(ids), key).tolist()] == [plain_hash(i, key) for i in ids]


@given(st.lists(INT64, max_size=5))
def test_fold_key_is_the_plain_integer_fold(fields):
    assert derive_key(*fields) == plain_fold(*fields)


def test_keys_of_different_fields_differ():
    keys = [derive_key(*fields) for length in range(4) for fields in np.ndindex(*(6,) * length)]
    assert len(set(keys)) == len(keys) == 1 + 6 + 36 + 216


def test_permutation_is_a_bijection_for_every_small_size():
    for size in range(1, 300):  # into the networks of 16, 64, 256 and 1024 elements
        images = permute(torch.arange(size), size, derive_key(7, size))
        assert sorted(images.tolist()) == list(range(size)), size
        assert torch.equal(unpermute(images, size, derive_key(7, size)), torch.arange(size)), size


@pytest.mark.parametrize("power", range(9, 14))
def test_permutation_is_a_bijection_around_powers_of_two(power):
    for size in (2**power - 1, 2**power, 2**power + 1):
        images = permute(torch.arange(size), size, derive_key(size))
        assert torch.equal(images.sort().values, torch.arange(size)), size


@settings(deadline=None)
@given(st.integers(1, 1 << 62), KEYS, st.data())
def test_permutation_is_the_plain_integer_permutation_and_inverts(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    images = permute(tensor(positions), size, key).tolist()
    assert images == [plain_permute(p, size, key) for p in positions]
    assert [plain_unpermute(image, size, key) for image in images] == positions
    assert unpermute(tensor(images), size, key).tolist() == positions


@pytest.mark.parametrize("size", [2**24 + 1, 2**32 + 5, 10**10, 2**40 + 3, 2**53 + 1, 2**61, 2**62])
def test_large_domains_stay_distinct_in_range_and_even(size):
    positions = spread(size, num=20_000)
    images = permute(positions, size, derive_key(size)).numpy()
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == len(positions)
    counts = np.bincount((images // -(-size // 64)).astype(int), minlength=64)
    assert chi_square(counts, np.full(64, len(images) / 64)) < chi_square_critical(63)


def test_an_image_depends_on_its_position_alone():
    size, key = 12_345, derive_key(1, 2, 3)
    whole = permute(torch.arange(size), size, key)
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permute(shuffled, size, key), whole[shuffled])
    assert torch.equal(permute(torch.arange(size).view(5, 823, 3), size, key), whole.view(5, 823, 3))
    assert torch.equal(torch.cat([permute(part, size, key) for part in torch.arange(size).split(97)]), whole)
    assert permute(tensor(4321), size, key).item() == whole[4321].item()
    assert permute(tensor([]), size, key).shape == (0,)


def as_on_a_device() -> Any:
    return mock.patch.object(counter_rng, "_walk_on_host", counter_rng._walk_on_device)


@pytest.mark.parametrize("size", [7, 16, 17, 64, 101, 1000, 2**20 + 1, 2**62])
def test_a_device_permutes_as_the_host_does(size):
    positions, key = spread(size, num=1000), derive_key(6)
    with as_on_a_device():
        expected = permute(positions, size, key)
    assert torch.equal(permute(positions, size, key), expected)


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**20])
def test_a_permutation_on_a_device_takes_few_host_syncs(size):
    """The longest walk of 2^20 positions takes about 55 steps where three in four images are outside [0, size)."""
    syncs: list[str] = []

    def counted(name: str) -> Any:
        stock = getattr(torch.Tensor, name)
        return mock.patch.object(torch.Tensor, name, lambda x: syncs.append(name) or stock(x))

    with counted("nonzero"), counted("__bool__"), as_on_a_device():
        permute(torch.arange(1 << 20), size, derive_key(3))
    assert len(syncs) <= (1 if size == 2**20 else 18)


def test_permutations_of_different_keys_are_independent():
    size = 10_000
    orders = np.stack([permute(torch.arange(size), size, derive_key(0, 0, i)).numpy() for i in range(6)])
    for a in range(6):
        # A random permutation has one fixed point on average (Poisson), and no correlation with another.
        assert (orders[a] == np.arange(size)).sum() < 10
        assert abs(np.corrcoef(orders[a], np.arange(size))[0, 1]) < 4.5 / size**0.5
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 10
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 4.5 / size**0.5


@pytest.mark.parametrize("size", range(2, 7))
def test_all_orders_of_few_elements_come_equally_often(size):
    orders = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    # For 720 orders, the test detects deviations of 17% on average; a network with few functions omits some orders.
    each = 10 if size == 6 else 30
    counts = np.zeros(len(orders))
    for key in range(each * len(orders)):
        counts[orders[tuple(permute(torch.arange(size), size, derive_key(11, size, key)).tolist())]] += 1
    assert chi_square(counts, np.full(len(orders), each)) < chi_square_critical(len(orders) - 1)


def test_from_seven_elements_on_the_order_is_that_of_earlier_versions():
    # Checkpoints rely on it: first images under two keys, computed by commit db29f37.
    assert permute(torch.arange(7), 7, derive_key(1)).tolist() == [6, 2, 0, 1, 5, 4, 3]
    assert permute(torch.arange(8), 1000, derive_key(2)).tolist() == [784, 783, 48, 396, 303, 280, 656, 691]


def test_every_position_has_every_image_equally_often():
    size, num_keys = 64, 3200  # detects deviations of 15% on average
    images = np.stack([permute(torch.arange(size), size, derive_key(5, key)).numpy() for key in range(num_keys)])
    for position in range(size):
        counts = np.bincount(images[:, position], minlength=size)
        assert chi_square(counts, np.full(size, num_keys / size)) < chi_square_critical(size - 1, z=4.5)


@pytest.mark.parametrize("first", [0, 2**24, 2**32, 2**61])
def test_uniform_noise_is_even_and_serially_independent(first):
    noise = uniform(torch.arange(first, first + 200_000), derive_key(3)).numpy()
    assert noise.dtype == np.float64 and (noise > 0).all() and (noise < 1).all()
    counts = np.bincount((noise * 128).astype(int), minlength=128)
    assert chi_square(counts, np.full(128, len(noise) / 128)) < chi_square_critical(127)
    pairs = (noise[0::2] * 16).astype(int) * 16 + (noise[1::2] * 16).astype(int)
    assert chi_square(np.bincount(pairs, minlength=256), np.full(256, len(pairs) / 256)) < chi_square_critical(255)


def test_uniform_is_the_top_bits_of_the_hash():
    ids = torch.arange(1000) + 2**40
    expected = [plain_hash(i, 99) / 2.0**64 for i in ids.tolist()]
    np.testing.assert_allclose(uniform(ids, 99).numpy(), expected, rtol=0, atol=2.0**-52)


@pytest.mark.parametrize("extreme", [MASK, MASK - 5000, 0, 5000])
def test_noise_is_finite_at_the_ends_of_the_hash(extreme):
    key = derive_key(4)
    id = (unmix(unmix(extreme) ^ mix(key ^ GOLDEN)) - key) & MASK
    ids = tensor([id - (1 << 64) if id >> 63 else id])
    assert hash_ids(ids, key).item() & MASK == extreme
    assert 0 < uniform(ids, key).item() < 1
    assert math.isfinite(gumbel(ids, key).item())


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = gumbel(torch.arange(400_000), derive_key(8)).numpy()
    assert np.isfinite(noise).all()
    variance = math.pi**2 / 6
    # The fourth central moment of the distribution is 27/5 of the variance squared.
    assert abs(noise.mean() - 0.5772156649) < 4 * (variance / len(noise)) ** 0.5
    assert abs(noise.var() - variance) < 4 * variance * ((27 / 5 - 1) / len(noise)) ** 0.5
    edges = -np.log(-np.log(np.arange(1, 32) / 32))
    counts = np.bincount(np.searchsorted(edges, noise), minlength=32)
    assert chi_square(counts, np.full(32, len(noise) / 32)) < chi_square_critical(31)


def test_streams_of_different_keys_are_uncorrelated():
    ids = torch.arange(100_000)
    streams = np.stack([uniform(ids, derive_key(stream, 0, round)).numpy() for stream in (1, 2, 3) for round in (0, 1)])
    correlation = np.corrcoef(streams) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / len(ids) ** 0.5


def test_streams_have_fixed_or_hashed_numbers() -> None:
    """Old names keep their numbers, so that earlier runs keep their orders; new names have numbers of their own."""
    assert [stream(name) for name in ("order", "noise", "unseen", "images", "ties")] == [1, 2, 3, 4, 5]
    names = ["order", "noise", *(f"system-{i}/noise" for i in range(1000))]
    numbers = {stream(name) for name in names}
    assert len(numbers) == len(names) and all(0 < number < 2**64 for number in numbers)
    keys = {derive_key(stream(name), 7) for name in names}
    assert len(keys) == len(names)
    assert stream("system-1/noise") == stream("system-1/noise")
