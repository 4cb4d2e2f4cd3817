"""How a user's mistake ends a run: all ranks, with exit code 2 and one message."""

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
    """End this process with exit code 2; rank 0 says why, or a node's first rank where rank 0 found nothing wrong."""
    let_first_rank_speak()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"titan_attent: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def end_well(what: str) -> NoReturn:
    """End this process with exit code 0, where there is nothing to do; rank 0 says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"titan_attent: {what}", file=sys.stderr, flush=True)
    sys.exit(0)


def let_first_rank_speak() -> None:
    """Wait, on every rank but 0: call it before a rank exits for a mistake.

    torchrun ends all ranks at the first exit, and rank 0, which tells the reason, might not be heard.

    A rank outlives the wait only where rank 0 goes on, as when a file is missing on one node.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def on_first_rank(action: Callable[[], Result]) -> Result:
    """What ``action`` gives on rank 0, on all ranks; what it raises there is a ValueError on all. A collective.

    Any exception counts, or the others would wait. The result is pickled.
    """
    found: list[Any] = [None, ""]
    if is_first_rank():
        try:
            found[0] = action()
        except ValueError as error:
            found[1] = str(error)
        except Exception as error:
            found[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(found)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


def on_all_ranks(look: Callable[[], None]) -> None:
    """Run ``look`` here; if it raises on any rank, raise a ValueError with the first such rank's message on all ranks.

    A collective of 8 bytes, and one more where something failed. Any exception counts: a rank that left without a word
    would keep the others waiting.
    """
    message = ""
    try:
        look()
    except ValueError as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    if not torch.distributed.is_initialized():
        failed = [message]
    else:
        world_size = torch.distributed.get_world_size()
        mine = torch.distributed.get_rank() if message else world_size
        first = torch.tensor(mine, device=device_type)
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        failed = [message]
        if (source := int(first)) < world_size:
            torch.distributed.broadcast_object_list(failed, src=source)
    if failed[0]:
        raise ValueError(failed[0])
