"""The file ``branch.json`` beside a run's checkpoints: which of them the run left behind when it went back.

titan/checkpoint_folder.py writes it; whatever takes the last checkpoints of a run reads it.
"""

from dataclasses import dataclass
from pathlib import Path

from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

BRANCH = "branch.json"
_FORMAT, _VERSION = "titan_attent.checkpoint_branch", 1


@dataclass(frozen=True)
class Branch:
    """The content of ``branch.json``; without the file the run never went back.

    Attributes:
        start: the step that the run went back to; -1 for never.
        left: the steps whose checkpoints it left behind.
    """

    start: int = -1
    left: tuple[int, ...] = ()


def read_branch(folder: Path) -> Branch:
    """Read ``branch.json``; ValueError if it is damaged."""
    path = folder / BRANCH
    if not path.is_file():
        return Branch()
    fix = "remove it, and give checkpoint.load_step at the next start"
    fields = read_versioned(path, format=_FORMAT, versions=[_VERSION], fix=fix)
    try:
        branch = typed(Branch, {"start": None, "left": None} | fields)
    except ValueError as error:
        raise ValueError(f"{path}: malformed ({error}); {fix}") from error
    if min((branch.start, *branch.left)) < 0:
        raise ValueError(f"{path}: malformed ({branch}); {fix}")
    return branch


def write_branch(folder: Path, branch: Branch) -> None:
    """Write ``branch.json``."""
    fields = {"start": branch.start, "left": list(branch.left)}
    write_atomically(folder / BRANCH, encode_versioned(fields, format=_FORMAT, version=_VERSION))
