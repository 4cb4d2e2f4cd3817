"""Which rows to show: kept and dropped, the best, the worst and those at the cut, of each source.

Cost: a sort of the scores of each source that is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from titan_attent.data.plan.order import Pool
from titan_attent.look.decision import Decision


@dataclass(frozen=True)
class Group:
    """Rows of one source.

    Attributes:
        heading: what they have in common, such as "kept, highest scores".
        source: name of the source.
        ids: int64 [n].
    """

    heading: str
    source: str
    ids: np.ndarray


def random_ids(num: int, *, size: int) -> np.ndarray:
    """int64 [min(size, num)], distinct numbers in [0, num), the same at each call: the start of a keyed order."""
    return Pool(num, order=(0, 0, 0), size=num).ids(torch.arange(min(size, num))).numpy()


def groups_of(
    names: Sequence[str], source_of: np.ndarray, decision: Decision | None, *, rows: int, max_sources: int
) -> list[Group]:
    """The groups of the sources with the most examples, in the order of the sources.

    Args:
        names: the sources.
        source_of: int [N], the index of each example's source in ``names``.
        decision: by which rows are ranked; None for random rows.
        rows: rows of a group.
        max_sources: number of sources shown.
    """
    counts = np.bincount(source_of, minlength=len(names))
    shown = np.sort(np.argsort(-counts, kind="stable")[:max_sources])
    groups: list[Group] = []
    for source in shown.tolist():
        ids = np.flatnonzero(source_of == source)
        if decision is None:
            groups.append(Group("random", names[source], np.sort(ids[random_ids(len(ids), size=rows)])))
            continue
        order = ids[np.argsort(-decision.scores[ids], kind="stable")]
        for heading, chosen in _ranked(order, decision.kept, rows=rows):
            groups.append(Group(heading, names[source], chosen))
    return groups


def _ranked(order: np.ndarray, kept: np.ndarray | None, *, rows: int) -> list[tuple[str, np.ndarray]]:
    """(heading, ids) from the ids of a source in the order of their scores, the highest first. No id is shown twice."""
    if kept is None:
        middle = max(0, len(order) // 2 - rows // 2)
        parts = [
            ("highest scores", order[:rows]),
            ("middle", order[rows:][max(0, middle - rows) : max(0, middle - rows) + rows]),
            ("lowest scores", order[2 * rows :][-rows:]),
        ]
    else:
        inside, outside = order[kept[order]], order[~kept[order]]
        parts = [
            ("kept, highest scores", inside[:rows]),
            ("kept, next to the cut" if len(outside) else "kept, lowest scores", inside[rows:][-rows:]),
            ("dropped, next to the cut", outside[:rows]),
            ("dropped, lowest scores", outside[rows:][-rows:]),
        ]
    return [(heading, ids) for heading, ids in parts if len(ids)]
