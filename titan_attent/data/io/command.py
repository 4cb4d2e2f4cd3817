"""How a command that writes a data set ends."""

import sys
from collections.abc import Callable
from typing import TypeVar

Summary = TypeVar("Summary")


def exit_status(write: Callable[[], Summary], tell: Callable[[Summary], None], *, again: str, interrupted: str) -> int:
    """Write, and tell what was written. Returns 0 done, 2 a mistake or a full disk in one message, 130 interrupted.

    Args:
        write: makes the data set.
        tell: prints its summary.
        again: what to do once the disk is mended.
        interrupted: what the same command does after an interrupt.
    """
    try:
        summary = write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; once that is mended, {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command {interrupted}", file=sys.stderr)
        return 130
    tell(summary)
    return 0
