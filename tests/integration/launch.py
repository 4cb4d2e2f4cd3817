"""Run the real command as a user would, and read what it leaves behind."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from workers import OUTPUTS, Workers

TIMEOUT = 240.0
"""Seconds that a launch may take, on a machine that does much else."""

SMALLEST = "scorer_xs"
"""One layer of width 32: what these tests compare does not grow with the model, and their time does."""
CONFIG = """
[job]
dump_folder = "{dump}"
[model]
name = "llama3_attent"
flavor = "{flavor}"
[data]
path = "{train}"
validation_path = "{validation}"
num_workers = 1
[teacher]
strategy = "soft"
importance = "loss"
ratio_schedule = "incremental"
final_ratio = 0.8
interval_schedule = "incremental"
initial_ratio = 0.3
trace = true
[training]
local_batch_size = 4
global_batch_size = 8
seq_len = 256
steps = 20
mixed_precision_param = "float32"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 2
[metrics]
log_freq = 1
enable_tensorboard = true
[validation]
enable = false
seq_len = 256
[checkpoint]
last_save_model_only = false
[activation_checkpoint]
mode = "none"
[debug]
seed = 0
"""


def write_config(folder: Path, *, data: dict[str, Path], dump: Path, flavor: str = SMALLEST) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(dump=dump, train=data["train"], validation=data["validation"], flavor=flavor))
    return path


def environment(**extra: str) -> dict[str, str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


def forked_stages(run_stage: Callable[..., None] | None = None) -> Callable[[], None]:
    """A ``prepare``: the stages of ``titan_attent.score pair`` are forked from the server of the workers.

    By default each worker starts a server of its own for them, which imports for five seconds. ``run_stage`` replaces
    what runs a stage (titan/scoring/subcommands.py).
    """
    multiprocessing.forkserver.ensure_running()
    state = vars(multiprocessing.forkserver._forkserver)
    server = {name: state[name] for name in ("_forkserver_address", "_forkserver_authkey") if name in state}
    return partial(_fork_stages, server, run_stage)


def _fork_stages(server: dict[str, Any], run_stage: Callable[..., None] | None) -> None:
    from titan_attent.titan.scoring import subcommands  # a test process imports torchtitan in an order of its own

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    vars(multiprocessing.forkserver._forkserver).update(server, ensure_running=lambda: None)
    subcommands._run = run_stage or subcommands._run


def start(
    *args: str,
    num_processes: int = 2,
    module: str = "titan_attent.train",
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> Workers:
    """The command in the background, on forked workers; ``prepare`` runs in each of them first."""
    output = Path(tempfile.mkdtemp(prefix="launch"))
    variables = environment(**env)
    return Workers(
        module, list(args), num_processes=num_processes, environment=variables, output=output, prepare=prepare
    )


def launch(
    *args: str,
    num_processes: int = 2,
    module: str = "titan_attent.train",
    launcher: Literal["fork", "torchrun"] = "fork",
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The command until its end.

    ``launcher="torchrun"`` is what a user types, and 7 seconds slower than forked workers (workers.py): for tests of
    what torchrun decides, such as the exit code, and of the command as a whole.
    """
    if launcher == "torchrun":
        command = torchrun(*args, num_processes=num_processes, module=module)
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(**env))
    workers = start(*args, num_processes=num_processes, module=module, prepare=prepare, **env)
    return finish(workers)


def finish(workers: Workers) -> subprocess.CompletedProcess[str]:
    """Wait for workers; their return code and output."""
    code = workers.wait(TIMEOUT)
    stdout, stderr = ((workers.output / name).read_text() for name in OUTPUTS)
    shutil.rmtree(workers.output)
    return subprocess.CompletedProcess(workers.module, code, stdout, stderr)


def torchrun(*args: str, num_processes: int, module: str) -> list[str]:
    # An own rendezvous at a port that the system picks: tests that run side by side need no free port.
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", f"--rdzv_id={uuid.uuid4()}"),
        *("-m", module, *args),
    ]


def run(
    *args: str,
    num_processes: int = 2,
    module: str = "titan_attent.train",
    launcher: Literal["fork", "torchrun"] = "fork",
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> str:
    """The command's output; an AssertionError with it when the command fails."""
    result = launch(*args, num_processes=num_processes, module=module, launcher=launcher, prepare=prepare, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def kill_when(reached: Callable[[], bool], workers: Workers) -> None:
    """SIGKILL all ranks as soon as ``reached()``."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while not reached():
            assert workers.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run did not get there in time"
            time.sleep(0.002)
    finally:
        workers.kill()
        shutil.rmtree(workers.output)


def run_until_killed(*args: str, trace: Path, step: int, num_processes: int = 2) -> None:
    """Start the command and SIGKILL all its processes once ``step`` has been traced and the next is under way."""
    kill_when(
        lambda: trace.exists() and trace.read_text().count("\n") >= step, start(*args, num_processes=num_processes)
    )


def read_checkpoint(dump: Path, *, step: int) -> dict[str, Any]:
    """A checkpoint gathered to full tensors: the model's weights by name, the other states as dictionaries."""
    target = dump / "checkpoint.pt"
    dcp_to_torch_save(dump / "checkpoint" / f"step-{step}", target)
    return torch.load(target, weights_only=False)


def read_weights(dump: Path, *, step: int) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint."""
    return {k: v for k, v in read_checkpoint(dump, step=step).items() if isinstance(v, torch.Tensor)}


def read_trace(dump: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dump / "teacher" / "trace.jsonl").read_text().splitlines()]


def read_scalars(dump: Path, tag: str) -> dict[int, float]:
    """step -> value over all event files of a run, as TensorBoard shows them."""
    scalars: dict[int, float] = {}
    for folder in sorted({path.parent for path in (dump / "tb").rglob("events.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        if tag in accumulator.Tags()["scalars"]:
            scalars |= {event.step: event.value for event in accumulator.Scalars(tag)}
    return scalars


def read_tags(folder: Path) -> dict[str, list[str]]:
    """Kind ("scalars", "tensors") -> tags of the event files in ``folder``."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Tags()
