"""Which checkpoints a folder holds, and which of them a run goes on with.

A checkpoint is a folder ``step-N``, named so exactly, and finished once its last file is there: ``.metadata``, or the
weights of ``checkpoint.last_save_in_hf``. Copies and renamed ones (``step-4-good``, ``step-10.tmp``) are the user's:
never loaded, never deleted.

A run that went back to step N (``checkpoint.load_step``) leaves checkpoints of higher numbers behind. ``branch.json``
beside them says so: later starts go on from what was written since, and only that is purged. A step that is saved again
moves what stood in its place to ``abandoned/``.

Cost: one directory and a small file.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

BRANCH, ABANDONED = "branch.json", "abandoned"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_FORMAT, _VERSION = "titan_attent.checkpoint_branch", 1


@dataclass(frozen=True)
class Branch:
    """What ``branch.json`` says; without the file no run went back.

    ``start``: the step that it went back to, -1 for never. ``left``: the steps whose checkpoints it left behind.
    """

    start: int = -1
    left: tuple[int, ...] = ()


def checkpoint(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step}"


def is_safetensors(path: Path) -> bool:
    """Whether a folder holds weights in safetensors format: ``last_save_in_hf``, or downloaded ones."""
    return next(path.glob("*.safetensors"), None) is not None or (path / "model.safetensors.index.json").is_file()


def is_finished(path: Path) -> bool:
    """Whether all of a checkpoint was written."""
    return (path / ".metadata").is_file() or is_safetensors(path)


def steps_in(folder: Path) -> dict[int, bool]:
    """step -> whether its checkpoint was finished; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    found = [int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()]
    return {step: is_finished(checkpoint(folder, step)) for step in sorted(found)}


def read_branch(folder: Path) -> Branch:
    """ValueError if ``branch.json`` is damaged."""
    path = folder / BRANCH
    if not path.is_file():
        return Branch()
    mend = "remove it, and give checkpoint.load_step at the next start"
    fields = read_versioned(path, format=_FORMAT, versions=[_VERSION], fix=mend)
    try:
        branch = typed(Branch, {"start": None, "left": None} | fields)
    except ValueError as error:
        raise ValueError(f"{path}: malformed ({error}); {mend}") from error
    if min((branch.start, *branch.left)) < 0:
        raise ValueError(f"{path}: malformed ({branch}); {mend}")
    return branch


def _write_branch(folder: Path, branch: Branch) -> None:
    fields = {"start": branch.start, "left": list(branch.left)}
    write_atomically(folder / BRANCH, encode_versioned(fields, format=_FORMAT, version=_VERSION))


def latest(folder: Path) -> int | None:
    """The newest finished step of the branch that the run is on; ValueError if only those left behind are there."""
    finished = [step for step, is_whole in steps_in(folder).items() if is_whole]
    branch = read_branch(folder)
    ours = [step for step in finished if step not in branch.left]
    if finished and not ours:
        raise ValueError(
            f"{folder} holds only checkpoints that the run left behind when it went back to step {branch.start} "
            f"({names(finished)}): give the one to go on from, such as --checkpoint.load_step {max(finished)}"
        )
    return max(ours, default=None)


def go_back(folder: Path, step: int) -> str:
    """Note that the run goes on from ``step``; what to tell the user, or nothing if that is its newest checkpoint."""
    branch, steps = read_branch(folder), steps_in(folder)
    newer = [number for number, is_whole in steps.items() if number > step and is_whole and number not in branch.left]
    if not newer and step not in branch.left:
        return ""
    left = [number for number in steps if number > step]
    _write_branch(folder, Branch(step, tuple(left)))
    what = f"The run goes on from step {step}"
    if left:
        what += (
            f", and leaves the newer checkpoints behind ({names(left)}): none of them is deleted, and later starts go "
            "on from what is written from now on"
        )
    return f"{what}. Leave checkpoint.load_step out from now on, or every start goes back again"


def make_room(folder: Path, step: int) -> str:
    """Before ``step`` is saved: move a finished checkpoint in its place aside; what to tell the user, or nothing."""
    path, said = checkpoint(folder, step), ""
    if is_finished(path):
        aside = folder / ABANDONED
        aside.mkdir(exist_ok=True)
        target, number = aside / path.name, 1
        while target.exists():
            number += 1
            target = aside / f"{path.name}.{number}"
        path.rename(target)
        said = f"An earlier checkpoint of step {step} stood in {path}, and is now {target}"
    branch = read_branch(folder)
    if step in branch.left:
        _write_branch(folder, Branch(branch.start, tuple(number for number in branch.left if number != step)))
    return said


def to_purge(folder: Path, *, keep: int, saving: int) -> list[Path]:
    """What ``checkpoint.keep_latest_k`` lets go while ``saving`` is written: all that is older than the newest
    ``keep`` of what was written since the run went back, if it ever did."""
    branch = read_branch(folder)
    ours = {step: whole for step, whole in steps_in(folder).items() if step > branch.start and step not in branch.left}
    counted = sorted(step for step, is_whole in ours.items() if is_whole or step == saving)
    if len(counted) <= keep:
        return []
    return [checkpoint(folder, step) for step in ours if step < counted[-keep]]


def names(steps: list[int]) -> str:
    """ "step-8, step-12", of many the first and the last."""
    shown = steps if len(steps) <= 4 else [*steps[:2], None, steps[-1]]
    return ", ".join("..." if step is None else f"step-{step}" for step in shown)
