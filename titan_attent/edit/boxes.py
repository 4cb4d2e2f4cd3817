"""Boxes: the rectangular parts of tensors in which checkpoints are read, combined and written.

A box is a range [start, stop) per dimension. :func:`boxes` cuts a tensor into boxes that are each one run of its
elements in row-major order. The cuts depend on its shape alone, so results do not depend on how a checkpoint was
sharded or on the number of processes.
"""

import math
from collections.abc import Iterator, Sequence

ELEMENTS = 2**21
"""Elements per box, at most: 8 MiB in fp32."""

Box = tuple[tuple[int, int], ...]
"""A range [start, stop) per dimension; () for a number."""


def boxes(shape: Sequence[int], limit: int = 0) -> Iterator[Box]:
    """Cut ``shape`` into boxes of at most ``limit`` elements (default: :data:`ELEMENTS`), in row-major order.

    In each box all dimensions before one have length 1, and all after it are complete.
    """
    limit = limit or ELEMENTS
    if not shape or 0 in shape:
        yield tuple((0, size) for size in shape)
        return
    row = math.prod(shape[1:])
    if row <= limit:
        whole, step = tuple((0, size) for size in shape[1:]), max(limit // row, 1)
        for start in range(0, shape[0], step):
            yield ((start, min(start + step, shape[0])), *whole)
        return
    for index in range(shape[0]):
        for rest in boxes(shape[1:], limit):
            yield ((index, index + 1), *rest)


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def offsets(box: Box) -> tuple[int, ...]:
    """The index of a box's first element."""
    return tuple(start for start, _ in box)


def overlap(one: Box, other: Box) -> Box | None:
    """The part that two boxes share; None if it is empty."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of ``box`` in a tensor that holds ``outer``."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))
