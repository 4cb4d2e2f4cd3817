"""The subcommands of ``python -m titan_attent.score``."""

import importlib
import sys

from titan_attent.foundations.checks import closest
from titan_attent.titan.launch import arguments
from titan_attent.titan.user_errors import fail

SUBCOMMANDS = {
    "pair": "train an amateur and an expert, two small models, and score the data of a run with both",
    "targets": "write a few target ids per token of a source, for [distillation] targets",
    "checkpoint": "score the data of a run with the weights of one checkpoint",
}
"""Name of a subcommand and of its module in this package -> its description."""


def score() -> None:
    """Run the subcommand that the command line names first."""
    argv = arguments("titan_attent.score", first="{" + ",".join(SUBCOMMANDS) + "}")
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print("usage: torchrun ... -m titan_attent.score SUBCOMMAND --output DIR --job.config_file X.toml\n")
        print("\n".join(f"  {each:12}{about}" for each, about in SUBCOMMANDS.items()))
        sys.exit(0)
    if name not in SUBCOMMANDS:
        given = "no subcommand is given" if name.startswith("-") or not name else f"{name} is not a subcommand"
        hint = "" if name.startswith("-") or not name else closest(name, SUBCOMMANDS)
        fail(
            ValueError(
                f"titan_attent.score: {given}{hint or '.'} Name `pair` (titan_attent.scorers in earlier versions) or "
                "`checkpoint` (titan_attent.score in earlier versions, with --output DIR in place of "
                "--teacher.reference_path DIR) before the options"
            )
        )
    importlib.import_module(f"titan_attent.titan.scoring.{name}").main(argv[1:])
