"""Which checkpoints a folder holds, and which of them a run resumes from.

A checkpoint is a folder named exactly ``step-N``. It is finished once its last file exists: ``.metadata``, or the
weights that ``checkpoint.last_save_in_hf`` writes. Folders with other names (``step-4-good``, ``step-10.tmp``) belong
to the user: they are never loaded and never deleted.

A run that went back to step N (``checkpoint.load_step``) leaves checkpoints with higher numbers behind. ``branch.json``
beside them lists these: later starts resume from newer checkpoints of the run, and only those are purged. When a step
is saved again, its earlier checkpoint is moved to ``abandoned/``.

Cost: one directory listing and a small file.
"""

import re
from pathlib import Path

from titan_attent.data.branch import Branch, read_branch, write_branch

ABANDONED = "abandoned"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


def checkpoint(folder: Path, step: int) -> Path:
    """The path of a step's checkpoint."""
    return folder / f"step-{step}"


def is_safetensors(path: Path) -> bool:
    """Whether a folder holds weights in safetensors format, from ``last_save_in_hf`` or downloaded."""
    return next(path.glob("*.safetensors"), None) is not None or (path / "model.safetensors.index.json").is_file()


def is_finished(path: Path) -> bool:
    """Whether a checkpoint was written completely."""
    return (path / ".metadata").is_file() or is_safetensors(path)


def steps_in(folder: Path) -> dict[int, bool]:
    """step -> whether its checkpoint is finished; empty if the folder does not exist."""
    if not folder.is_dir():
        return {}
    steps = [int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()]
    return {step: is_finished(checkpoint(folder, step)) for step in sorted(steps)}


def latest(folder: Path) -> int | None:
    """The newest finished step of the run's current branch; ValueError if only steps left behind exist."""
    finished = [step for step, is_whole in steps_in(folder).items() if is_whole]
    branch = read_branch(folder)
    candidates = [step for step in finished if step not in branch.left]
    if finished and not candidates:
        raise ValueError(
            f"{folder} holds only checkpoints that the run left behind when it went back to step {branch.start} "
            f"({names(finished)}): give the one to resume from, such as --checkpoint.load_step {max(finished)}"
        )
    return max(candidates, default=None)


def go_back(folder: Path, step: int) -> str:
    """Record in ``branch.json`` that the run resumes from ``step``.

    Returns:
        A message to log; empty if ``step`` is the run's newest checkpoint.
    """
    branch, steps = read_branch(folder), steps_in(folder)
    newer = [number for number, is_whole in steps.items() if number > step and is_whole and number not in branch.left]
    if not newer and step not in branch.left:
        return ""
    left = [number for number in steps if number > step]
    write_branch(folder, Branch(step, tuple(left)))
    message = f"The run resumes from step {step}"
    if left:
        message += (
            f", and leaves the newer checkpoints behind ({names(left)}): none of them is deleted, and later starts "
            "resume from checkpoints written from now on"
        )
    return f"{message}. Remove checkpoint.load_step before the next start, or every start goes back again"


def move_aside(folder: Path, step: int) -> str:
    """Before ``step`` is saved, move an earlier finished checkpoint of that step to ``abandoned/``.

    Returns:
        A message to log; empty if there was no such checkpoint.
    """
    path, message = checkpoint(folder, step), ""
    if is_finished(path):
        aside = folder / ABANDONED
        aside.mkdir(exist_ok=True)
        target, number = aside / path.name, 1
        while target.exists():
            number += 1
            target = aside / f"{path.name}.{number}"
        path.rename(target)
        message = f"An earlier checkpoint of step {step} was in {path}; it was moved to {target}"
    branch = read_branch(folder)
    if step in branch.left:
        write_branch(folder, Branch(branch.start, tuple(number for number in branch.left if number != step)))
    return message


def to_purge(folder: Path, *, keep: int, saving: int) -> list[Path]:
    """The checkpoints that ``checkpoint.keep_latest_k`` deletes while step ``saving`` is written.

    They are all but the newest ``keep`` of the current branch. Of a run that went back, only checkpoints written since
    then count.
    """
    branch = read_branch(folder)
    on_branch = {
        step: is_whole for step, is_whole in steps_in(folder).items() if step > branch.start and step not in branch.left
    }
    counted = sorted(step for step, is_whole in on_branch.items() if is_whole or step == saving)
    if len(counted) <= keep:
        return []
    return [checkpoint(folder, step) for step in on_branch if step < counted[-keep]]


def names(steps: list[int]) -> str:
    """The steps as text, such as "step-8, step-12"; of more than four the first two and the last."""
    shown = steps if len(steps) <= 4 else [*steps[:2], None, steps[-1]]
    return ", ".join("..." if step is None else f"step-{step}" for step in shown)
