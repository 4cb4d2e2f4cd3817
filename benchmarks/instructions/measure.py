"""Does a task of the instruction experiment in its process, and measures it.

The token accuracy is that of teacher forcing: the share of the completions' tokens, eos included, to which the final
weights give the largest logit, each behind the true tokens before it. It is computed from the saved weights, whose
loss must be the one that the run has logged.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common.evaluate import evaluate, load_weights
from benchmarks.common.forks import command
from benchmarks.common.tasks import FORWARD_COST, Task
from titan_attent.report import VALIDATION, read_run


def do(task: Task) -> dict[str, Any]:
    """Do one task, below the folder of all of them. Returns its numbers."""
    command(task)
    if task.module == "titan_attent.score":
        scorers = json.loads(Path(task.arguments[-1], "scorers.json").read_text(encoding="utf-8"))
        return {"scorer_seconds": sum(scorers["seconds"].values()), "scorer_share": scorers["cost"]["share"]}
    return measure(task) if "rule" in task.labels else {}


def measure(task: Task) -> dict[str, Any]:
    """The numbers of a finished fine-tuning, from its files; its weights are removed."""
    scalars = read_run(task.folder).scalars
    validation = scalars.get(VALIDATION, {})
    if task.steps not in validation:
        raise ValueError(f"{task.folder}: no validation at step {task.steps}")
    tags = [tag for tag in scalars if tag.startswith(("teacher/", "ledger/"))]
    last = {tag: list(scalars[tag].values())[-1] for tag in tags}
    config = task.config
    weights = Path(task.folder, "checkpoint")
    accuracy, loss = evaluate(
        load_weights(weights / f"step-{task.steps}"),
        config["data"]["validation_path"],
        flavor=config["model"]["flavor"],
        seq_len=config["validation"]["seq_len"],
    )
    if not math.isclose(loss, validation[task.steps], rel_tol=1e-3):
        raise ValueError(f"{task.folder}: the saved weights have a loss of {loss}, not {validation[task.steps]}")
    shutil.rmtree(weights)
    scored = round(last.get("ledger/examples_scored", 0.0))
    rows = config["training"]["local_batch_size"]
    return {
        "steps": task.steps,
        "final_validation_loss": validation[task.steps],
        "token_accuracy": accuracy,
        "validation_loss": validation,
        "train_seconds": last["ledger/train_seconds"],
        "examples_scored": scored,
        # The scoring pass reads every pair in a row of its own, of the length of a window.
        "step_equivalents": task.steps + FORWARD_COST * scored / rows,
        "shuffled_trained": shuffled_trained(task),
        "last": last,
    }


def shuffled_trained(task: Task) -> float | None:
    """The share of pairs with a wrong completion among those trained in the last third of the steps; None without."""
    trace = Path(task.folder, "teacher", "trace.jsonl")
    data = Path(task.config["data"]["path"])
    if data.name != "shuffled" or not trace.is_file():
        return None
    wrong = set(json.loads((data.parent / "shuffled.json").read_text(encoding="utf-8")))
    lines = trace.read_text(encoding="utf-8").splitlines()
    ids = [number for line in lines[-(len(lines) // 3) :] for number in json.loads(line)["ids"]]
    return sum(number in wrong for number in ids) / len(ids)
