"""The report: what a run learned, what its teacher chose, what that cost, where its files are. A table and a picture.

    python -m titan_attent.report outputs/soft                                    # writes outputs/soft/curves.png
    python -m titan_attent.report outputs/uniform outputs/soft --output both.png  # what soft saved against uniform

    runs.py       TensorBoard events and rounds.jsonl -> scalars, tokens, seconds of a run
    saving.py     what a run needed to reach the first run's final validation loss, or accuracy
    summary.py    the table
    picture.py    the picture, from losses.py and teaching.py; style.py has what they share
    images.py     of images: the most and least taught, and those set aside; sheets.py draws them

A run is a ``job.dump_folder``; a live one can be reported, too. The picture takes a few seconds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.report.images import draw_images
from titan_attent.report.picture import draw
from titan_attent.report.runs import SPEED, TRAIN, VALIDATION, RunScalars, read_run
from titan_attent.report.summary import conclusion, summarize, table

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
    try:
        runs = [read_run(path) for path in args.runs]
        picture = Path(args.output or runs[0].path / "curves.png")
        if picture.suffix != ".png" or picture.is_dir() or not os.access(picture.parent, os.W_OK):
            raise ValueError(f"{picture} cannot be written: name a .png file in a writable folder with --output")
        _print(table([summarize(run, runs) for run in runs]))
        try:
            draw(runs, picture)
        except OSError as error:
            raise ValueError(f"{picture} cannot be written: {error.strerror or error}") from error
        sheets = [draw_images(run.path) for run in runs]
    except ValueError as error:
        print(f"titan_attent.report: {error}", file=sys.stderr)
        return 2
    saved = [conclusion(runs[0], run) for run in runs[1:]]
    for line in [*(hint for _, hint in sheets if hint), *saved[:-1]]:
        _print(line)
    files = [picture, *(file for files, _ in sheets for file in files)]
    _print("; ".join([*saved[-1:], f"picture{'s' * (len(files) > 1)}: {', '.join(map(str, files))}"]))
    return 0


def _print(text: str) -> None:
    """To standard output. A reader that has left, such as ``head``, has what it wanted: the picture is still drawn."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered, and all that comes, has to go somewhere, or the interpreter complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
