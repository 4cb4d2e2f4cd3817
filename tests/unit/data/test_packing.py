"""data/plan/packing.py against properties counted by brute force, and against textbook bin packing, one example at a
time."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.plan.packing import Packed, best_fit, concatenate, num_concatenated, num_windows, window_limit

FEW_MORE = 0.03
"""The most windows, as a share, that best_fit may need above first-fit decreasing."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Lengths, capacity, max_examples: small, so that equal lengths, full windows and binding limits are common."""
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=60))
    return np.array(lengths, dtype=np.int64), capacity, draw(st.integers(1, 12))


def windows_of(packed: Packed) -> list[list[int]]:
    """The slots of each window."""
    bounds = packed.starts.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(packed.slots)
    return [packed.slots[bounds[w] : bounds[w + 1]].tolist() for w in range(len(bounds) - 1)]


def first_fit_decreasing(lengths: np.ndarray, *, capacity: int, max_examples: int) -> int:
    """The number of windows of first-fit decreasing."""
    spaces: list[int] = []
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for w, space in enumerate(spaces):
            if space >= length and rooms[w]:
                spaces[w] -= length
                rooms[w] -= 1
                break
        else:
            spaces.append(capacity - length)
            rooms.append(max_examples - 1)
    return len(spaces)


def best_fit_decreasing(lengths: np.ndarray, *, capacity: int) -> list[int]:
    """The free tokens of every window of best-fit decreasing without a limit, sorted."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        w = bisect_left(spaces, length)
        space = spaces.pop(w) if w < len(spaces) else capacity
        insort(spaces, space - length)
    return spaces


def documents(seed: int, *, num: int, capacity: int, mean: float = 1000, sigma: float = 1.0) -> np.ndarray:
    """Log-normal lengths, as those of documents; longer ones than a window are spans of ``capacity`` tokens."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, num)
    return np.clip(lengths, 1, capacity).astype(np.int64)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(case=cases())
def test_every_example_is_in_one_window_that_holds_it(case: tuple[np.ndarray, int, int]) -> None:
    lengths, capacity, max_examples = case
    packed = best_fit(lengths, capacity=capacity, max_examples=max_examples)
    assert packed.slots.dtype == packed.starts.dtype == np.int64
    assert sorted(packed.slots.tolist()) == list(range(len(lengths)))
    for slots in windows_of(packed):
        assert 1 <= len(slots) <= max_examples
        assert lengths[slots].sum() <= capacity
        assert slots == sorted(slots, key=lambda slot: (-lengths[slot], slot))  # longest first, equal ones in order
    assert num_windows(lengths, capacity=capacity, max_examples=max_examples) == len(packed.starts) - 1


@settings(deadline=None, max_examples=500, derandomize=True)
@given(case=cases())
def test_without_a_limit_it_is_best_fit_decreasing(case: tuple[np.ndarray, int, int]) -> None:
    lengths, capacity, _ = case
    windows = windows_of(best_fit(lengths, capacity=capacity, max_examples=max(1, len(lengths))))
    spaces = sorted(capacity - int(lengths[slots].sum()) for slots in windows)
    assert spaces == best_fit_decreasing(lengths, capacity=capacity)


def test_real_sizes_are_best_fit_decreasing() -> None:
    for capacity in (1024, 8192):
        lengths = documents(1, num=20_000, capacity=capacity)
        packed = best_fit(lengths, capacity=capacity, max_examples=len(lengths))
        sums = np.add.reduceat(lengths[packed.slots], packed.starts[:-1])
        assert sorted((capacity - sums).tolist()) == best_fit_decreasing(lengths, capacity=capacity)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_equal_lengths_go_where_their_order_says(case: tuple[np.ndarray, int, int], seed: int) -> None:
    """Another order gives windows of the same lengths; the examples of one length fill their places in order."""
    lengths, capacity, max_examples = case
    order = np.random.default_rng(seed).permutation(len(lengths))
    first = best_fit(lengths, capacity=capacity, max_examples=max_examples)
    second = best_fit(lengths[order], capacity=capacity, max_examples=max_examples)
    np.testing.assert_array_equal(first.starts, second.starts)
    np.testing.assert_array_equal(lengths[first.slots], lengths[order][second.slots])
    for length in set(lengths.tolist()):
        # places[i]: the place, in window after window, of the i-th example of this length.
        places = [
            np.argsort(packed.slots)[np.flatnonzero(given == length)]
            for packed, given in ((first, lengths), (second, lengths[order]))
        ]
        np.testing.assert_array_equal(*places)


