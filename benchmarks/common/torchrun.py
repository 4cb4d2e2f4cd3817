"""Runs on text: commands of torchrun with one process each, measured from the files that they write."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measure import ROOT
from benchmarks.common.runner import about_here, write_result
from benchmarks.common.tasks import BATCH_SIZE, FORWARD_COST, Task
from benchmarks.corpora.stdlib_code import KINDS, KINDS_FILE, MANIFEST_FILE, Sizes
from titan_attent.report import VALIDATION, read_run


class Torchrun:
    """Starts a task as ``torchrun -m module`` with one thread; torchrun ends its worker when it is terminated."""

    def start(self, output: Path, task: Task) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        with open(output / task.folder / "log.txt", "wb") as log:
            return subprocess.Popen(
                [*torchrun, "-m", task.module, *task.arguments, "--job.config_file", f"{task.folder}/config.toml"],
                cwd=output,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            )

    def finish(self, output: Path, task: Task, *, seconds: float) -> None:
        numbers = measure(output, task) if task.module == "titan_attent.train" else {}
        write_result(output, task, numbers, seconds=seconds, about=about_here())


def measure(output: Path, task: Task) -> dict[str, Any]:
    """The numbers of a finished training run, from its files."""
    run = read_run(output / task.folder)
    validation = run.scalars.get(VALIDATION, {})
    if task.steps not in validation:
        raise ValueError(f"no validation loss at step {task.steps}")
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
    """Share of each kind among the trained rows, without the first full pass if there was more than one."""
    data = output / task.config["data"]["path"]
    trace = output / task.folder / "teacher" / "trace.jsonl"
    if not ((data / KINDS_FILE).is_file() and trace.is_file()):
        return {}
    manifest, kinds = data.parent / MANIFEST_FILE, np.load(data / KINDS_FILE)
    names = json.loads(manifest.read_text(encoding="utf-8")).get("kinds", KINDS) if manifest.is_file() else KINDS
    steps = [json.loads(line)["ids"] for line in trace.read_text(encoding="utf-8").splitlines()]
    steps_of_first_pass = len(kinds) // BATCH_SIZE
    ids = np.array(steps[steps_of_first_pass if len(steps) > steps_of_first_pass else 0 :], dtype=np.int64).ravel()
    counts = np.bincount(kinds[ids], minlength=len(names))
    return {name: count / len(ids) for name, count in zip(names, counts.tolist(), strict=True)}
