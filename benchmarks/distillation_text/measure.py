"""Does a task of the text experiment in its process, and measures it."""

import re
from pathlib import Path
from typing import Any

from benchmarks.common.forks import command
from benchmarks.common.tasks import FORWARD_COST, Task
from benchmarks.distillation_text.data import CPP, PYTHON
from titan_attent.data.text.shards import TokenDataset
from titan_attent.report import read_run


def do(task: Task) -> dict[str, Any]:
    """Do one task, below the folder of all of them. Returns its numbers."""
    command(task)
    if task.module == "titan_attent.score":
        rows = len(TokenDataset(task.config["data"]["path"], seq_len=task.config["training"]["seq_len"]))
        return {"step_equivalents": FORWARD_COST * rows / task.config["training"]["local_batch_size"]}
    run = read_run(task.folder)
    curves = {name: run.scalars[f"validation_metrics/by_source/{name}"] for name in (PYTHON, CPP)}
    if task.steps not in curves[PYTHON]:
        raise ValueError(f"{task.folder}: no validation at step {task.steps}")
    log = re.sub(r"\x1b\[\d+m", "", Path(task.folder, "log.txt").read_text(encoding="utf-8", errors="replace"))
    (parameters,) = set(re.findall(r"size: ([\d,]+) total parameters", log))
    return {
        "steps": task.steps,
        "curves": curves,
        "parameters": int(parameters.replace(",", "")),
        "train_seconds": list(run.scalars["ledger/train_seconds"].values())[-1],
    }
