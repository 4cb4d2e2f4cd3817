"""The runner: runs tasks in parallel; each has a result.json once it has finished.

A starter starts the tasks: as a command of torchrun (torchrun.py), or as a fork of a process that has imported the
product (forks.py).
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import titan_attent
from benchmarks.common.measure import cpu_model, versions
from benchmarks.common.tasks import Task, in_words_of_today
from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.toml import to_toml

RESULT_FILE = "result.json"
TICK = 0.02
"""Seconds between two polls of the running processes."""


class Process(Protocol):
    """The process of a task; a ``subprocess.Popen`` is one."""

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def terminate(self) -> None: ...

    def wait(self) -> Any: ...


class Starter(Protocol):
    """Starts a task, and finishes it once its process has ended."""

    def start(self, output: Path, task: Task) -> Process:
        """Start it in ``output``, where its folder holds only its config.toml. It prints to log.txt."""

    def finish(self, output: Path, task: Task, *, seconds: float) -> None:
        """Write the result of a process that ended with exit code 0 and no result; ValueError if that fails."""


def load_result(output: Path, task: Task) -> dict[str, Any] | None:
    """The task's result; None if it has not finished; ValueError if it was measured with other settings."""
    path = output / task.folder / RESULT_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    measured, needed = (
        {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}
        for config in (in_words_of_today(result["config"], task.config), task.config)
    )
    if changed := sorted(key for key in measured.keys() | needed.keys() if measured.get(key) != needed.get(key)):
        was, would = ({key: config.get(key) for key in changed} for config in (measured, needed))
        raise ValueError(
            f"{path.parent} was measured with {was}, but this call needs {would}: name another --output, or remove "
            "this folder"
        )
    return result


def write_result(output: Path, task: Task, numbers: dict[str, Any], *, seconds: float, about: dict[str, Any]) -> None:
    """Write result.json: the task's labels, its ``numbers``, its configuration, its seconds and ``about``."""
    result = task.labels | numbers | {"config": task.config, "process_seconds": seconds} | about
    write_atomically(output / task.folder / RESULT_FILE, (json.dumps(result, indent=1) + "\n").encode())


def about_here() -> dict[str, Any]:
    """The machine and the versions, for a result."""
    return {"machine": machine(), "versions": {"titan_attent": titan_attent.__version__} | versions()}


def machine() -> str:
    name = f"{os.cpu_count()} x {cpu_model()}"
    return f"{torch.cuda.get_device_name()}, {name}" if torch.cuda.is_available() else name


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    task: Task
    process: Process
    start: float


def run_tasks(output: Path, tasks: Sequence[Task], *, jobs: int, starter: Starter) -> list[str]:
    """Run the tasks that have no result yet, ``jobs`` at a time, each after those that it needs.

    Returns the folders of those that failed. A task that needs a failed one counts as failed. On an interrupt the
    processes are ended, and unfinished tasks have no result.
    """
    done = {task.folder for task in tasks if load_result(output, task) is not None}
    pending = [task for task in tasks if task.folder not in done]
    if done:
        print(f"{len(tasks) - len(pending)} of {len(tasks)} had finished before", flush=True)
    running: list[Running] = []
    failed: list[str] = []
    begin, total = time.monotonic(), len(pending)
    try:
        while pending or running:
            for task in [task for task in pending if not set(task.needs).isdisjoint(failed)]:
                pending.remove(task)
                failed.append(task.folder)
                print(f"{task.folder}: not started: a task that it needs has failed", flush=True)
            ready = [task for task in pending if done.issuperset(task.needs)]
            for task in ready[: max(0, jobs - len(running))]:
                pending.remove(task)
                running.append(Running(task, start(output, task, starter), time.monotonic()))
            time.sleep(TICK)
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                folder, seconds = ended.task.folder, time.monotonic() - ended.start
                problem = finish(output, ended.task, starter, code=ended.process.poll(), seconds=seconds)
                if problem:
                    failed.append(folder)
                else:
                    done.add(folder)
                number = total - len(pending) - len(running)
                left = (time.monotonic() - begin) / number * (total - number) / 60
                text = problem or f"{seconds:.1f} s"
                print(f"[{number}/{total}] {folder}: {text}; about {left:.0f} min left", flush=True)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    return failed


def start(output: Path, task: Task, starter: Starter) -> Process:
    """Start a task in a folder that holds only its configuration."""
    folder = output / task.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(task.config), encoding="utf-8")
    return starter.start(output, task)


def finish(output: Path, task: Task, starter: Starter, *, code: int | None, seconds: float) -> str:
    """The error of an ended task; empty where it has a result, which the starter writes if necessary."""
    folder, problem = output / task.folder, f"exit code {code}" if code else ""
    if (folder / RESULT_FILE).is_file():
        return ""
    if not problem:
        try:
            starter.finish(output, task, seconds=seconds)
        except ValueError as error:
            problem = str(error)
    return f"{problem}, see {folder / 'log.txt'}" if problem else ""
