"""Finds the scorers whose losses a folder holds: the folder that ``[teacher] scores`` names.

    DIR/amateur, DIR/expert     the two folders that ``titan_attent.score pair`` writes
    DIR/reference.json          the folder of one scorer, as ``titan_attent.score checkpoint`` writes it. It holds the
                                role of the scorer; without a role the scorer counts as the expert

Cost: reads one small file if the folder is that of one scorer.
"""

from collections.abc import Callable
from pathlib import Path

from titan_attent.scores.stored import AMATEUR, EXPERT, ROLES, StoredScores

PAIR_FILE = "scorers.json"
"""File in the folder of a pair: the request, and the duration of each stage."""


def find_scorers(path: str | Path, *, open_scores: Callable[[str], StoredScores] = StoredScores) -> dict[str, Path]:
    """Return the folder of each scorer that ``path`` holds: role, "amateur" or "expert" -> folder.

    Raises:
        ValueError: there is no such folder, or it holds no scores; for the folder of one scorer, see
            :class:`StoredScores`.
    """
    folder = Path(path)
    pair = {role: folder / role for role in ROLES if (folder / role).is_dir()}
    if pair:
        return pair
    if (folder / PAIR_FILE).is_file():
        raise ValueError(
            f"{folder}: its scores are not finished: run the same `torchrun -m titan_attent.score pair` command again "
            "to resume"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; correct the path, or write scores with `torchrun -m titan_attent.score pair`"
        )
    return {AMATEUR if open_scores(str(folder)).role == AMATEUR else EXPERT: folder}
