"""The runner: which tasks start and when, which count as failed, and that no process outlives an interrupt."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.common import runner
from benchmarks.common.runner import RESULT_FILE, load_result, run_tasks, write_result
from benchmarks.common.tasks import Task


@dataclass
class Ended:
    """A process that has ended."""

    code: int = 0
    terminated: bool = False

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        self.terminated = True

    def wait(self) -> None:
        assert self.terminated


class Endless(Ended):
    """A process that keeps running."""

    def poll(self) -> None:  # type: ignore[override]
        return None


@dataclass
class Starter:
    """Processes by folder, with exit code 0 by default; ``breaks``: folders whose result cannot be written."""

    processes: dict[str, Ended] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()
    started: list[str] = field(default_factory=list)

    def start(self, output: Path, task: Task) -> Ended:
        assert [path.name for path in (output / task.folder).iterdir()] == ["config.toml"]
        self.started.append(task.folder)
        return self.processes.setdefault(task.folder, Ended())

    def finish(self, output: Path, task: Task, *, seconds: float) -> None:
        if task.folder in self.breaks:
            raise ValueError("no loss")
        write_result(output, task, {"loss": 1.0}, seconds=seconds, about={"machine": "a machine"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TICK", 0.0)


def task(folder: str, *needs: str) -> Task:
    return Task(folder=folder, module="m", config={"training": {"steps": 2}}, labels={"rule": folder}, needs=needs)


def test_a_task_waits_for_what_it_needs_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    tasks, starter = [task("c", "b"), task("b", "a"), task("a")], Starter()
    assert run_tasks(tmp_path, tasks, jobs=3, starter=starter) == []
    assert starter.started == ["a", "b", "c"]
    result = load_result(tmp_path, tasks[0])
    assert result is not None and result.pop("process_seconds") >= 0
    assert result == {"rule": "c", "loss": 1.0, "config": {"training": {"steps": 2}}, "machine": "a machine"}
    (tmp_path / "b" / RESULT_FILE).unlink()
    (tmp_path / "b" / "left").touch()
    assert run_tasks(tmp_path, tasks, jobs=1, starter=starter) == []
    assert starter.started[3:] == ["b"]


def test_at_most_as_many_run_in_parallel_as_there_are_jobs(tmp_path: Path) -> None:
    class Watching(Starter):
        def start(self, output: Path, task: Task) -> Ended:
            process = super().start(output, task)
            codes = iter([None, None, 0, 0])
            process.poll = lambda: next(codes)  # type: ignore[method-assign]
            assert sum(name not in ended for name in self.started) <= 2
            return process

        def finish(self, output: Path, task: Task, *, seconds: float) -> None:
            ended.append(task.folder)
            super().finish(output, task, seconds=seconds)

    ended: list[str] = []
    assert run_tasks(tmp_path, [task(name) for name in "abcde"], jobs=2, starter=Watching()) == []
    assert ended == list("abcde")


def test_what_failed_and_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter = Starter(processes={"a": Ended(1)}, breaks=("d",))
    tasks = [task("a"), task("b", "a"), task("c", "b"), task("d"), task("e")]
    assert run_tasks(tmp_path, tasks, jobs=1, starter=starter) == ["a", "b", "d", "c"]
    assert starter.started == ["a", "d", "e"]
    out = capsys.readouterr().out
    assert f"[1/5] a: exit code 1, see {tmp_path / 'a' / 'log.txt'}" in out
    assert "c: not started: a task that it needs has failed" in out
    assert f"[3/5] d: no loss, see {tmp_path / 'd' / 'log.txt'}" in out
    assert re.search(r"\[5/5\] e: \d+\.\d s", out)


def test_a_process_may_write_its_own_result(tmp_path: Path) -> None:
    class Own(Starter):
        def start(self, output: Path, task: Task) -> Ended:
            process = super().start(output, task)
            write_result(output, task, {"loss": 2.0}, seconds=3.0, about={})
            return process

    assert run_tasks(tmp_path, [task("a")], jobs=1, starter=Own(breaks=("a",))) == []
    result = load_result(tmp_path, task("a"))
    assert result is not None and result["loss"] == 2.0


def test_an_interruption_ends_what_is_running(tmp_path: Path) -> None:
    class Interrupted(Endless):
        def poll(self) -> None:  # type: ignore[override]
            raise KeyboardInterrupt

    starter = Starter(processes={"a": Endless(), "b": Interrupted()})
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tmp_path, [task("a"), task("b")], jobs=2, starter=starter)
    assert all(process.terminated for process in starter.processes.values())
    assert not list(tmp_path.rglob(RESULT_FILE))
