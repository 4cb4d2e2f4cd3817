"""Runs commands of this package one after the other, on all ranks of a command that torchrun started.

Each runs in a separate process on every rank, so that a trainer leaves nothing behind for the next, and with its own
process group. The ranks of the outer command have another process group, in which they wait for all of them.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
from contextlib import closing

import torch.distributed as dist

# Stages are forked from a clean server process with the imports done, which saves seconds per stage.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["titan_attent.titan.scoring.checkpoint"])


def run_on_all_ranks(module: str, argv: list[str]) -> None:
    """Run ``python -m module argv`` on every rank of the default group; all exit if it fails on one. A collective."""
    port = [_free_port() if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(port)
    # A separate store: in torchrun's store, the keys of the two commands would collide.
    environment = {"MASTER_PORT": str(port[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    process = _CONTEXT.Process(target=_run, args=(module, argv, dict(os.environ) | environment))
    process.start()
    process.join()
    codes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(codes, process.exitcode or 0)
    if any(codes):
        sys.exit(next(code if code > 0 else 1 for code in codes if code))


def _run(module: str, argv: list[str], environment: dict[str, str]) -> None:
    """Run ``python -m module argv`` in this process, which ends when its parent process ends."""
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
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as free_socket:
        free_socket.bind(("", 0))
        return free_socket.getsockname()[1]
