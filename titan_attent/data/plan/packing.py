"""Packing: which examples share a window of ``capacity`` tokens, as pure functions of the examples' lengths.

:func:`best_fit` is best-fit decreasing. The longest examples are placed first, each into the window with the least
free space that holds it. No example is cut. The work is done on the histogram of lengths: all examples of one length,
and all windows that were filled alike, are placed in one step of plain integers (histogram packing, Krell et al. 2021,
https://arxiv.org/abs/2107.02027). :func:`concatenate` joins all examples and cuts the stream, for comparison.

The order of ``lengths`` decides which of several examples of equal length goes where, so the caller shuffles first.
Windows come out in an order that depends on the lengths, so the caller shuffles them, too.

Cost: about three steps of 1 µs per distinct length; for :func:`best_fit` also two stable sorts of the examples. A block
of 65,536 documents takes 5 to 13 ms (docs/results/packing.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Examples in windows.

    Attributes:
        slots: int64 [n], indices into the given lengths, window after window, longest first within a window.
        starts: int64 [num_windows + 1]; window w holds ``slots[starts[w] : starts[w + 1]]``.
    """

    slots: np.ndarray
    starts: np.ndarray


class Concatenated(NamedTuple):
    """Spans of examples in windows that are all full.

    Attributes:
        slots: int64 [num_spans], indices into the given lengths, window after window, ascending.
        firsts: int64 [num_spans], the first token of each span within its example.
        stops: int64 [num_spans], the token after the last one of each span, within its example.
        starts: int64 [num_windows + 1]; window w holds the spans ``starts[w]`` to ``starts[w + 1] - 1``.
    """

    slots: np.ndarray
    firsts: np.ndarray
    stops: np.ndarray
    starts: np.ndarray


class _Placements(NamedTuple):
    """Placement i puts ``copies[i]`` examples of one length into each of ``sizes[i]`` windows from ``firsts[i]`` on.

    Placements are in order of decreasing length, and together place every example once.
    """

    firsts: list[int]
    sizes: list[int]
    copies: list[int]
    num_windows: int


def best_fit(lengths: np.ndarray, *, capacity: int, max_examples: int) -> Packed:
    """Pack every example whole into one window, by best-fit decreasing.

    Args:
        lengths: integers [n], tokens of each example, 1 to ``capacity``.
        capacity: tokens of a window.
        max_examples: the largest number of examples in a window (:func:`window_limit`).

    Raises:
        ValueError: a length is outside [1, capacity], or ``capacity`` or ``max_examples`` is below 1.
    """
    placed = _place(lengths, capacity=capacity, max_examples=max_examples)
    sizes, copies = np.array(placed.sizes, dtype=np.int64), np.array(placed.copies, dtype=np.int64)
    # window_of[j]: the window of the j-th longest example; examples of equal length are in their given order.
    shifts = np.array(placed.firsts, dtype=np.int64) - (np.cumsum(sizes) - sizes)
    window_of = np.repeat(np.repeat(shifts, sizes) + np.arange(sizes.sum()), np.repeat(copies, sizes))
    longest_first = _stable_order(capacity - lengths.astype(np.int64), end=capacity)
    starts = np.zeros(placed.num_windows + 1, dtype=np.int64)
    np.cumsum(np.bincount(window_of, minlength=placed.num_windows), out=starts[1:])
    return Packed(longest_first[_stable_order(window_of, end=placed.num_windows)], starts)


def num_windows(lengths: np.ndarray, *, capacity: int, max_examples: int) -> int:
    """The number of windows of :func:`best_fit`, without its sorts; arguments and errors are the same."""
    return _place(lengths, capacity=capacity, max_examples=max_examples).num_windows


def num_concatenated(lengths: np.ndarray, *, capacity: int, max_examples: int) -> int:
    """The number of windows of :func:`concatenate` with ``keep_rest``; arguments and errors are the same."""
    _check(lengths, capacity=capacity, max_examples=max_examples)
    return len(_borders(np.cumsum(lengths, dtype=np.int64), capacity=capacity, max_examples=max_examples)) - 1


def window_limit(lengths: np.ndarray, *, capacity: int, count: Callable[..., int] = num_windows) -> int:
    """The default of ``max_examples``: a power of two that costs at most 1/256 of the windows.

    It is the smallest with which the packing needs at most 257/256 of the windows that it needs without a limit.
    The mean length alone does not determine it: many very short examples need a larger limit.

    Args:
        lengths: integers [n], the lengths of a data set, or of a random sample of some 10,000 examples.
        capacity: tokens of a window.
        count: the packing: :func:`num_windows`, or :func:`num_concatenated` of lengths in a random order.

    Raises:
        ValueError: a length is outside [1, capacity], or ``capacity`` is below 1.
    """
    without = count(lengths, capacity=capacity, max_examples=max(1, len(lengths)))
    limit = 1
    while 256 * count(lengths, capacity=capacity, max_examples=limit) > 257 * without:
        limit *= 2
    return limit


