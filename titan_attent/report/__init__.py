"""The report: what a run learned, what its teacher chose, what that cost, where its files are. A table and a picture.

    python -m titan_attent.report outputs/soft                                    # writes outputs/soft/curves.png
    python -m titan_attent.report outputs/uniform outputs/soft --output both.png  # what soft saved against uniform

    reading.py    the files of a run's folder ->
    runs.py       scalars, tokens, seconds of a run
    curves.py     what a curve of validations tells: its noise, its end, where it was at a level
    costs.py      what a run had cost at a step, in tokens and FLOPs, with scoring charged
    saving.py     where a run was at the first run's final validation loss, or accuracy
    comparing.py  what it saved against the first run, or why that is not told: the rule
    sentence.py   that in one line
    summary.py    the table
    picture.py    the picture, from losses.py and teaching.py; style.py has what they share
    images.py     of images: the most and least taught, and those set aside; sheets.py draws them

A run is a ``job.dump_folder``; a live one can be reported, too. What cannot be read of one, or a run as a whole, is
left out and said on standard error; the exit status is 0 if anything was reported. The picture takes a few seconds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.report.images import draw_images
from titan_attent.report.picture import draw
from titan_attent.report.reading import read_run
from titan_attent.report.runs import SPEED, TRAIN, VALIDATION, RunScalars
from titan_attent.report.sentence import conclusion
from titan_attent.report.summary import summarize, table

__all__ = ["SPEED", "TRAIN", "VALIDATION", "RunScalars", "draw", "main", "read_run", "summarize", "table"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.report",
        description="A table and a picture of runs; of several, what each saved against the first. In the folder of a "
        "run of images also images.png, what was taught most and least, and quarantine.png, what was set aside.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's job.dump_folder")
    parser.add_argument("--output", metavar="PNG", help="the picture; by default curves.png in the first run's folder")
    args = parser.parse_args(argv)
    runs, notes = _read(args.runs)
    if not runs:
        return _fail(notes)
    picture = Path(args.output or runs[0].path / "curves.png")
    if picture.suffix != ".png" or picture.is_dir() or not os.access(picture.parent, os.W_OK):
        return _fail([f"{picture} cannot be written: name a .png file in a writable folder with --output"])
    _print(table([summarize(run, runs) for run in runs]))
    files, hints = [picture], []
    try:
        draw(runs, picture)
        for run in runs:
            sheets = draw_images(run.path)
            files += sheets.files
            hints += sheets.hints
            notes += sheets.notes
    except OSError as error:
        return _fail([f"{error.filename or picture} cannot be written: {error.strerror or error}"])
    for note in notes:
        print(f"titan_attent.report: {note}", file=sys.stderr)
    *said, last = [*hints, *(conclusion(runs[0], run) for run in runs[1:])] or [""]
    if last in hints:
        said, last = hints, ""
    for line in said:
        _print(line)
    _print("; ".join([*[last] * bool(last), f"picture{'s' * (len(files) > 1)}: {', '.join(map(str, files))}"]))
    return 0


def _read(paths: Sequence[str]) -> tuple[list[RunScalars], list[str]]:
    """The runs that can be read, each once, and what there is to say of the others and of what they lack."""
    runs: list[RunScalars] = []
    notes: list[str] = []
    known: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in known:
            notes.append(f"{path} is the run {known[real]}, named twice: it is shown once")
            continue
        known[real] = path
        try:
            runs.append(read_run(path))
            notes += runs[-1].notes
        except (ValueError, OSError) as error:
            notes.append(f"{path} is left out: {error}" if len(paths) > 1 else str(error))
            if path == paths[0] and len(paths) > 1:
                notes.append("the first run that is left is what the others are measured by")
    return runs, notes


def _fail(notes: Sequence[str]) -> int:
    print(f"titan_attent.report: {'; '.join(notes)}", file=sys.stderr)
    return 2


def _print(text: str) -> None:
    """To standard output. A reader that has left, such as ``head``, has what it wanted: the picture is still drawn."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered, and all that comes, has to go somewhere, or the interpreter complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
