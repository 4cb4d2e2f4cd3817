"""Read the files in a run's folder -> RunScalars (runs.py).

Events are read in the order in which they were written; with ``metrics.save_for_all_ranks``, those of the lowest rank.
A file that ends within an event was cut short by a kill, or is still being written: this is not an error. Other
unreadable content is left out and named in the run's ``notes``: a damaged file from its first damaged event on, and
JSON lines that the teacher did not write.

Cost: one pass over the events; 100 bytes per scalar. One block of a file is in memory at a time.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from titan_attent.data.run_record import read_run_record
from titan_attent.foundations.event_files import events
from titan_attent.report.runs import RunScalars, Scalars

Parsed = TypeVar("Parsed")

DECISION_PREFIXES = ("teacher/", "ledger/")
"""The prefixes of the tags in rounds.jsonl."""


def read_run(path: str | os.PathLike[str]) -> RunScalars:
    """Read the run whose ``job.dump_folder`` is ``path``; ValueError if it is no folder or has no scalars in ``tb``."""
    run = RunScalars(Path(path))
    if not run.path.is_dir():
        raise ValueError(f"{run.path} is not a folder: name the job.dump_folder of a run")
    tb = run.path / "tb"
    lowest: dict[str, Path] = {}  # folder with a time stamp -> the folder of its first rank
    for event_file in sorted(tb.rglob("events.out.tfevents.*")):
        if lowest.setdefault(event_file.relative_to(tb).parts[0], event_file.parent) == event_file.parent:
            run.add_session(events(event_file, run.notes), host=_host(event_file.name))
    if not run.scalars:
        why = "; ".join(run.notes) or (
            f"{tb} holds no TensorBoard scalars: set metrics.enable_tensorboard = true for the run "
            "(and leave metrics.save_tb_folder at tb), or wait for its first logged step"
        )
        raise ValueError(why)
    run.scalars = {tag: dict(sorted(values.items())) for tag, values in run.scalars.items()}
    rounds = run.path / "teacher" / "rounds.jsonl"
    run.decided = read_rounds(rounds, run.notes) if rounds.is_file() else {}
    run.record = read_run_record(run.path)
    return run


def read_rounds(path: Path, notes: list[str]) -> Scalars:
    """The ``teacher/*`` and ``ledger/*`` values in ``rounds.jsonl``, at the first step of each pass."""

    def parse(record: Any) -> tuple[int, dict[str, float]]:
        return step_of(record), {tag: float(x) for tag, x in record.items() if tag.startswith(DECISION_PREFIXES)}

    decided: Scalars = {}
    for step, values in json_lines(path, parse, "a decision of the teacher", notes):
        for tag, value in values.items():
            decided.setdefault(tag, {})[step] = value
    return decided


def step_of(record: Any) -> int:
    """The step in the record of a line; an exception that :func:`json_lines` catches where there is none."""
    step = int(record["step"])
    if not 0 <= step < 2**62:
        raise ValueError(f"{step} is not a step")
    return step


def json_lines(path: Path, parse: Callable[[Any], Parsed], noun: str, notes: list[str]) -> Iterator[Parsed]:
    """The result of ``parse`` for each line. Lines that it rejects (ValueError and the like) are left out and noted.

    A last line without a newline was cut short by a kill, or is still being written: it is left out without a note.

    Args:
        noun: the name of a valid line, as "a decision of the teacher".
    """
    num, bad = 0, list[tuple[int, str]]()
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for num, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    break
                try:
                    parsed = parse(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    bad.append((num, line.strip()[:60]))
                    continue
                yield parsed
    except OSError as error:
        notes.append(f"{path} cannot be read: {error.strerror or error}")
    if bad:
        (first, text), many = bad[0], len(bad) > 1
        notes.append(
            f"{path}, line {first} is not {noun}: {text!r}"
            f"{f'; {len(bad):,} such lines of {num:,} are' if many else '; it is'} left out"
        )


def _host(name: str) -> str:
    """The host in the name of an event file: events.out.tfevents.SECONDS.HOST.PROCESS.NUMBER."""
    return ".".join(name.split(".")[4:-2])
