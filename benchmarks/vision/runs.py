"""The runs of the vision experiment: the product's own commands, in processes forked from one that has imported them.

Importing torch and torchtitan takes ten seconds of a core, a run on digits five. So one process imports them, and each
run is a fork of it: a world of one rank, with one thread on the CPU. Its output is in its ``log.txt``.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common.measure import ROOT
from benchmarks.common.runner import RESULT_FILE, write_result
from benchmarks.common.tasks import FORWARD_COST, Task
from benchmarks.vision.data import write_condition
from benchmarks.vision.rules import BATCH_SIZE
from titan_attent.data.images import ImageDataset
from titan_attent.models.vision.config import VisionConfig
from titan_attent.report import read_run
from titan_attent.report.runs import ACCURACY, VALIDATION

PRELOADED = [
    "benchmarks.vision.runs",
    "titan_attent.titan.patches.compat",
    "torch.distributed.checkpoint",
    "torchtitan.train",
    "titan_attent.titan.launch",
    "titan_attent.titan.scoring.checkpoint",
]


def hide_gpus() -> None:
    """Make this process and its children run on one CPU thread. Call it before anything initializes a GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@dataclass
class Forked:
    """A process with the methods of a ``subprocess.Popen``."""

    process: BaseProcess

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        self.process.join()


class Forks:
    """Starts a task as a fork, which writes its own result. ``about`` is part of every result."""

    def __init__(self, about: dict[str, Any]):
        self.about = about
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, output: Path, task: Task) -> Forked:
        process = self._context.Process(target=work, args=(output, task, self.about), daemon=True)
        process.start()
        return Forked(process)

    def finish(self, output: Path, task: Task, *, seconds: float) -> None:
        raise ValueError("ended without a result")


# -- in a process of its own ------------------------------------------------------------------------------------------


def work(output: Path, run: Task, about: dict[str, Any]) -> None:
    """Do one task and write its result.json."""
    begin = time.monotonic()
    log = os.open(output / run.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.chdir(output)
    torch.set_num_threads(1)
    if run.module == "data":
        result = write_condition(Path(), run.folder, run.config["data"])
    else:
        command(run)
        result = measure(run) if run.module == "titan_attent.train" else {}
    write_result(Path(), run, result, seconds=time.monotonic() - begin, about=about)


def command(run: Task) -> None:
    """Run the product's command, as torchrun would start it."""
    import torchtitan.train

    from titan_attent.titan.launch import train
    from titan_attent.titan.scoring.command import score

    # torchtitan ends with two seconds of sleep "for other ranks to complete", of which there are none.
    torchtitan.train.time = SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None}))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}
    sys.argv = [run.module, *run.arguments, "--job.config_file", f"{run.folder}/config.toml"]
    {"titan_attent.train": train, "titan_attent.score": score}[run.module]()


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
