"""The command that writes the data sets of a learning task.

python -m titan_attent.tasks NAME --output DIR [--examples N] [options of the task]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from titan_attent.data.io.command import exit_status
from titan_attent.tasks.task_list import TASKS
from titan_attent.tasks.writer import TaskSummary, write_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if done, 2 after an error, which is printed, 130 if interrupted."""
    options = vars(_parser().parse_args(arguments))
    task = TASKS[options.pop("task")]
    own = {field.name: options.pop(field.name) for field in fields(task)}
    again = {"again": "give the command with --overwrite", "interrupted": "starts over with --overwrite"}
    return exit_status(lambda: write_task(task(**own), **options), _report, **again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.tasks",
        description="Write the data sets of a learning task: DIR/train, DIR/validation, and each validation split.",
    )
    commands = parser.add_subparsers(dest="task", metavar="NAME", required=True)
    for name, task in TASKS.items():
        command = commands.add_parser(
            name, help=task.summary, description=task.summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument(
            "--output", required=True, metavar="DIR", default=argparse.SUPPRESS, help="folder to write"
        )
        command.add_argument("--examples", type=int, default=20_000, metavar="N", help="rows to train on")
        command.add_argument(
            "--validation-examples", type=int, default=1_000, metavar="N", help="rows of each validation split"
        )
        command.add_argument("--overwrite", action="store_true", help="delete the data sets of text in DIR first")
        for field in fields(task):
            flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
            if field.type in (bool, "bool"):
                command.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
            else:
                kind = type(field.default)
                metavar = "N" if kind is int else "X" if kind is float else "NAME"
                command.add_argument(flag, type=kind, default=field.default, metavar=metavar, help=text)
    return parser


def _report(summary: TaskSummary) -> None:
    for name, rows in summary.rows.items():
        print(f"{summary.path / name}: {rows:,} rows, {summary.tokens[name]:,} tokens")
    print(
        f"the longest row has {summary.longest:,} words: training.seq_len = {summary.longest} holds one row per window"
    )


if __name__ == "__main__":
    sys.exit(main())
