"""How a user's mistake ends a run: all ranks, with exit code 2 and one message."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torchtitan.tools.utils import device_type

from titan_attent.foundations.sharding import is_first_rank

Result = TypeVar("Result")


def fail(error: ValueError) -> NoReturn:
    """End this process with exit code 2. Rank 0 prints the reason, and the first rank of any other node does too.

    torchrun's report of the failure shows the reason, too, in the place of a traceback.
    """
    wait_for_first_rank()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"titan_attent: error: {error}", file=sys.stderr, flush=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with open(file, "w", encoding="utf-8") as report:
                json.dump({"message": str(error), "timestamp": int(time.time())}, report)
    sys.exit(2)


def end_without_error(message: str) -> NoReturn:
    """End this process with exit code 0 because there is nothing to do; rank 0 prints ``message``."""
    if os.environ.get("RANK", "0") == "0":
        print(f"titan_attent: {message}", file=sys.stderr, flush=True)
    sys.exit(0)


def wait_for_first_rank() -> None:
    """Wait 10 s on every rank but 0; call it before a rank exits for a user's mistake.

    torchrun ends all ranks at the first exit, so without the wait rank 0 might be killed before it prints the reason.
    A rank outlives the wait only if rank 0 found no mistake, for example when a file is missing on one node.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its result on all ranks. A collective; the result is pickled.

    Any exception on rank 0, which would leave the others waiting, is raised as a ValueError on all ranks.
    """
    outcome: list[Any] = [None, ""]
    if is_first_rank():
        try:
            outcome[0] = action()
        except ValueError as error:
            outcome[1] = str(error)
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def on_all_ranks(check: Callable[[], None]) -> None:
    """Run ``check`` on every rank; if it raises on any, raise a ValueError with the first such rank's message on all.

    A collective of 8 bytes, and a second one if a check failed. Any exception counts: a rank that ended silently would
    leave the others waiting.
    """
    message = ""
    try:
        check()
    except ValueError as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    if not torch.distributed.is_initialized():
        failed = [message]
    else:
        world_size = torch.distributed.get_world_size()
        failed_rank = torch.distributed.get_rank() if message else world_size
        first = torch.tensor(failed_rank, device=device_type)
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        failed = [message]
        if (source := int(first)) < world_size:
            torch.distributed.broadcast_object_list(failed, src=source)
    if failed[0]:
        raise ValueError(failed[0])
