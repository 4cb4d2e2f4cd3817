"""Exit status and messages of a command that writes a data set."""

import sys
from collections.abc import Callable
from typing import TypeVar

Summary = TypeVar("Summary")


def exit_status(
    write: Callable[[], Summary], report: Callable[[Summary], None], *, again: str, interrupted: str
) -> int:
    """Write the data set and print its summary. Returns 0 if done, 2 after an error, 130 if interrupted.

    Args:
        write: writes the data set. Its ValueError and OSError are printed as one message.
        report: prints the summary.
        again: text of the message: what to do after the disk is fixed.
        interrupted: text of the message: what the same command does after an interrupt.
    """
    try:
        summary = write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; once that is fixed, {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command {interrupted}", file=sys.stderr)
        return 130
    report(summary)
    return 0
