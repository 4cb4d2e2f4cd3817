"""The source's checkpoints on disk, the losses of its own training, and reading a checkpoint's files ahead.

Cost: the listing of a folder and one small file per checkpoint that is used; one pass over the source's TensorBoard
files for its training time, with "two_shot" another one for its losses. Reading ahead takes no memory of the process:
the pages stay in the system's cache.
"""

import hashlib
import os
import re
import threading
from pathlib import Path

from titan_attent.data.branch import read_branch
from titan_attent.data.run_record import read_run_record
from titan_attent.scores.targets import COMMAND, FACTS_FILE, PROGRESS_FILE, StoredTargets
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.schedule import Phase, phases_of

LOSS = "loss_metrics/global_avg_loss"
"""The tag of the source's loss, as torchtitan writes it."""
WALL = "ledger/wall_seconds"
"""The tag of the wall time of a run, in the ledger of titan_attent."""
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_BLOCK = 2**24
"""Bytes per read of a file that is read ahead."""


def checkpoint_of(config: DistillationConfig, step: int) -> Path:
    """The folder of the source's checkpoint of ``step``."""
    return Path(config.source) / f"step-{step}"


def targets_of(config: DistillationConfig, step: int) -> StoredTargets:
    """The targets on disk of the source's checkpoint of ``step``; ValueError."""
    return StoredTargets(Path(config.targets) / f"step-{step}")


def step_of(checkpoint: Path) -> int | None:
    """N of a folder step-N; None for another name."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def finished_steps(folder: Path, *, file: str = ".metadata") -> list[int]:
    """The steps of the folders step-N in ``folder`` that hold ``file``, ascending; ValueError if it is no folder."""
    if not folder.is_dir():
        raise ValueError("there is no such folder: check the path")
    found = [(step_of(entry), entry) for entry in folder.iterdir()]
    return sorted(step for step, entry in found if step is not None and (entry / file).is_file())


def phases_on_disk(config: DistillationConfig, *, steps: int) -> tuple[Phase, ...]:
    """The phases of a run of ``steps`` steps with the checkpoints or targets, and logs, that are there; ValueError.

    Checkpoints that the source's run left behind when it went back count only where "at" names them. Unfinished targets
    are refused unless "at" leaves them out.
    """
    key, file = ("targets", FACTS_FILE) if config.targets else ("source", ".metadata")
    folder = Path(getattr(config, key))
    try:
        found = finished_steps(folder, file=file)
        if config.targets and config.schedule != "at":
            _refuse_unfinished(folder, finished=found)
        left = read_branch(folder).left if config.schedule != "at" else ()
        if not (checkpoints := [step for step in found if step not in left]):
            what = "targets" if config.targets else "checkpoint"
            fix = _left_behind(found) if found else _folder_that_is_meant(folder, file=file)
            raise ValueError(f"it holds no finished {what} (a folder step-N with {file}): {fix}")
        losses = losses_of(Path(config.source).parent) if config.schedule == "two_shot" else {}
        return phases_of(config, steps=steps, checkpoints=checkpoints, losses=losses)
    except ValueError as error:
        raise ValueError(f"[distillation] {key} = {folder}: {error}") from None


def _refuse_unfinished(folder: Path, *, finished: list[int]) -> None:
    if unfinished := sorted(set(finished_steps(folder, file=PROGRESS_FILE)) - set(finished)):
        raise ValueError(
            f"the targets of step-{unfinished[0]} are unfinished: run {COMMAND} again, which resumes it, delete the "
            'folder, or name the others with schedule = "at"'
        )


def _left_behind(steps: list[int]) -> str:
    """What to do about a folder with none but ``steps``, which its run left behind."""
    named = ", ".join(f"step-{step}" for step in steps)
    return f'its run went back and left {named} behind: train the source on, or name them with schedule = "at"'


def _folder_that_is_meant(folder: Path, *, file: str) -> str:
    """What to do about a folder without step-N: it may be a step itself, or the folder of a run."""
    if (folder / file).is_file():
        return f"it is one itself, so name the folder above, {folder.parent}"
    near = sorted({path.parent.parent for path in folder.glob(f"*/step-*/{file}")})
    return f"give {near[0]}" if near else "check the path"


def metadata_hash(checkpoint: Path) -> str:
    """sha256 (hex) of ``.metadata``, which differs between any two saves."""
    return hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest()


def identity_of(config: DistillationConfig, *, steps: int) -> dict[str, str]:
    """Name -> what the checkpoint or the targets of every source are, whatever folder they are in."""
    identity = {}
    for step in sorted({phase.checkpoint for phase in phases_on_disk(config, steps=steps)}):
        if config.targets:
            facts = targets_of(config, step).facts
            found = f"{facts.checkpoint_sha256[:16]} {facts.kind} {facts.num} {facts.seed}"
        else:
            found = metadata_hash(checkpoint_of(config, step))[:16]
        identity[f"step-{step}"] = found
    return identity


def scalars_of(run: Path, tag: str) -> dict[int, float]:
    """Step -> value of ``tag`` in the TensorBoard files of the run in the folder ``run``; empty without any.

    A later session of the run replaces all steps from its first one on; of several ranks the lowest counts.
    """
    # It imports TensorBoard, which other schedules do not need.
    from titan_attent.foundations.event_files import begins_session, events

    tb, lowest, scalars = run / "tb", dict[str, Path](), dict[int, float]()
    for file in sorted(tb.rglob("events.out.tfevents.*")):
        if lowest.setdefault(file.relative_to(tb).parts[0], file.parent) != file.parent:
            continue
        start: int | None = None
        for event in events(file, []):
            if start is None and begins_session(event):
                start = event.step
                scalars = {step: value for step, value in scalars.items() if step < start}
            scalars.update((event.step, value.simple_value) for value in event.summary.value if value.tag == tag)
    return scalars


def losses_of(run: Path) -> dict[int, float]:
    """Step -> loss of the training of the run in the folder ``run``."""
    return scalars_of(run, LOSS)


def training_seconds(config: DistillationConfig, *, until: int) -> float:
    """Device-seconds that training the source took up to its checkpoint of step ``until``; 0 where nothing says so.

    ``source_seconds``, or the wall time in the ledger of the source's run times the devices that it recorded. A run of
    stock torchtitan has neither.
    """
    if config.source_seconds or not config.source:
        return config.source_seconds
    run = Path(config.source).parent
    devices = re.match(r"([1-9][0-9]*) x ", read_run_record(run).devices or "")
    if devices is None:
        return 0.0
    wall = [seconds for step, seconds in sorted(scalars_of(run, WALL).items()) if step <= until]
    return int(devices[1]) * wall[-1] if wall else 0.0


def read_ahead(checkpoint: Path) -> threading.Thread:
    """Read this process's share of a checkpoint's files, so that they are in this node's page cache when they are
    loaded. The processes of a node share the work by file. Errors are left to the load itself.
    """
    thread = threading.Thread(target=_read, args=(checkpoint,), name="titan_attent-read-ahead", daemon=True)
    thread.start()
    return thread


def _read(checkpoint: Path) -> None:
    rank, num_ranks = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    try:
        for path in sorted(checkpoint.glob("*.distcp"))[rank::num_ranks]:
            with open(path, "rb", buffering=0) as file:
                while file.read(_BLOCK):
                    pass
    except OSError:
        return
