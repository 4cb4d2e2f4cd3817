"""Fixes for torchtitan 0.2.2's CheckpointManager; each can be removed when torchtitan has it.

1. torchtitan matches only a part of a folder's name, so it purges a user's copy and loads a renamed checkpoint. Its
   newest checkpoint is the one with the highest step. After a run went back, the purge therefore deletes each new
   checkpoint, and the next start resumes from one that was left behind. Here the whole name must match, and
   checkpoint_folder.py keeps track of the branch.
2. torchtitan resumes from a folder without a finished checkpoint, such as a kill during the first save leaves, and
   skips ``initial_load_path``. Here ``initial_load_path`` is loaded then.
3. A purge that is killed leaves a checkpoint that looks finished. Here its ``.metadata`` is deleted first.
4. After a resume the checkpoint's optimizer and schedule settings replace those of the configuration, and the first
   step has the last learning rate of the old schedule. Fixed in resumed_schedule.py.
5. A full disk or an unreadable checkpoint ends in a traceback on each rank, because CheckpointException is not an
   Exception. Here it ends in one message.

Cost per save: a directory listing and a small file on rank 0, and a broadcast of a few bytes.
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
"""The state key of the ledger in a run without a teacher."""


class Checkpoints(CheckpointManager):
    """torchtitan's CheckpointManager with the fixes above."""

    folder: str
    weights_to_load: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    """Selects the weights that the run takes from ``initial_load_path``; set by the trainer. ValueError if they do not
    fit."""
    _saving = -1

    def load(self, step: int = -1) -> bool:
        """Load the checkpoint of ``step``, or the newest of the run's branch (-1); call it on all ranks."""
        if not self.enable:
            return super().load(step)
        settings = OptimizerSettings(self.states[OPTIMIZER], self.states[LR_SCHEDULER])
        folder = self.folder
        if not os.path.isdir(folder) or (step == -1 and self._find_load_step() == -1):
            self.folder = os.path.join(folder, "absent")  # torchtitan loads initial_load_path if it does not exist
        try:
            loaded = super().load(step)
        finally:
            self.folder = folder
        loaded_step = self.states[TRAIN_STATE].step if TRAIN_STATE in self.states else 0
        if loaded:
            settings.restore(step=loaded_step)
        if is_first_rank():
            self._log_start(loaded_step)
        return loaded

    def _log_start(self, step: int) -> None:
        unfinished = [
            number for number, is_whole in steps_in(Path(self.folder)).items() if number > step and not is_whole
        ]
        if unfinished:
            logger.warning(f"{self.folder}: {names(unfinished)} was never finished; the run does not resume from it")
        if not self.load_only and (message := go_back(Path(self.folder), step)):
            logger.warning(message)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save as torchtitan does, on all ranks; end the run with one message if the checkpoint cannot be written."""
        self._saving = curr_step
        try:
            if self._should_save(curr_step, last_step):
                message = on_first_rank(lambda: move_aside(Path(self.folder), curr_step))
                if message and is_first_rank():
                    logger.warning(message)
            super().save(curr_step, last_step)
        except CheckpointException as error:
            fail(ValueError(_unwritten(self.folder, curr_step, error)))

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load as torchtitan does; end the run with one message if the checkpoint cannot be read."""
        select = self.weights_to_load
        if select is not None and checkpoint_id == self.initial_load_path and self.initial_load_model_only:
            try:
                state_dict = select(checkpoint_id, state_dict)
            except ValueError as error:
                fail(error)
        if not from_hf:
            state_dict = with_stored_names(state_dict, checkpoint_id)
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf=from_hf, from_quantized=from_quantized)
        except CheckpointException as error:
            fail(
                ValueError(
                    f"the checkpoint {checkpoint_id} cannot be loaded: {first_failure(error)}. It is damaged, or from "
                    "another model or run: restore it, or give another one with checkpoint.load_step"
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
    """Loads a ledger that an earlier version saved inside the teacher's state."""

    def __init__(self, ledger: Any):
        self.ledger = ledger

    def state_dict(self) -> dict[str, Any]:
        return {LEDGER: self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state[LEDGER])


def with_stored_names(states: dict[str, Any], path: str) -> dict[str, Any]:
    """Rename ``states`` to the names that the checkpoint ``path``, which may be of an earlier version, uses."""
    former = {name: old for old, name in RENAMED.items()}
    if not states.keys() & {LEDGER, *former}:
        return states
    stored = read_metadata(path).state_dict_metadata
    systems = {name.partition(".")[0] for name in stored}
    states = {
        former[name] if name in former and name not in systems and former[name] in systems else name: state
        for name, state in states.items()
    }
    if LEDGER not in states or f"{LEDGER}.wall_seconds" in stored:
        return states
    without_ledger = {name: state for name, state in states.items() if name != LEDGER}
    if f"teacher.{LEDGER}.wall_seconds" not in stored:
        return without_ledger
    return without_ledger | {"teacher": TeacherLedger(states[LEDGER])}


def first_failure(error: CheckpointException) -> str:
    """The error of the first rank that failed, in one line."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    reason = str(cause).strip().partition("\n")[0]
    is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if is_full or "unexpected pos" in reason:  # the error of torch's archive writer on a full disk
        return f"the disk is full, or a quota is reached, on rank {rank} ({reason})"
    return f"{type(cause).__name__} on rank {rank}: {reason}"


def _unwritten(folder: str, step: int, error: CheckpointException) -> str:
    path, steps = checkpoint(Path(folder), step), [number for number, whole in steps_in(Path(folder)).items() if whole]
    nearest = next(parent for parent in (Path(folder), *Path(folder).absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    earlier = (
        f"Earlier checkpoints are complete, up to step-{max(steps)}" if steps else "There is no earlier checkpoint"
    )
    return (
        f"the checkpoint {path} could not be written: {first_failure(error)}. {free / 2**30:.2f} GiB are free there. "
        f"{earlier}. Free some space, lower checkpoint.keep_latest_k or choose another job.dump_folder, and give the "
        "same command again to resume"
    )


def apply() -> None:
    """Make torchtitan build this manager in every trainer from now on."""
    torchtitan.train.CheckpointManager = Checkpoints
