"""Mends for torchtitan 0.2.2's CheckpointManager, each with its reason; all go when torchtitan has them.

1. It finds checkpoints by a part of a folder's name, so that a user's copy is purged and a renamed one is loaded; and
   newest is who has the highest number, so that a run that went back loses each new checkpoint to the purge and goes on
   with those that it left. Here names match as a whole, and checkpoint_folder.py knows the branch.
2. A folder without a finished checkpoint, as a kill in the first save leaves it, is taken for one to resume from, and
   ``initial_load_path`` is skipped. Here it counts.
3. A purge that is killed leaves a checkpoint that looks finished. Its ``.metadata`` goes first here.
4. The optimizer's and the schedule's settings of the checkpoint stay in force over those of the configuration, and the
   rate of the first step is that which the old schedule ended with: resumed_schedule.py.
5. A disk that is full, and a checkpoint that cannot be read, end in a traceback of each rank (CheckpointException is no
   Exception). Here in one message.

Cost: a directory and a small file on rank 0, and a broadcast of a few bytes, at each save.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchtitan.train
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import LR_SCHEDULER, OPTIMIZER, TRAIN_STATE, CheckpointManager
from torchtitan.tools.logging import logger

from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.system_list import RENAMED
from titan_attent.titan.checkpoint_folder import checkpoint, go_back, latest, move_aside, names, steps_in, to_purge
from titan_attent.titan.checkpoint_metadata import read_metadata
from titan_attent.titan.resumed_schedule import OptimizerSettings
from titan_attent.titan.user_errors import fail, on_first_rank

LEDGER = "ledger"
"""The key of the ledger of a run that chooses no examples."""


class Checkpoints(CheckpointManager):
    """torchtitan's, mended."""

    folder: str
    weights_to_load: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    """Of the systems of a run: which weights it takes from ``initial_load_path``; ValueError if they do not fit."""
    _saving = -1

    def load(self, step: int = -1) -> bool:
        """As torchtitan's, on all ranks: the checkpoint of ``step``, or the newest of the run's branch (-1)."""
        if not self.enable:
            return super().load(step)
        settings = OptimizerSettings(self.states[OPTIMIZER], self.states[LR_SCHEDULER])
        folder = self.folder
        if not os.path.isdir(folder) or (step == -1 and self._find_load_step() == -1):
            self.folder = os.path.join(folder, "of_nothing_yet")  # torchtitan asks whether it exists
        try:
            loaded = super().load(step)
        finally:
            self.folder = folder
        now = self.states[TRAIN_STATE].step if TRAIN_STATE in self.states else 0
        if loaded:
            settings.restore(step=now)
        if is_first_rank():
            self._say_where_it_goes_on(now)
        return loaded

    def _say_where_it_goes_on(self, step: int) -> None:
        unfinished = [
            number for number, is_whole in steps_in(Path(self.folder)).items() if number > step and not is_whole
        ]
        if unfinished:
            logger.warning(f"{self.folder}: {names(unfinished)} was never finished, and is not resumed from")
        if not self.load_only and (said := go_back(Path(self.folder), step)):
            logger.warning(said)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """As torchtitan's, on all ranks; ends the run with one message if the checkpoint cannot be written."""
        self._saving = curr_step
        try:
            if self._should_save(curr_step, last_step):
                said = on_first_rank(lambda: move_aside(Path(self.folder), curr_step))
                if said and is_first_rank():
                    logger.warning(said)
            super().save(curr_step, last_step)
        except CheckpointException as error:
            fail(ValueError(_unwritten(self.folder, curr_step, error)))

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As torchtitan's; ends the run with one message if the checkpoint cannot be read."""
        choose = self.weights_to_load
        if choose is not None and checkpoint_id == self.initial_load_path and self.initial_load_model_only:
            try:
                state_dict = choose(checkpoint_id, state_dict)
            except ValueError as error:
                fail(error)
        if not from_hf:
            state_dict = with_stored_names(state_dict, checkpoint_id)
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf=from_hf, from_quantized=from_quantized)
        except CheckpointException as error:
            fail(
                ValueError(
                    f"the checkpoint {checkpoint_id} cannot be loaded: {first_failure(error)}. It is damaged, or of "
                    "another model or run: restore it, or give another with checkpoint.load_step"
                )
            )

    def _find_load_step(self, folder: str = "") -> int:
        step = latest(Path(folder or self.folder))
        return -1 if step is None else step

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k < 1 or not is_first_rank():
            return
        for path in to_purge(Path(self.folder), keep=self.keep_latest_k, saving=self._saving):
            (path / ".metadata").unlink(missing_ok=True)
            self.purge_queue.put(str(path))


class TeacherLedger:
    """The ledger as earlier versions kept that of every run: beside the state of a teacher."""

    def __init__(self, ledger: Any):
        self.ledger = ledger

    def state_dict(self) -> dict[str, Any]:
        return {LEDGER: self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state[LEDGER])


def with_stored_names(states: dict[str, Any], path: str) -> dict[str, Any]:
    """``states`` under the names that the checkpoint ``path``, perhaps of an earlier version, has them by."""
    former = {name: old for old, name in RENAMED.items()}
    if not states.keys() & {LEDGER, *former}:
        return states
    there = read_metadata(path).state_dict_metadata
    systems = {name.partition(".")[0] for name in there}
    states = {
        former[name] if name in former and name not in systems and former[name] in systems else name: state
        for name, state in states.items()
    }
    if LEDGER not in states or f"{LEDGER}.wall_seconds" in there:
        return states
    others = {name: state for name, state in states.items() if name != LEDGER}
    if f"teacher.{LEDGER}.wall_seconds" not in there:
        return others
    return others | {"teacher": TeacherLedger(states[LEDGER])}


def first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    what = str(cause).strip().partition("\n")[0]
    if "unexpected pos" in what:  # what torch's writer of archives says then
        return f"the disk took no more on rank {rank} ({what})"
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk took no more on rank {rank} ({what})"
    return f"{type(cause).__name__} on rank {rank}: {what}"


def _unwritten(folder: str, step: int, error: CheckpointException) -> str:
    path, steps = checkpoint(Path(folder), step), [number for number, whole in steps_in(Path(folder)).items() if whole]
    nearest = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    before = f"What was saved before is whole, up to step-{max(steps)}" if steps else "Nothing was saved before"
    return (
        f"the checkpoint {path} could not be written: {first_failure(error)}. {free / 2**30:.2f} GiB are free there. "
        f"{before}. Free some space, lower checkpoint.keep_latest_k or choose another job.dump_folder, and give the "
        "same command again to resume"
    )


def mend() -> None:
    """Put it in force for trainers that are made from now on."""
    torchtitan.train.CheckpointManager = Checkpoints
