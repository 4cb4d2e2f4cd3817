"""Kill and resume with each way to save checkpoints: does the resumed run equal the uninterrupted one?

The real command (``torchrun -m titan_attent.train``), a tiny llama on text of the Python standard library. For each of
checkpoint.async_mode = disabled, async, async_with_pinned_mem a run is killed (SIGKILL) some steps after its first
checkpoint is complete, and started again. The ids of every step must equal those of an uninterrupted run. The losses
must agree to a relative 1e-5; they are equal to the last digit where the device's kernels are deterministic.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from devices import IS_GPU, num_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_attent.data.text.writer import write_dataset

pytestmark = pytest.mark.gpu
NUM_RANKS = num_ranks(at_most=2)
STEPS, SAVED, KILLED = 30, 10, 13
LOSS = "loss_metrics/global_avg_loss"
TIMEOUT = 240.0
CONFIG = """
[model]
name = "llama3_attent"
flavor = "bench"
[data]
path = "{data}"
[teacher]
strategy = "soft"
initial_ratio = 0.5
max_repeats = 1000
trace = true
[training]
local_batch_size = {local}
global_batch_size = 8
seq_len = 64
steps = {steps}
mixed_precision_param = "float32"
[lr_scheduler]
warmup_steps = 2
[metrics]
log_freq = 1
enable_tensorboard = true
[checkpoint]
enable = true
interval = {saved}
last_save_model_only = false
[activation_checkpoint]
mode = "none"
[debug]
seed = 0
deterministic = true
"""


def command(config: Path, dump: Path, mode: str) -> list[str]:
    """The command line of a run."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"),
        *("-m", "titan_attent.train", "--job.config_file", str(config), "--job.dump_folder", str(dump)),
        *("--checkpoint.async_mode", mode),
    ]


def trace_of(dump: Path) -> list[str]:
    """The lines of the trace, one per step."""
    path = dump / "teacher" / "trace.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def ids_of(dump: Path) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in trace_of(dump)]


def losses_of(dump: Path) -> dict[int, float]:
    losses: dict[int, float] = {}
    for folder in sorted({path.parent for path in (dump / "tb").rglob("events.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        losses |= {event.step: event.value for event in accumulator.Scalars(LOSS)}
    return losses


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and their descendants (Linux)."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended in the meantime
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    pids = [pid]
    for one in pids:  # grows during the loop
        pids += children.get(one, [])
    return pids[1:]


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running command; at the end it is killed with its workers if it still runs."""
    with open(log, "ab") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file)
    try:
        yield process
    finally:
        # torchrun's workers have their own sessions, and get another parent once it has ended.
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def run(arguments: list[str], log: Path) -> None:
    """Run to the end; AssertionError with the end of the output on failure."""
    with started(arguments, log) as process:
        assert process.wait(timeout=TIMEOUT) == 0, log.read_text(errors="replace")[-1500:]


def run_until_killed(arguments: list[str], log: Path, dump: Path) -> None:
    """Start, and SIGKILL all processes once a checkpoint is complete and step ``KILLED`` is done."""
    complete = dump / "checkpoint" / f"step-{SAVED}" / ".metadata"
    deadline = time.monotonic() + TIMEOUT
    with started(arguments, log) as process:
        while not (complete.exists() and len(trace_of(dump)) >= KILLED):
            late = process.poll() is not None or time.monotonic() > deadline
            assert not late, f"no checkpoint to kill after: {log.read_text(errors='replace')[-1500:]}"
            time.sleep(0.005)


@dataclass(frozen=True)
class Straight:
    """An uninterrupted run: its configuration and dump folder."""

    config: Path
    dump: Path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    write_dataset([Path(sysconfig.get_paths()["stdlib"]) / "json"], output=folder / "data", tokenizer="train:512")
    made = Straight(folder / "config.toml", folder / "run")
    values = {"data": folder / "data", "local": 8 // NUM_RANKS, "steps": STEPS, "saved": SAVED}
    made.config.write_text(CONFIG.format(**values))
    run(command(made.config, made.dump, "disabled"), folder / "log.txt")
    return made


@pytest.mark.parametrize("mode", ("disabled", "async", "async_with_pinned_mem"))
def test_a_killed_run_resumes_as_if_nobody_had_killed_it(mode: str, straight: Straight, tmp_path: Path) -> None:
    if mode == "async_with_pinned_mem" and not IS_GPU:
        pytest.skip("the command refuses it without an accelerator to copy from")
    dump, log = tmp_path / "run", tmp_path / "log.txt"
    run_until_killed(command(straight.config, dump, mode), log, dump)
    run(command(straight.config, dump, mode), log)
    expected, seen = ids_of(straight.dump), ids_of(dump)
    assert len(expected) == STEPS and seen == expected
    losses, resumed = losses_of(straight.dump), losses_of(dump)
    assert resumed.keys() == losses.keys() == set(range(1, STEPS + 1))
    assert [resumed[step] for step in losses] == pytest.approx(list(losses.values()), rel=1e-5)
