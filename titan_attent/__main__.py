"""``python -m titan_attent``: the package's commands, and ``--version``.

It imports neither torch nor torchtitan, so it answers at once, also where one of them is broken.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from titan_attent import __version__

LAUNCHED = "torchrun --nproc_per_node=N -m"
"""How the commands are started that run on several processes; N is the number of GPUs, or 1 or 2 on a CPU."""

COMMANDS = {
    "titan_attent.data.text": ("python -m", "documents -> a data set of tokens"),
    "titan_attent.data.adopt": ("python -m", "token files of other tools -> a data set of tokens, without a copy"),
    "titan_attent.data.text.boundaries": ("python -m", "finds the documents of a data set of an earlier version"),
    "titan_attent.data.images": ("python -m", "image files -> a data set of images"),
    "titan_attent.tasks": ("python -m", "a learning task -> data sets of its rows"),
    "titan_attent.score pair": (LAUNCHED, "two small models score every example of a data set"),
    "titan_attent.score checkpoint": (LAUNCHED, "a trained model scores them"),
    "titan_attent.score targets": (LAUNCHED, "a source's target ids of every token, for distillation"),
    "titan_attent.look": ("python -m", "shows what a data set holds, and what a run would keep of it"),
    "titan_attent.train --check N": ("python -m", "checks the configuration of a run on N GPUs, and prints its plan"),
    "titan_attent.train": (LAUNCHED, "trains; the same command resumes"),
    "titan_attent.edit": ("python -m", "adds, subtracts and averages checkpoints"),
    "titan_attent.report": ("python -m", "compares runs: a table and curves"),
}
"""Module and subcommand -> (how it is started, what it does), in the order in which one uses them."""


def commands() -> str:
    """The list of commands, for people."""
    lines = ["commands, each with --help:"]
    for name, (start, what) in COMMANDS.items():
        lines += [f"  {start} {name}", f"      {what}"]
    return "\n".join([*lines, "", "README.md shows them in order, bash scripts/quickstart.sh runs them."])


def versions() -> str:
    """The versions of the package and of what its patches depend on."""
    found = [f"titan_attent {__version__}"]
    for name in ("torch", "torchtitan"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status 0; a wrong argument ends the process with 2 and one message."""
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent",
        description="A teacher for torchtitan that selects the examples to train on.",
        epilog=commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions, and exit")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.command or rest:
        words = " ".join([*options.command, *rest])
        parser.error(
            f"{words}: the commands are modules of their own, such as {LAUNCHED} titan_attent.train; see --help"
        )
    print(versions() if options.version else parser.format_help().rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
