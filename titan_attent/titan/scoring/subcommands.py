"""Commands of this package, one after the other, on all ranks of a command that torchrun started.

Each runs in a process of its own on every rank: a trainer leaves nothing behind for the next one, and its process group
is its own. The ranks of the outer command, in a group that has nothing to do with it, wait for all of them.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
from contextlib import closing

import torch.distributed as dist

# Stages are forked from a clean server that has imported what they need: seconds a stage.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["titan_attent.titan.scoring.checkpoint"])


def run_on_all_ranks(module: str, argv: list[str]) -> None:
    """``python -m module argv`` on every rank of the default group; all exit if it fails on one. A collective."""
    port = [_free_port() if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(port)
    # A store of its own: in torchrun's the keys of two commands would meet.
    environment = {"MASTER_PORT": str(port[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    process = _CONTEXT.Process(target=_run, args=(module, argv, dict(os.environ) | environment))
    process.start()
    process.join()
    codes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(codes, process.exitcode or 0)
    if any(codes):
        sys.exit(next(code if code > 0 else 1 for code in codes if code))


def _run(module: str, argv: list[str], environment: dict[str, str]) -> None:
    """The command ``python -m module argv``, in a process that ends with the one that asked for it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _free_port() -> int:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as found:
        found.bind(("", 0))
        return found.getsockname()[1]
