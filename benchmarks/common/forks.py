"""Starts tasks as forks of a process that has imported the product: a world of one rank, with one thread on the CPU.

Importing torch and torchtitan takes ten seconds of a core, a small run as long. So one process imports them, and each
task is a fork of it. Its output is in its ``log.txt``.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common.measure import ROOT
from benchmarks.common.runner import write_result
from benchmarks.common.tasks import Task

PRELOADED = [
    "benchmarks.common.forks",
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
    """Starts a task as a fork, which writes its own result.

    Args:
        about: part of every result.
        do: does a task in its process, below the folder of all of them, and returns its numbers. A function of a
            module, which the first process imports, too.
    """

    def __init__(self, about: dict[str, Any], do: Callable[[Task], dict[str, Any]]):
        self.about, self.do = about, do
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([do.__module__, *PRELOADED])

    def start(self, output: Path, task: Task) -> Forked:
        process = self._context.Process(target=work, args=(output, task, self.about, self.do), daemon=True)
        process.start()
        return Forked(process)

    def finish(self, output: Path, task: Task, *, seconds: float) -> None:
        raise ValueError("ended without a result")


# -- in a process of its own ------------------------------------------------------------------------------------------


def work(output: Path, task: Task, about: dict[str, Any], do: Callable[[Task], dict[str, Any]]) -> None:
    """Do one task and write its result.json."""
    begin = time.monotonic()
    log = os.open(output / task.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.chdir(output)
    torch.set_num_threads(1)
    result = do(task)
    write_result(Path(), task, result, seconds=time.monotonic() - begin, about=about)


def command(task: Task) -> None:
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
    sys.argv = [task.module, *task.arguments, "--job.config_file", f"{task.folder}/config.toml"]
    {"titan_attent.train": train, "titan_attent.score": score}[task.module]()