def concatenate(
    lengths: np.ndarray, *, capacity: int, max_examples: int | None = None, keep_rest: bool = False
) -> Concatenated:
    """Join the examples in their given order, and cut the stream every ``capacity`` tokens.

    The last tokens are left out if they do not fill a window, as in :mod:`titan_attent.data.text.shards`.

    Args:
        lengths: integers [n], tokens of each example, 1 or more; an example may be longer than a window.
        capacity: tokens of a window.
        max_examples: a window that holds spans of so many examples ends with the last of them; None for no limit.
        keep_rest: the last tokens are a window of their own.

    Raises:
        ValueError: a length, ``capacity`` or ``max_examples`` is below 1.
    """
    limit = max(1, len(lengths)) if max_examples is None else max_examples
    _check(lengths, capacity=capacity, max_examples=limit)
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    borders = _borders(ends, capacity=capacity, max_examples=limit)
    if not keep_rest and len(borders) > 1 and borders[-1] - borders[-2] < capacity:
        borders = borders[:-1]
    num_tokens = int(borders[-1])
    cuts = np.union1d(begins[begins < num_tokens], borders)  # its last is num_tokens
    slots = np.searchsorted(ends, cuts[:-1], side="right")
    firsts, stops = cuts[:-1] - begins[slots], cuts[1:] - begins[slots]
    return Concatenated(slots, firsts, stops, np.searchsorted(cuts, borders))


def _borders(ends: np.ndarray, *, capacity: int, max_examples: int) -> np.ndarray:
    """int64 [num_windows + 1], where windows begin and end in the stream of examples with these ``ends``, int64 [n]."""
    num_tokens = int(ends[-1]) if len(ends) else 0
    borders = np.append(np.arange(0, num_tokens, capacity), num_tokens)
    firsts, lasts = (np.searchsorted(ends, places, side="right") for places in (borders[:-1], borders[1:] - 1))
    if not len(firsts) or (lasts - firsts).max() < max_examples:
        return borders
    limited = [0]
    while (start := limited[-1]) < num_tokens:
        last = int(np.searchsorted(ends, start, side="right")) + max_examples - 1
        limited.append(min(start + capacity, int(ends[min(last, len(ends) - 1)])))
    return np.array(limited, dtype=np.int64)


def _check(lengths: np.ndarray, *, capacity: int, max_examples: int = 1, longest: int | None = None) -> None:
    for name, value in (("capacity", capacity), ("max_examples", max_examples)):
        if value < 1:
            raise ValueError(f"packing: {name} = {value}; set it to 1 or more")
    outside = lengths < 1 if longest is None else (lengths < 1) | (lengths > longest)
    if outside.any():
        slot = int(outside.argmax())
        if lengths[slot] < 1:
            raise ValueError(f"packing: lengths[{slot}] = {lengths[slot]} is below 1; leave empty examples out")
        raise ValueError(
            f"packing: lengths[{slot}] = {lengths[slot]} is above capacity = {longest}, the tokens of a window; cut "
            "long documents into spans of at most that many tokens first, or raise capacity"
        )


def _place(lengths: np.ndarray, *, capacity: int, max_examples: int) -> _Placements:
    """Best-fit decreasing over the histogram of the lengths."""
    _check(lengths, capacity=capacity, max_examples=max_examples, longest=capacity)
    counts = np.bincount(lengths, minlength=capacity + 1)
    placed = _Placements([], [], [], 0)
    firsts, sizes, copies, opened = placed
    # A group is (space, room, first, size): ``size`` windows from ``first`` on, each with ``space`` free tokens that
    # ``room`` more examples may fill. Windows of ``ready`` hold an example of the current length; the one with the
    # least space is last. Windows of ``waiting`` have too little space; they become ready when lengths reach it.
    ready: list[tuple[int, int, int, int]] = []
    waiting: dict[int, list[tuple[int, int, int, int]]] = {}
    reached = capacity
    present = np.flatnonzero(counts)[::-1]
    for length, left in zip(present.tolist(), counts[present].tolist(), strict=True):
        for space in range(reached - 1, length - 1, -1):
            if space in waiting:
                ready += waiting.pop(space)
        reached = length
        while left:
            if not ready:
                size = -(-left // min(capacity // length, max_examples))
                ready.append((capacity, max_examples, opened, size))
                opened += size
            space, room, first, size = ready.pop()
            fit = min(space // length, room)
            full = min(size, left // fit)
            if full:
                firsts.append(first)
                sizes.append(full)
                copies.append(fit)
                left -= full * fit
                after = space - fit * length
                if after and room > fit:
                    waiting.setdefault(after, []).append((after, room - fit, first, full))
                first, size = first + full, size - full
            # Windows remain only if fewer examples are left than one of them holds: the first takes those.
            if size and left:
                firsts.append(first)
                sizes.append(1)
                copies.append(left)
                if size > 1:
                    ready.append((space, room, first + 1, size - 1))
                ready.append((space - left * length, room - left, first, 1))
                left = 0
            elif size:
                ready.append((space, room, first, size))
    return placed._replace(num_windows=opened)


def _stable_order(values: np.ndarray, *, end: int) -> np.ndarray:
    """The stable argsort of values in [0, end). numpy sorts 16 bits by radix, in a fraction of the time."""
    return np.argsort(values.astype(np.uint16) if end <= 1 << 16 else values, kind="stable")
