"""Tables of cells: settings by the number of ranks and a name, each of which a world of ranks runs for one test.

The default run takes the cells that together reach every parallelism and family. ``-m exhaustive`` takes more, which
combine the same in other ways.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.spawn import run_on_ranks

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


class Worlds:
    """The results of cells on every rank. A world is started once, when one of its cells is first asked for.

    Args:
        run: what each rank runs, ``run(mesh, cells, data, folder)``: a top-level function that returns results by name.
    """

    def __init__(self, run: Callable[..., dict[str, Any]], cells: Cells, *, data: Path, folder: Path):
        self.run, self.cells, self.data, self.folder = run, cells, data, folder
        self.worlds: dict[int, list[dict[str, Any]]] = {}

    def cell(self, size: int, name: str) -> list[dict[str, Any]]:
        """Of each rank."""
        if size not in self.worlds:
            args = (self.cells[size], str(self.data), str(self.folder))
            self.worlds[size] = run_on_ranks(self.run, size, *args, timeout=400.0)
        return [rank[name] for rank in self.worlds[size]]
