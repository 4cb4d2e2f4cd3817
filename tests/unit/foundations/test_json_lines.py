"""json_lines.py: what is on disk after kills, resumes and fresh starts, read back line by line."""

import json
from pathlib import Path

import pytest

from titan_attent.foundations.json_lines import JsonLines


def entry(step: int, *, run: int = 0) -> dict:
    return {"step": step, "round": step // 4, "strategy": "soft", "ids": [run, step, 10**10 + step]}


def run_steps(path: Path, *, start: int, stop: int, run: int = 0) -> None:
    trace = JsonLines(path, step=start)
    for step in range(start + 1, stop + 1):
        trace.write(entry(step, run=run))
    trace.close()


def entries(path: Path) -> list[dict]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher" / "trace.jsonl"


def test_every_step_is_one_line(path):
    run_steps(path, start=0, stop=9)
    assert entries(path) == [entry(step) for step in range(1, 10)]


def test_a_line_is_on_disk_before_the_run_ends(path):
    trace = JsonLines(path, step=0)
    trace.write(entry(1))
    assert entries(path) == [entry(1)]
    trace.close()


@pytest.mark.parametrize("resumed", [1, 5, 8, 9])
def test_a_resumed_run_drops_the_steps_that_it_trains_again(path, resumed):
    run_steps(path, start=0, stop=9, run=1)
    run_steps(path, start=resumed, stop=11, run=2)
    expected = [entry(step, run=1) for step in range(1, resumed + 1)]
    assert entries(path) == expected + [entry(step, run=2) for step in range(resumed + 1, 12)]
    assert [file.name for file in path.parent.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_a_line_truncated_by_a_kill_is_dropped(path, kept):
    run_steps(path, start=0, stop=5, run=1)
    line = json.dumps(entry(6, run=1)) + "\n"
    with open(path, "a") as file:
        file.write(line[:kept])
    run_steps(path, start=6, stop=7, run=2)
    assert entries(path) == [entry(step, run=1) for step in range(1, 6)] + [entry(7, run=2)]


DAMAGED = {
    "half a line": b'{"step": 3, "round": 0, "str',
    "zeros of a disk that lost power": b"\0" * 40,
    "no UTF-8": b'{"step": 3, "strategy": "\xff"}',
    "another value": b"[3]",
    "no step": b'{"round": 0}',
    "a step of another type": b'{"step": "3"}',
    "nothing": b"",
    "deeply nested": b'{"step": ' * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("where", ["middle", "last"])
def test_a_damaged_line_is_dropped_with_a_warning_and_the_run_continues(path, damage, where, caplog):
    run_steps(path, start=0, stop=5, run=1)
    lines = path.read_bytes().splitlines()
    number = {"middle": 3, "last": 5}[where]
    lines[number - 1] = DAMAGED[damage]
    path.write_bytes(b"\n".join(lines) + b"\n")
    run_steps(path, start=5, stop=6, run=2)
    assert entries(path) == [entry(step, run=1) for step in range(1, 6) if step != number] + [entry(6, run=2)]
    assert [file.name for file in path.parent.iterdir()] == ["trace.jsonl"]
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: line {number} is truncated or damaged;")


def test_the_warning_names_the_first_damaged_line_and_counts_the_others(path, caplog):
    run_steps(path, start=0, stop=5, run=1)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"x", b"y", lines[3], b"z", b""]))
    run_steps(path, start=5, stop=5, run=2)
    assert entries(path) == [entry(1, run=1), entry(4, run=1)]
    assert "line 2 is truncated or damaged, and 2 more;" in caplog.text


def test_a_resume_from_an_intact_file_logs_nothing(path, caplog):
    run_steps(path, start=0, stop=9)
    run_steps(path, start=4, stop=6)
    assert not caplog.messages


def test_a_new_run_renames_old_traces(path):
    for run in range(3):
        run_steps(path, start=0, stop=2 + run, run=run)
    assert sorted(file.name for file in path.parent.iterdir()) == ["trace.1.jsonl", "trace.2.jsonl", "trace.jsonl"]
    for run, name in enumerate(("trace.1.jsonl", "trace.2.jsonl", "trace.jsonl")):
        assert entries(path.with_name(name)) == [entry(step, run=run) for step in range(1, 3 + run)]


def test_a_resume_without_an_old_trace_starts_one(path):
    run_steps(path, start=4, stop=6)
    assert entries(path) == [entry(5), entry(6)]
