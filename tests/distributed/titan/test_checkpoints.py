"""The patched checkpoint manager on two ranks: going back, killed first saves, full disks."""

import io
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.job_config import Checkpoint, LRScheduler

from titan_attent.titan import user_errors
from titan_attent.titan.checkpoint_folder import latest, read_branch, steps_in
from titan_attent.titan.patches.checkpoint_manager import Checkpoints


class TrainState:
    """The step, as torchtitan's Trainer saves it."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Run:
    """A weight, sharded over the ranks; each step adds one to it."""

    def __init__(self, mesh: DeviceMesh, folder: str, *, size: int = 4, **config: Any):
        self.model = nn.Module()
        self.model.weight = nn.Parameter(distribute_tensor(torch.zeros(2, size), mesh, [Shard(0)]))
        optimizers = OptimizersContainer([self.model], torch.optim.AdamW, {"lr": 0.1})
        self.state = TrainState()
        settings = {"enable": True, "interval": 2, "keep_latest_k": 2, "last_save_model_only": False}
        self.manager = Checkpoints(
            dataloader=SimpleNamespace(state_dict=lambda: {"at": 0}, load_state_dict=lambda _: None),  # type: ignore[arg-type]
            model_parts=[self.model],
            optimizers=optimizers,
            lr_schedulers=build_lr_schedulers(optimizers, LRScheduler(warmup_steps=1), 100),
            states={"train_state": self.state},
            checkpoint_config=Checkpoint(**settings | config),
            sd_adapter=None,
            base_folder=folder,
        )

    @property
    def value(self) -> float:
        return float(self.model.weight.to_local().flatten()[0])

    def train(self, *, until: int, load_step: int = -1) -> int:
        """Load, train and save; return the step that it started from."""
        self.manager.load(load_step)
        start = self.state.step
        for step in range(start + 1, until + 1):
            self.state.step = step
            with torch.no_grad():
                self.model.weight.add_(1)
            self.manager.save(step, last_step=step == until)
        self.manager.close()
        return start


def going_back(mesh: DeviceMesh, folder: str) -> list[Any]:
    place = Path(folder) / "checkpoint"
    Run(mesh, folder, keep_latest_k=0).train(until=9)
    seen: list[Any] = [list(steps_in(place))]
    back = Run(mesh, folder)
    seen.append((back.train(until=7, load_step=4), back.value, list(steps_in(place)), read_branch(place).left))
    again = Run(mesh, folder)
    seen.append((again.train(until=8), again.value, list(steps_in(place)), read_branch(place).left))
    last = Run(mesh, folder)
    seen.append((last.train(until=8), last.value))
    return seen


def test_a_run_that_goes_back_keeps_what_it_writes(tmp_path: Path) -> None:
    for seen in run_on_ranks(going_back, 2, str(tmp_path)):
        assert seen[0] == [2, 4, 6, 8, 9]
        # From 4 it writes 6 and 7; the old step 6 is moved aside, and 8 and 9 stay as they are.
        assert seen[1] == (4, 7.0, [2, 4, 6, 7, 8, 9], (8, 9))
        assert seen[2] == (7, 8.0, [2, 4, 6, 7, 8, 9], (9,))
        assert seen[3] == (8, 8.0)
    aside = tmp_path / "checkpoint" / "abandoned"
    assert sorted(path.name for path in aside.glob("*/.metadata")) == [".metadata"] * 2
    assert {path.name for path in aside.iterdir()} == {"step-6", "step-8"}


def starting_from_another(mesh: DeviceMesh, folder: str, first: str) -> tuple[int, float]:
    Path(folder, "checkpoint", "step-4").mkdir(parents=True, exist_ok=True)  # as a kill in the first save leaves it
    run = Run(mesh, folder, initial_load_path=f"{first}/checkpoint/step-4")
    run.manager.load()
    return run.state.step, run.value


def test_a_folder_without_a_finished_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_on_ranks(going_back, 2, first)
    assert run_on_ranks(starting_from_another, 2, second, first) == [(0, 4.0)] * 2


def listening(mesh: DeviceMesh) -> io.StringIO:
    """Capture the standard error of this rank from here on, and let it print its mistakes."""
    user_errors.wait_for_first_rank = lambda: None
    os.environ["LOCAL_RANK"] = str(mesh.get_rank())
    sys.stderr = io.StringIO()
    return sys.stderr


def on_a_full_disk(mesh: DeviceMesh, folder: str, async_mode: str) -> tuple[int | str | None, bool, str]:
    said = listening(mesh)
    run = Run(mesh, folder, size=20_000, async_mode=async_mode)
    run.manager.load()
    for step in (1, 2):
        run.state.step = step
        run.manager.save(step)
    run.manager.maybe_wait_for_staging()
    run.manager._async_wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # No file of this process may grow beyond this size: each rank gets the error of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    try:
        for step in (4, 5, 6):
            run.state.step = step
            run.manager.save(step, last_step=step == 6)
    except SystemExit as end:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        again = Run(mesh, folder, size=20_000, async_mode=async_mode)
        return end.code, again.train(until=3) == 2, said.getvalue()
    return None, False, ""


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_checkpoint_that_does_not_fit(tmp_path: Path, async_mode: str) -> None:
    first, second = run_on_ranks(on_a_full_disk, 2, str(tmp_path), async_mode)
    assert first[:2] == second[:2] == (2, True), "both end, and the earlier checkpoint is resumed from"
    assert first[2].count("titan_attent: error: the checkpoint ") == 1 and "titan_attent: error" not in second[2]
    assert "could not be written: the disk is full" in first[2] and "Traceback" not in first[2] + second[2]
    assert "GiB are free" in first[2] and "complete, up to step-2" in first[2]
    assert latest(tmp_path / "checkpoint") == 3


def of_another_size(mesh: DeviceMesh, folder: str) -> Any:
    said = listening(mesh)
    try:
        Run(mesh, folder, size=5).manager.load()
    except SystemExit as end:
        return end.code, said.getvalue()
    return None


def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    run_on_ranks(going_back, 2, str(tmp_path))
    (code, text), (other, nothing) = run_on_ranks(of_another_size, 2, str(tmp_path))
    assert code == other == 2 and "titan_attent: error" not in nothing
    assert text.count("titan_attent: error: the checkpoint ") == 1 and "Traceback" not in text
    assert "step-8 cannot be loaded: " in text and "checkpoint.load_step" in text
