"""The number of steps of a run without scorers at the same compute as a taught run with its scorers.

    python scripts/equal_compute.py outputs/quickstart/taught --multiple 25

Prints the taught run's steps, plus those that fit into the seconds of its scorers at its own pace, rounded up to a
multiple.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.report import read_run


def equal_steps(*, steps: int, train_seconds: float, scorer_seconds: float, multiple: int) -> int:
    """Steps of the run without scorers; ``steps`` if the scorers took no time."""
    return math.ceil(steps * (1 + scorer_seconds / train_seconds) / multiple) * multiple


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Print the steps of a run without scorers at the same compute as a taught run."
    )
    parser.add_argument("run", type=Path, help="dump folder of the finished taught run")
    parser.add_argument("--multiple", type=int, default=1, help="round the steps up to a multiple of this (default: 1)")
    args = parser.parse_args(argv)
    try:
        scalars = read_run(args.run).scalars
        last = {tag: list(scalars[f"ledger/{tag}_seconds"].items())[-1] for tag in ("train", "prepaid")}
    except (ValueError, KeyError) as error:
        print(f"equal_compute: {args.run}: not a taught run with its ledger in TensorBoard ({error})", file=sys.stderr)
        return 2
    (steps, train_seconds), (_, scorer_seconds) = last["train"], last["prepaid"]
    print(
        equal_steps(
            steps=steps, train_seconds=train_seconds, scorer_seconds=scorer_seconds, multiple=max(1, args.multiple)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
