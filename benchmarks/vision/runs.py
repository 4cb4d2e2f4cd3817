"""The runs of the vision experiment: the product's own commands (common/forks.py), and their numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common.forks import command
from benchmarks.common.runner import RESULT_FILE
from benchmarks.common.tasks import FORWARD_COST, Task
from benchmarks.vision.data import write_condition
from benchmarks.vision.rules import BATCH_SIZE
from titan_attent.data.images import ImageDataset
from titan_attent.models.vision.config import VisionConfig
from titan_attent.report import read_run
from titan_attent.report.runs import ACCURACY, VALIDATION


def do(run: Task) -> dict[str, Any]:
    """Do one task: write images, score or train. Returns its numbers."""
    if run.module == "data":
        return write_condition(Path(), run.folder, run.config["data"])
    command(run)
    return measure(run) if run.module == "titan_attent.train" else {}


def measure(run: Task) -> dict[str, Any]:
    """The numbers of a finished training run, from its files; ValueError without its last validation."""
    scalars = read_run(run.folder).scalars
    accuracy, loss = scalars.get(ACCURACY, {}), scalars.get(VALIDATION, {})
    if run.steps not in accuracy:
        raise ValueError(f"{run.folder}: no validation at step {run.steps}")
    tags = [tag for tag in scalars if tag.startswith(("teacher/", "ledger/"))]
    last = {tag: list(scalars[tag].values())[-1] for tag in tags}
    scored = round(last.get("ledger/examples_scored", 0.0))
    batch_size = run.config["training"]["local_batch_size"]
    return {
        "steps": run.steps,
        "final_accuracy": accuracy[run.steps],
        "accuracy": accuracy,
        "validation_loss": loss,
        "train_seconds": last.get("ledger/train_seconds"),
        "teaching_seconds": sum(last.get(f"ledger/{account}_seconds", 0.0) for account in ("score", "select")),
        "images_trained": run.steps * batch_size,
        "images_scored": scored,
        "step_equivalents": run.steps + FORWARD_COST * scored / batch_size,
        "dirt_trained": dirt_trained(run),
        "class_accuracy": class_accuracy(run) if run.labels["condition"] == "long_tail" else [],
        "class_counts": data_result(run).get("class_counts", []),
        "data_fingerprint": data_result(run).get("fingerprint", ""),
        "last": last,
    }


def data_result(run: Task) -> dict[str, Any]:
    """The result of the data task for a run's images; empty where the images belong to the set itself."""
    path = Path(run.config["data"]["path"]).parent / RESULT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def dirt_trained(run: Task) -> float | None:
    """The share of dirty rows among those trained after the first pass; None without dirty rows or later steps."""
    data, trace = data_result(run), Path(run.folder, "teacher", "trace.jsonl")
    if not data.get("dirty") or not trace.is_file():
        return None
    steps = [json.loads(line)["ids"] for line in trace.read_text(encoding="utf-8").splitlines()]
    ids = np.array(steps[data["rows"] // BATCH_SIZE :], dtype=np.int64).ravel()
    return float(np.isin(ids, data["dirty"]).mean()) if len(ids) else None


def class_accuracy(run: Task) -> list[float]:
    """The accuracy of the final weights on each class of the test images. Removes the checkpoint."""
    from torch.distributed.checkpoint import load

    from titan_attent.titan.models.vision import CLASSIFIER, MODELS, args_of

    sections: Any = SimpleNamespace(
        model=SimpleNamespace(**run.config["model"]),
        data=SimpleNamespace(**run.config["data"]),
        vision=VisionConfig(**run.config["vision"]),
    )
    model = MODELS[CLASSIFIER](args_of(sections))
    load(model.state_dict(), checkpoint_id=f"{run.folder}/checkpoint/step-{run.steps}")
    train, test = (ImageDataset(run.config["data"][key]) for key in ("path", "validation_path"))
    pixels, labels = test.normalized_as(train).pixels(torch.arange(len(test)), None)
    with torch.no_grad():
        right = torch.cat([model.eval()(part)[:, 0].argmax(-1) for part in pixels.split(256)]) == labels
    shutil.rmtree(Path(run.folder, "checkpoint"))
    return [float(right[labels == number].double().mean()) for number in range(len(test.classes))]