def test_the_shuffle_decides_which_examples_share_a_window() -> None:
    lengths = documents(2, num=5000, capacity=1024)
    order = np.random.default_rng(0).permutation(len(lengths))
    first = best_fit(lengths, capacity=1024, max_examples=64)
    second = best_fit(lengths[order], capacity=1024, max_examples=64)
    shared = {tuple(sorted(slots)) for slots in windows_of(first) if len(slots) > 1}
    again = {tuple(sorted(order[slots].tolist())) for slots in windows_of(second) if len(slots) > 1}
    assert len(shared & again) < 0.2 * len(shared)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("max_examples", [4, 16, 4000])
@pytest.mark.parametrize("capacity", [100, 1024, 4096])
def test_no_more_windows_than_first_fit_decreasing(capacity: int, max_examples: int, sigma: float) -> None:
    for seed in range(2):
        lengths = documents(seed, num=1500, capacity=capacity, mean=capacity / 4, sigma=sigma)
        ours = num_windows(lengths, capacity=capacity, max_examples=max_examples)
        rival = first_fit_decreasing(lengths, capacity=capacity, max_examples=max_examples)
        assert ours <= (1 + FEW_MORE) * rival
        assert ours >= max(-(-int(lengths.sum()) // capacity), -(-len(lengths) // max_examples))


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
def test_a_block_of_documents_fills_its_windows(capacity: int, sigma: float) -> None:
    """99% at least, with the default limit of another sample."""
    limit = window_limit(documents(3, num=20_000, capacity=capacity, sigma=sigma), capacity=capacity)
    lengths = documents(4, num=65_536, capacity=capacity, sigma=sigma)
    windows = num_windows(lengths, capacity=capacity, max_examples=limit)
    assert limit & (limit - 1) == 0 and limit <= 512
    assert lengths.sum() >= 0.99 * windows * capacity


@settings(deadline=None, max_examples=100, derandomize=True)
@given(case=cases())
def test_the_default_limit_is_the_smallest_power_of_two_that_costs_few_windows(
    case: tuple[np.ndarray, int, int],
) -> None:
    lengths, capacity, _ = case
    limit, limits = window_limit(lengths, capacity=capacity), [1, 2, 4, 8, 16, 32, 64]
    without = len(best_fit_decreasing(lengths, capacity=capacity))
    windows = [num_windows(lengths, capacity=capacity, max_examples=other) for other in limits]
    assert limit == next(limits[i] for i in range(7) if windows[i] <= without * 257 / 256)


@pytest.mark.parametrize(
    ("lengths", "capacity", "max_examples", "expected"),
    [
        ([], 8, 4, 0),
        ([5], 8, 4, 1),
        ([8] * 7, 8, 4, 7),
        ([1] * 9, 100, 4, 3),  # the limit binds
        ([3, 1, 2, 4], 100, 1, 4),
        ([1, 1, 1], 1, 4, 3),
        ([4, 4, 4, 3, 1, 4], 8, 4, 3),  # 4 + 4, 4 + 4, 3 + 1
        ([6, 5, 3, 2], 8, 4, 2),  # 5 + 3, 6 + 2
        ([5, 3, 6, 2], 9, 2, 2),  # 6 + 3, 5 + 2: the least space that holds the 3 is beside the 6
        ([70_000] * 2 + [30_000] * 3, 100_000, 4, 3),  # too long for numpy's radix sort
    ],
)
def test_edges(lengths: list[int], capacity: int, max_examples: int, expected: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    packed = best_fit(array, capacity=capacity, max_examples=max_examples)
    windows = windows_of(packed)
    assert len(windows) == num_windows(array, capacity=capacity, max_examples=max_examples) == expected
    assert sorted(sum(windows, [])) == list(range(len(lengths)))
    assert all(array[slots].sum() <= capacity and len(slots) <= max_examples for slots in windows)


def test_more_windows_than_16_bits_count() -> None:
    lengths = np.tile(np.array([3, 2, 5]), 50_000)
    packed = best_fit(lengths, capacity=5, max_examples=2)
    assert len(packed.starts) - 1 == 100_000
    assert sorted(packed.slots.tolist()) == list(range(len(lengths)))
    assert (np.add.reduceat(lengths[packed.slots], packed.starts[:-1]) == 5).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_other_integers_pack_alike(dtype: type) -> None:
    lengths = np.array([100, 3, 60, 40, 97], dtype=dtype)
    expected = best_fit(lengths.astype(np.int64), capacity=100_000, max_examples=2)
    packed = best_fit(lengths, capacity=100_000, max_examples=2)
    assert packed.slots.tolist() == expected.slots.tolist() and packed.starts.tolist() == expected.starts.tolist()


@pytest.mark.parametrize(
    ("lengths", "capacity", "max_examples", "match"),
    [
        ([3, 9], 8, 4, r"lengths\[1\] = 9 is above capacity = 8, .*; cut long documents into spans"),
        ([3, 0], 8, 4, r"lengths\[1\] = 0 is below 1; leave empty examples out"),
        ([-1], 8, 4, r"lengths\[0\] = -1 is below 1"),
        ([], 0, 4, "capacity = 0; set it to 1 or more"),
        ([1], 8, 0, "max_examples = 0; set it to 1 or more"),
    ],
)
def test_values_out_of_range_are_refused(lengths: list[int], capacity: int, max_examples: int, match: str) -> None:
    array = np.array(lengths, dtype=np.int64)
    for function in (best_fit, num_windows):
        with pytest.raises(ValueError, match=match):
            function(array, capacity=capacity, max_examples=max_examples)


def test_concatenation_refuses_empty_examples_and_windows() -> None:
    with pytest.raises(ValueError, match=r"lengths\[2\] = 0 is below 1; leave empty examples out"):
        concatenate(np.array([1, 2, 0]), capacity=4)
    with pytest.raises(ValueError, match="capacity = 0; set it to 1 or more"):
        concatenate(np.array([1, 2]), capacity=0)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), max_size=30), capacity=st.integers(1, 20))
