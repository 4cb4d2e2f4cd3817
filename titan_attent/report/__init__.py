"""The report: a table and a picture of what a run learned, what its teacher chose, its costs and its files.

    python -m titan_attent.report outputs/soft                                    # writes outputs/soft/curves.png
    python -m titan_attent.report outputs/uniform outputs/soft --output both.png  # what soft saved against uniform

    reading.py    the files of a run's folder ->
    runs.py       scalars, tokens, seconds of a run
    curves.py     a validation curve: its noise, its final level, the step at which it crossed a level
    costs.py      the cost of a run up to a step, in tokens and FLOPs, with scoring charged
    saving.py     the step at which a run reached the first run's final validation loss, or accuracy
    comparing.py  the rule: what a run saved against the first run, or why no saving is reported
    sentence.py   the comparison in two sentences
    settings.py   the settings in which runs differ, and the runs that differ in their seeds alone
    groups.py     several seeds of each setting: means with intervals
    summary.py    the table
    picture.py    the picture, from losses.py and teaching.py; style.py has their shared helpers
    page.py       all of it as one HTML page
    images.py     sheets of the images trained most and least often, and of the quarantined ones; sheets.py draws them

A run is a ``job.dump_folder``; it may still be running. Runs and files that cannot be read are left out and named on
standard error. The exit status is 0 if anything was reported. The picture takes a few seconds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.report.groups import group_columns, group_sentences, name_of
from titan_attent.report.images import draw_images
from titan_attent.report.page import write_page
from titan_attent.report.picture import draw
from titan_attent.report.reading import read_run
from titan_attent.report.runs import SPEED, TRAIN, VALIDATION, RunScalars
from titan_attent.report.sentence import conclusion, ends
from titan_attent.report.settings import groups_of
from titan_attent.report.summary import cells, summarize, table

__all__ = ["SPEED", "TRAIN", "VALIDATION", "RunScalars", "draw", "main", "read_run", "summarize", "table"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.report",
        description="Print a table of runs and draw their curves; with several runs, report what each saved against "
        "the first. For a run on images, also write two sheets into its folder: images.png, the images trained most "
        "and least often, and quarantine.png, the quarantined images.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's job.dump_folder")
    parser.add_argument(
        "--output", metavar="PNG", help="file for the curves (default: curves.png in the first run's folder)"
    )
    parser.add_argument("--html", metavar="FILE", help="write all of it as one HTML page, with the pictures in it")
    args = parser.parse_args(argv)
    runs, notes = _read(args.runs)
    if not runs:
        return _fail(notes)
    picture = Path(args.output or runs[0].path / "curves.png")
    if picture.suffix != ".png" or picture.is_dir() or not os.access(picture.parent, os.W_OK):
        return _fail([f"{picture} cannot be written: name a .png file in a writable folder with --output"])
    page = Path(args.html) if args.html else None
    if page is not None and (page.suffix != ".html" or page.is_dir() or not os.access(page.parent, os.W_OK)):
        return _fail([f"{page} cannot be written: name a .html file in a writable folder with --html"])
    columns = [summarize(run, runs) for run in runs]
    tables = [cells(columns)]
    _print(table(columns))
    groups = groups_of(runs)
    grouped = group_columns(groups) if len(groups) < len(runs) else []
    if grouped:
        tables.insert(0, cells(grouped))
        _print(f"\nmeans of the runs of a setting, with their 95% intervals:\n{table(grouped)}\n")
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
    if grouped:
        sentences = group_sentences(grouped)
    else:
        sentences = [text for run in runs[1:] for text in (*ends(runs[0], run), conclusion(runs[0], run))]
    if page is not None:
        pictures = [file for file in files if file.suffix == ".png"]
        title = f"Report of {', '.join(name_of(group) for group in groups)}"
        try:
            write_page(page, title=title, tables=tables, sentences=sentences, notes=notes, pictures=pictures)
        except OSError as error:
            return _fail([f"{error.filename or page} cannot be written: {error.strerror or error}"])
        files.append(page)
    for line in (*hints, *sentences):
        _print(line)
    name = "written" if page is not None else f"picture{'s' * (len(files) > 1)}"
    _print(f"{name}: {', '.join(map(str, files))}")
    return 0


def _read(paths: Sequence[str]) -> tuple[list[RunScalars], list[str]]:
    """The runs that can be read, each once, and notes on the others and on unreadable files."""
    runs: list[RunScalars] = []
    notes: list[str] = []
    path_of: dict[str, str] = {}  # real path -> the path that named it first
    for path in paths:
        real = os.path.realpath(path)
        if real in path_of:
            notes.append(f"{path} is the same run as {path_of[real]}: it is shown once")
            continue
        path_of[real] = path
        try:
            runs.append(read_run(path))
            notes += runs[-1].notes
        except (ValueError, OSError) as error:
            notes.append(f"{path} is left out: {error}" if len(paths) > 1 else str(error))
            if path == paths[0] and len(paths) > 1:
                notes.append("the others are compared with the first run that could be read")
    return runs, notes


def _fail(notes: Sequence[str]) -> int:
    print(f"titan_attent.report: {'; '.join(notes)}", file=sys.stderr)
    return 2


def _print(text: str) -> None:
    """Print a line. If the reader of the pipe has exited, as ``head`` does, drop it: the picture is still drawn."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Buffered and later output must be written somewhere, or the interpreter reports an error when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
