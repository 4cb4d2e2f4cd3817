"""Nine kills of one run, in every phase, lose only the steps since the last checkpoint.

A hook in one worker ends it by SIGKILL at an event of the phase, from a given step on, so that the kill surely hits the
phase. The other workers are killed at once, as when a node dies. Some kills come from outside, at any moment.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from launch import TIMEOUT, finish, read_checkpoint, read_scalars, read_trace, run, start
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.train import Trainer

from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.teacher import Teacher

LOSS = "loss_metrics/global_avg_loss"
STEPS, INTERVAL = 39, 3
PHASES = ["step", "scoring", "selection", "data files", "metadata", "purge", "outside", "outside"]
SETTINGS = [
    *("--training.steps", str(STEPS), "--teacher.scoring", "forward", "--teacher.interval_schedule", "fixed"),
    *("--teacher.ratio_schedule", "constant", "--teacher.initial_ratio", "0.5"),
    *("--checkpoint.enable", "--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest_k", "2"),
]


def planned_kills(rng: random.Random) -> list[tuple[str, int]]:
    """(phase, first step in which the kill may happen), in the order of the run."""
    phases = rng.sample(PHASES, len(PHASES))
    phases.insert(len(phases) // 2, "load")  # there is a checkpoint by then
    # A round takes 5 steps, and the last 7 steps have no selection.
    return list(zip(phases, sorted(rng.sample(range(2, STEPS - 15), len(phases))), strict=True))


def kill_in(phase: str, *, rank: int, step: int, nth: int) -> None:
    """Prepares the worker ``rank`` to die at the nth event of ``phase`` from training step ``step`` on."""
    if os.environ["RANK"] != str(rank):
        return
    reached = num_events = 0
    deciding = False

    def event(*_: Any, **__: Any) -> None:
        nonlocal num_events
        if phase == "load" or reached >= step:
            num_events += 1
            if num_events == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, *, before: Callable[..., Any] | None = None, after: Any = None) -> None:
        stock = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = stock(*args, **kwargs)
            if after is not None:
                after(*args, **kwargs)
            return result

        setattr(owner, name, call)

    def step_starts(trainer: Trainer, _: Any) -> None:
        nonlocal reached
        reached = trainer.step

    def in_decision(value: bool, *_: Any, **__: Any) -> None:
        nonlocal deciding
        deciding = value

    def damage(path: str, **_: Any) -> None:
        for file in Path(path).glob("*.distcp"):
            file.unlink()
        event()

    wrap(Trainer, "train_step", before=step_starts)
    match phase:
        case "step":  # gradients are reduced; the other rank may be a weight update ahead
            wrap(OptimizersContainer, "step", before=event)
        case "scoring":
            wrap(LossBuffer, "record", after=lambda *_, trained=True, **__: trained or event())
        case "selection":
            wrap(Teacher, "next_pass", before=partial(in_decision, True), after=partial(in_decision, False))
            wrap(torch.distributed, "all_reduce", before=lambda *_, **__: deciding and event())
        case "data files":
            wrap(FileSystemWriter, "write_data", after=event)
        case "metadata":  # written to a temporary file, then renamed
            wrap(FileSystem, "rename", before=event)
        case "purge":  # the purged checkpoint has its metadata, but no longer its data
            wrap(shutil, "rmtree", before=damage)
        case "load":
            wrap(Teacher, "load_state_dict", before=event)


def kill_once(args: list[str], dump: Path, *, phase: str, step: int, rng: random.Random) -> str:
    """Start or resume the run until it is killed; return its output."""
    if phase == "outside":
        workers = start(*args)
    else:
        rank = 0 if phase in ("metadata", "purge") else rng.randrange(2)
        nth = rng.randint(1, 4) if phase in ("scoring", "selection") else 1
        workers = start(*args, prepare=partial(kill_in, phase, rank=rank, step=step, nth=nth))
    delay = rng.uniform(0, 0.2)
    deadline = time.monotonic() + TIMEOUT
    while workers.poll() is None:
        assert time.monotonic() < deadline, f"no {phase} from step {step} on"
        if phase == "outside" and last_traced(dump) >= step:
            time.sleep(delay)
            break
        time.sleep(0.002)
    workers.kill()
    output = (workers.output / "stdout").read_text() + (workers.output / "stderr").read_text()
    shutil.rmtree(workers.output)
    assert workers.killed, f"the run did not meet {phase} from step {step} on:\n{output}"
    return output


def last_traced(dump: Path) -> int:
    trace = dump / "teacher" / "trace.jsonl"
    lines = trace.read_text().split("\n")[:-1] if trace.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved_steps(dump: Path) -> dict[int, bool]:
    """step -> whether its checkpoint was finished."""
    folders = (dump / "checkpoint").glob("step-*")
    return {int(folder.name.removeprefix("step-")): (folder / ".metadata").exists() for folder in folders}


def read_rounds(dump: Path) -> list[dict[str, Any]]:
    """The decisions, without the ledger's times."""
    records = [json.loads(line) for line in (dump / "teacher" / "rounds.jsonl").read_text().splitlines()]
    kept = ("ledger/examples", "teacher/", "step", "pass", "num_steps")
    return [{key: value for key, value in record.items() if key.startswith(kept)} for record in records]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ; seconds are left out."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {*a, *b} if not str(key).endswith("seconds")]
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{path}.{key}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


def test_a_run_killed_nine_times_is_the_uninterrupted_run(small_run: list[str], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(*small_run, *SETTINGS, "--job.dump_folder", str(straight))
    args = [*small_run, *SETTINGS, "--job.dump_folder", str(killed)]

    rng = random.Random(0)
    kills = planned_kills(rng)
    assert len(kills) == 9
    saved = 0
    for phase, step in kills:
        output = kill_once(args, killed, phase=phase, step=step, rng=rng)
        starts = set(re.findall(r"Training starts at step (\d+)", output))
        # Only these two may come before a rank starts to train.
        assert starts == {str(saved + 1)} or (not starts and phase in ("load", "outside")), f"{phase}:\n{output}"
        traced, checkpoints = last_traced(killed), saved_steps(killed)
        saved = max((step for step, finished in checkpoints.items() if finished), default=0)
        assert traced - INTERVAL <= saved <= traced, "more is lost than the steps since the last checkpoint"
        if phase in ("data files", "metadata"):
            assert checkpoints[traced] is False, "the kill should leave a checkpoint half-written"

    result = finish(start(*args))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Training starts at step {saved + 1}" in result.stdout

    assert [line["step"] for line in read_trace(straight)] == list(range(1, STEPS + 1))
    assert read_trace(killed) == read_trace(straight)
    rounds = read_rounds(straight)
    assert len(rounds) > 5 and read_rounds(killed) == rounds
    losses = read_scalars(straight, LOSS)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert read_scalars(killed, LOSS) == losses
    assert not differences(read_checkpoint(killed, step=STEPS), read_checkpoint(straight, step=STEPS))