def test_concatenation_cuts_the_stream(lengths: list[int], capacity: int) -> None:
    """Token by token: the windows are the stream of (example, token within it), without its last partial window."""
    spans = concatenate(np.array(lengths, dtype=np.int64), capacity=capacity)
    stream = [(slot, token) for slot, length in enumerate(lengths) for token in range(length)]
    windows = []
    for w in range(len(spans.starts) - 1):
        window: list[tuple[int, int]] = []
        for i in range(spans.starts[w], spans.starts[w + 1]):
            assert spans.firsts[i] < spans.stops[i]
            window += [(int(spans.slots[i]), token) for token in range(spans.firsts[i], spans.stops[i])]
        windows.append(window)
    num = len(stream) // capacity
    assert windows == [stream[w * capacity : (w + 1) * capacity] for w in range(num)]
    assert spans.starts[0] == 0 and spans.starts[-1] == len(spans.slots)
    # One span of an example in a window.
    pairs = [(w, int(spans.slots[i])) for w in range(num) for i in range(spans.starts[w], spans.starts[w + 1])]
    assert len(set(pairs)) == len(pairs)


@given(
    st.lists(st.integers(1, 12), max_size=60),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(1, 5)),
    st.booleans(),
)
def test_windows_with_a_limit_of_examples_are_those_of_a_plain_loop(
    lengths: list[int], capacity: int, max_examples: int | None, keep_rest: bool
) -> None:
    """Token after token: a window ends when it is full, or when the next token would be of one example too many."""
    windows: list[list[tuple[int, int]]] = []
    for token in [(slot, i) for slot, length in enumerate(lengths) for i in range(length)]:
        last = windows[-1] if windows else []
        slots = {slot for slot, _ in last} | {token[0]}
        if not last or len(last) == capacity or (max_examples is not None and len(slots) > max_examples):
            windows.append([])
        windows[-1].append(token)
    if max_examples is not None:
        count = num_concatenated(np.array(lengths, dtype=np.int64), capacity=capacity, max_examples=max_examples)
        assert count == len(windows)
    if not keep_rest and windows and len(windows[-1]) < capacity:
        windows.pop()
    spans = concatenate(
        np.array(lengths, dtype=np.int64), capacity=capacity, max_examples=max_examples, keep_rest=keep_rest
    )
    found = []
    for first, stop in zip(spans.starts[:-1].tolist(), spans.starts[1:].tolist(), strict=True):
        parts = zip(*(column[first:stop].tolist() for column in spans[:3]), strict=True)
        found.append([(slot, i) for slot, start, end in parts for i in range(start, end)])
    assert found == windows
