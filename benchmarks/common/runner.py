"""The runs of the convergence benchmark: commands started side by side, each measured when it has ended."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import titan_attent
from benchmarks.common.measure import ROOT, cpu_model, versions
from benchmarks.common.tasks import BATCH_SIZE, FORWARD_COST, Task, in_words_of_today
from benchmarks.corpora.stdlib_code import KINDS, KINDS_FILE, MANIFEST_FILE, Sizes
from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.toml import to_toml
from titan_attent.report import VALIDATION, read_run


def load_result(output: Path, task: Task) -> dict[str, Any] | None:
    """The task's result, None if it has not finished; ValueError if it was another task's."""
    path = output / task.folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    then, now = (
        {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}
        for config in (in_words_of_today(result["config"], task.config), task.config)
    )
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        was, would = ({key: config.get(key) for key in changed} for config in (then, now))
        raise ValueError(
            f"{path.parent} was measured with {was}, where {would} is asked for: name another --output, or remove this "
            "folder"
        )
    return result


@dataclass
class Running:
    task: Task
    process: subprocess.Popen[bytes]
    start: float


def run_tasks(output: Path, tasks: Sequence[Task], *, jobs: int) -> list[str]:
    """Run what has no result yet, ``jobs`` at a time; returns the folders of those that failed.

    When it is interrupted the commands end with it, and leave no result.
    """
    pending = [task for task in tasks if load_result(output, task) is None]
    running: list[Running] = []
    failed: list[str] = []
    begin, total = time.monotonic(), len(pending)
    if len(tasks) > total:
        print(f"{len(tasks) - total} of {len(tasks)} have finished before", flush=True)
    try:
        while pending or running:
            while pending and len(running) < jobs:
                running.append(start(output, pending.pop(0)))
            time.sleep(0.1)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                seconds = time.monotonic() - run.start
                problem = finish(output, run.task, code=run.process.returncode, seconds=seconds)
                if problem:
                    failed.append(run.task.folder)
                done = total - len(pending) - len(running)
                left = (time.monotonic() - begin) / done * (total - done) / 60
                text = problem or f"{seconds:.0f} s"
                print(f"[{done}/{total}] {run.task.folder}: {text}; about {left:.0f} min left", flush=True)
    finally:
        for run in running:
            run.process.terminate()  # torchrun ends its worker
        for run in running:
            run.process.wait()
    return failed


def start(output: Path, task: Task) -> Running:
    folder = output / task.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(task.config), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [*torchrun, "-m", task.module, *task.arguments, "--job.config_file", f"{task.folder}/config.toml"],
            cwd=output,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
    return Running(task, process, time.monotonic())


def finish(output: Path, task: Task, *, code: int, seconds: float) -> str:
    """Write the result of a command that has ended; returns what went wrong."""
    folder = output / task.folder
    if code != 0:
        return f"exit code {code}, see {folder / 'log.txt'}"
    try:
        result = measure(output, task) if task.module == "titan_attent.train" else {}
    except ValueError as error:
        return f"{error}, see {folder / 'log.txt'}"
    about = {
        "config": task.config,
        "process_seconds": seconds,
        "machine": machine(),
        "versions": {"titan_attent": titan_attent.__version__} | versions(),
    }
    write_atomically(folder / "result.json", (json.dumps(task.labels | result | about, indent=1) + "\n").encode())
    return ""


def measure(output: Path, task: Task) -> dict[str, Any]:
    """What a training run left behind, as numbers."""
    run = read_run(output / task.folder)
    validation = run.scalars.get(VALIDATION, {})
    if task.steps not in validation:
        raise ValueError(f"no validation loss of step {task.steps}")
    last = {
        tag: list(values.values())[-1] for tag, values in run.scalars.items() if tag.startswith(("teacher/", "ledger/"))
    }
    scored = round(last["ledger/examples_scored"])
    return {
        "final_validation_loss": validation[task.steps],
        "best_validation_loss": min(validation.values()),
        "validation_loss": validation,
        "steps": task.steps,
        "tokens": task.steps * BATCH_SIZE * Sizes().seq_len,
        "wall_seconds": run.wall_seconds,
        "scoring_seconds": last.get("ledger/score_seconds", 0.0),
        "examples_scored": scored,
        "step_equivalents": task.steps + FORWARD_COST * scored / BATCH_SIZE,
        "trained_kinds": trained_kinds(output, task),
        "last": last,
    }


def trained_kinds(output: Path, task: Task) -> dict[str, float]:
    """Shares of the kinds of rows in what was trained, after the first full pass where there was more than one."""
    data = output / task.config["data"]["path"]
    trace = output / task.folder / "teacher" / "trace.jsonl"
    if not ((data / KINDS_FILE).is_file() and trace.is_file()):
        return {}
    manifest, kinds = data.parent / MANIFEST_FILE, np.load(data / KINDS_FILE)
    names = json.loads(manifest.read_text(encoding="utf-8")).get("kinds", KINDS) if manifest.is_file() else KINDS
    steps = [json.loads(line)["ids"] for line in trace.read_text(encoding="utf-8").splitlines()]
    of_first_pass = len(kinds) // BATCH_SIZE
    ids = np.array(steps[of_first_pass if len(steps) > of_first_pass else 0 :], dtype=np.int64).ravel()
    counts = np.bincount(kinds[ids], minlength=len(names))
    return {name: count / len(ids) for name, count in zip(names, counts.tolist(), strict=True)}


def machine() -> str:
    name = f"{os.cpu_count()} x {cpu_model()}"
    return f"{torch.cuda.get_device_name()}, {name}" if torch.cuda.is_available() else name
