"""Tables of cells: settings by the number of ranks and a name, each of which a world of ranks runs for one test.

The default run takes the cells that together reach every parallelism and family. ``-m exhaustive`` takes more, which
combine the same in other ways.
"""

from typing import Any

import pytest

Cells = dict[int, dict[str, dict[str, Any]]]


def merged(cells: Cells, more: Cells) -> Cells:
    return {size: cells.get(size, {}) | more.get(size, {}) for size in sorted(cells.keys() | more.keys())}


def parameters(cells: Cells, more: Cells) -> list[Any]:
    """(size, name) of all cells, for ``parametrize``; those of ``more`` are marked as exhaustive."""
    return [pytest.param(size, name) for size, named in cells.items() for name in named] + [
        pytest.param(size, name, marks=pytest.mark.exhaustive) for size, named in more.items() for name in named
    ]


def chosen(request: pytest.FixtureRequest, cells: Cells, more: Cells) -> Cells:
    """What the worlds of a module run in this session: ``more``, too, if one of its tests is marked as exhaustive."""
    items = (item for item in request.session.items if item.path == request.path)
    return merged(cells, more) if any(item.get_closest_marker("exhaustive") for item in items) else cells
