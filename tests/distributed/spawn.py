"""Run a function on a gloo world of processes: the one spawn helper of the tests."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

_GRACE_SECONDS = 2.0
# Ranks are forked from a clean server that has imported these, which saves seconds a rank. A fork of this process would
# copy its threads in whatever state they are.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "hypothesis", "torch.distributed.checkpoint", "torch.distributed.tensor", "titan_attent.titan.trainer"]
)


def run_on_ranks(
    fn: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120.0, apart: bool = False
) -> list[Any]:
    """Each rank's ``fn(mesh, *args)``, in rank order.

    Args:
        fn: a top-level function; ``mesh`` is one-dimensional and named "batch".
        num_ranks: processes; 1 calls ``fn(None, *args)`` here, without a process group.
        args: picklable.
        timeout: seconds until the world is killed.
        apart: a single rank gets a process and a process group, too.

    Raises:
        RuntimeError: with the traceback of the rank that failed first.
        TimeoutError: when the world was still running; it names the ranks.
    """
    if num_ranks == 1 and not apart:
        return [fn(None, *args)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_work, args=(folder, rank, num_ranks, timeout, fn, args), daemon=True)
            for rank in range(num_ranks)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, Path(folder), deadline=time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result.{rank}").read_bytes()) for rank in range(num_ranks)]


def _wait(ranks: list[Any], folder: Path, *, deadline: float) -> None:
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            deadline = time.monotonic() + _GRACE_SECONDS  # who failed first may still be writing its traceback
            while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
                time.sleep(0.01)
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"ranks {alive} of {len(ranks)} were still running: a collective that not all entered?")
        time.sleep(0.01)
    errors = sorted(folder.glob("error.*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(f"rank {errors[0].suffix[1:]} of {len(ranks)} failed:\n{errors[0].read_text()}")
    codes = [process.exitcode for process in ranks]
    if any(codes):
        raise RuntimeError(f"ranks died without a traceback, exit codes {codes}")


def _work(folder: str, rank: int, num_ranks: int, timeout: float, fn: Callable[..., Any], args: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", num_ranks)
        limit = timedelta(seconds=2 * timeout)  # the caller's own deadline comes first
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
        result = fn(init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("batch",)), *args)
        Path(folder, f"result.{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while a peer still talks to it
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)  # without the destructors that would wait for peers
