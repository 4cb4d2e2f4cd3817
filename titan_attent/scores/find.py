"""Which scorers' losses a folder holds: what ``[teacher] scores`` names.

    DIR/amateur, DIR/expert     the two folders that ``titan_attent.score pair`` writes
    DIR/reference.json          the folder of one scorer, as ``titan_attent.score checkpoint`` writes it; its own role
                                says which scorer, and a folder that names no role counts as the expert

Cost: reads one small file where the folder is that of one scorer.
"""

from pathlib import Path

from titan_attent.scores.reference import AMATEUR, EXPERT, ROLES, ReferenceLosses

PAIR_FILE = "scorers.json"
"""In the folder of a pair: the request, and what each stage took."""


def find_scorers(path: str | Path) -> dict[str, Path]:
    """Return the folder of each scorer below ``path``: "amateur", "expert" -> folder.

    Raises:
        ValueError: there is no such folder, or it holds no scores; as :class:`ReferenceLosses` for one scorer.
    """
    folder = Path(path)
    pair = {role: folder / role for role in ROLES if (folder / role).is_dir()}
    if pair:
        return pair
    if (folder / PAIR_FILE).is_file():
        raise ValueError(
            f"{folder}: its scorers are not finished: run the same `torchrun -m titan_attent.score pair` command again "
            "to resume it"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; correct the path, or write scores with `torchrun -m titan_attent.score pair`"
        )
    return {AMATEUR if ReferenceLosses(folder).role == AMATEUR else EXPERT: folder}
