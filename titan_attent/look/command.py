"""The command: ``python -m titan_attent.look DATA [--scores DIR] [--steps N --batch N --seq-len N] [--html FILE]``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.io.atomic import write_atomically
from titan_attent.look.contents import Look, look_at
from titan_attent.look.decision import RunSize, decide, scored_length
from titan_attent.look.page import page_of
from titan_attent.look.subject import DEFAULT_SEQ_LEN, Subject
from titan_attent.look.terminal import lines_of


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.look",
        description="Look at a data set before training: its sources, lengths and rows, and what a teacher would keep "
        "by scores. Nothing is trained.",
    )
    parser.add_argument("data", metavar="DATA", help="folder of a data set of text or images (data.path)")
    parser.add_argument(
        "--scores", default="", metavar="DIR", help="what titan_attent.score pair or checkpoint wrote (teacher.scores)"
    )
    run = parser.add_argument_group("the run that is planned")
    run.add_argument("--steps", type=_number(0), default=0, metavar="N", help="training.steps; 0: nothing repeats")
    run.add_argument("--batch", type=_number(1), default=1, metavar="N", help="training.global_batch_size (default: 1)")
    run.add_argument(
        "--seq-len",
        type=_number(1),
        metavar="N",
        help=f"training.seq_len (default: that of the scores, or else {DEFAULT_SEQ_LEN})",
    )
    run.add_argument(
        "--unit",
        choices=("window", "document"),
        default="",
        help="data.unit (default: that of the scores, or else documents where the data set knows them)",
    )
    run.add_argument("--max-repeats", type=float, default=0.0, metavar="X", help="teacher.max_repeats")
    output = parser.add_argument_group("the output")
    output.add_argument("--html", metavar="FILE", help="also write a page with all of it, and with pictures")
    output.add_argument("--rows", type=_number(1), default=2, metavar="N", help="rows per group (default: %(default)s)")
    output.add_argument(
        "--sources", type=_number(1), default=8, metavar="N", help="sources whose rows are shown (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one message for a mistake."""
    args = make_parser().parse_args(argv)
    try:
        page = _page_file(args.html)
        look = _look(args)
        text = "\n".join(lines_of(look))
        if page is not None:
            write_atomically(page, page_of(look).encode())
    except (ValueError, OSError) as error:
        print(f"titan_attent.look: error: {error}", file=sys.stderr)
        return 2
    _print(text + (f"\n\npage: {page}" if page is not None else ""))
    return 0


def _look(args: argparse.Namespace) -> Look:
    length = scored_length(args.scores) if args.scores else None
    subject = Subject(args.data, unit=args.unit, seq_len=args.seq_len or 0, scored_length=length)
    size = RunSize(batch=args.batch, steps=args.steps, max_repeats=args.max_repeats)
    decision = decide(subject.dataset, args.scores, size) if args.scores else None
    return look_at(subject, decision, size, rows=args.rows, max_sources=args.sources)


def _page_file(name: str | None) -> Path | None:
    if name is None:
        return None
    page = Path(name)
    if page.is_dir() or not os.access(page.parent, os.W_OK):
        raise ValueError(f"--html {name}: cannot be written; name a file in a writable folder")
    return page


def _number(at_least: int) -> type:
    """A parser of whole numbers; argparse names it in its messages."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < at_least:
            raise argparse.ArgumentTypeError(f"it must be at least {at_least}, not {value}")
        return value

    return whole_number  # type: ignore[return-value]


def _print(text: str) -> None:
    """Print, with what the terminal cannot show escaped. It is no error if the reader, such as ``head``, has exited."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
