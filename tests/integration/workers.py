"""The worker processes of a launch, without torchrun: forked from a server that has imported what they need.

Importing torch and torchtitan takes 5 seconds of a core, and torchrun does it for its agent and for every worker of
every launch. Here one process (preloaded.py) does it once a session and forks the workers. Each sees what torchrun
would give it: arguments, environment, output, and a store at MASTER_ADDR:MASTER_PORT that the starting process hosts,
as torchrun's agent does. The module runs as ``python -m`` runs it; what it registers or patches stays in its process.

What this cannot show is torchrun itself: a few tests launch it (``launch(..., launcher="torchrun")``).
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed

OUTPUTS = ("stdout", "stderr")
_CONTEXT = multiprocessing.get_context("forkserver")
_MONITOR_SECONDS = 0.1  # torchrun looks at its workers as often
_STOP_SECONDS = 30.0


class Workers:
    """``num_processes`` ranks of ``python -m module *args`` on this machine.

    Args:
        module: run as ``__main__``.
        args: the command line after it.
        num_processes: the ranks.
        environment: of every worker; the variables that torchrun sets are added.
        output: folder for the files stdout and stderr, shared by the ranks.
        prepare: called in every worker before the module runs, for tests that change something in it; picklable.
    """

    def __init__(
        self,
        module: str,
        args: list[str],
        *,
        num_processes: int,
        environment: dict[str, str],
        output: Path,
        prepare: Callable[[], None] | None = None,
    ):
        self.module, self.output = module, output
        for name in OUTPUTS:
            (output / name).touch()
        # The system picks the port and the store holds it from then on.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks: list[BaseProcess] = []
        for rank in range(num_processes):
            variables = environment | {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank), "GROUP_RANK": "0"},
                **{name: str(num_processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)},
                **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none", "ROLE_NAME": "default"},
                **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
            }
            process = _CONTEXT.Process(target=_work, args=(module, args, variables, output, prepare), daemon=True)
            process.start()
            self.ranks.append(process)

    def poll(self) -> int | None:
        """None while ranks run and none has failed; 0 after all succeeded, 1 after one failed, as torchrun's own."""
        codes = [process.exitcode for process in self.ranks]
        if any(codes):
            return 1
        return None if None in codes else 0

    def wait(self, timeout: float) -> int:
        """The return code; a failed rank ends the others. TimeoutError, with all ranks ended, after ``timeout``."""
        deadline = time.monotonic() + timeout
        try:
            while self.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"still running after {timeout} seconds; output in {self.output}")
                running = [process.sentinel for process in self.ranks if process.exitcode is None]
                if running:  # the last one may have ended since: a wait for nothing lasts until the deadline
                    wait(running, timeout=max(0.0, deadline - time.monotonic()))
            if self.poll() != 0:
                self._stop()
        finally:
            self.kill()
        return self.poll() or 0

    def kill(self) -> None:
        """SIGKILL to all ranks that still run."""
        for process in self.ranks:
            if process.exitcode is None:
                process.kill()
        for process in self.ranks:
            process.join()

    def _stop(self) -> None:
        # As torchrun: others may end by themselves until it looks again; then SIGTERM, and SIGKILL for who ignores it.
        wait([process.sentinel for process in self.ranks if process.exitcode is None], timeout=_MONITOR_SECONDS)
        for process in self.ranks:
            if process.exitcode is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))

    @property
    def killed(self) -> list[int]:
        """The ranks that a SIGKILL has ended."""
        return [rank for rank, process in enumerate(self.ranks) if process.exitcode == -signal.SIGKILL]


def _work(
    module: str, args: list[str], variables: dict[str, str], output: Path, prepare: Callable[[], None] | None
) -> None:
    for descriptor, name in enumerate(OUTPUTS, start=1):
        file = os.open(output / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [module, *args]
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    assert "preloaded" in sys.modules, "the server imports it, or a fork saves nothing"
    _make_as_new(output)
    if prepare is not None:
        prepare()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    (output / f"finished.{variables['RANK']}").touch()


def _make_as_new(output: Path) -> None:
    """Undo what a process has from the server that forked it, and torchtitan's sleep."""
    import torchtitan.config
    import torchtitan.train

    # Of an own tracker: the session's would report what killed workers leave behind.
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]

    manager: Any = torchtitan.config.ConfigManager
    parse_args = manager.parse_args
    # A default holds a copy of the sys.argv of the import.
    manager.parse_args = lambda self, args=None: parse_args(self, sys.argv[1:] if args is None else args)

    def wait_for_others(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        others = [output / f"finished.{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))]
        while not all(path.exists() for path in others) and time.monotonic() < deadline:
            time.sleep(0.005)

    # Rank 0 ends a training with a sleep of 2 seconds "for other ranks to complete", so that no peer that still talks
    # to it finds it gone. Here it sees when they have completed. Replaced is the name in that one module.
    torchtitan.train.time = SimpleNamespace(**(vars(time) | {"sleep": wait_for_others}))  # type: ignore[attr-defined]
