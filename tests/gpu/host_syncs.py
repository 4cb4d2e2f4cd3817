"""Host syncs in a trainer's steps: each is noted with the line that called it, or forbidden.

On a GPU ``torch.cuda.set_sync_debug_mode`` finds them. On CPU nothing waits: a substitute notes the operators that
would on a GPU, except while the next batch is made, whose tensors are on the host.
"""

import functools
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
import torchtitan.train  # noqa: F401 (for its folder)
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.step_time import Runner

WARMUP, STEPS, PROFILED = 20, 48, 16
"""Steps before the watch (compilation, the first exchange), during it (exchanges at 32, 48 and 64), and profiled."""
MESSAGE = "called a synchronizing CUDA operation"
PACKAGES = {name: str(Path(sys.modules[name].__file__ or "").parent) for name in ("titan_attent", "torchtitan")}
BATCH_COPY = "input_dict[k] = v.to(self.device)"
TENSORS_OF_A_BATCH = 3
"""Tensors that torchtitan copies in a loop: the input, and here also example ids and weights."""
OPERATORS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"})
"""Operators that the substitute notes: the size or the branch after them depends on values."""


def site(frames: Sequence[tuple[str, int, str]]) -> str:
    """The caller: "package/file.py:line source" of the innermost frame in torchtitan or in this package.

    Args:
        frames: (file, line number, source line), outermost first.
    """
    for file, line, source in reversed(frames):
        for package, folder in PACKAGES.items():
            if file.startswith(folder + "/"):
                return f"{package}/{file[len(folder) + 1 :]}:{line} {source}"
    return "elsewhere"


def violations(seen: Counter[str], stock: Counter[str], *, microbatches: int) -> list[str]:
    """The sites of a teaching trainer that torchtitan's does not have, or has less often."""
    more = []
    for where, count in seen.items():
        allowed = stock[where] * microbatches * (TENSORS_OF_A_BATCH if BATCH_COPY in where else 1)
        if count > allowed:
            more.append(f"{where} ({count} times, {allowed} allowed)")
    return more


class Substitute(TorchDispatchMode):
    """Does on CPU what CUDA's sync debug mode does at an operator that waits for the device."""

    debug_mode = "default"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATORS:
            if self.debug_mode == "error":
                raise RuntimeError(MESSAGE)
            if self.debug_mode == "warn":
                warnings.warn(MESSAGE, stacklevel=1)
        return func(*args, **(kwargs or {}))


class Watch:
    """A context in which host syncs are ignored, noted in ``sites``, or errors, by :meth:`mode`."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.sites: Counter[str] = Counter()
        self._mode = "default"
        self._substitute = Substitute()
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "Watch":
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=MESSAGE)
        warnings.showwarning = self._note
        if not self.on_gpu:
            self._substitute.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set("default")
        if not self.on_gpu:
            self._substitute.__exit__(kind, error, trace)
        self._warnings.__exit__(kind, error, trace)

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if MESSAGE in str(message):
            frames = traceback.extract_stack()
            self.sites[site([(frame.filename, frame.lineno or 0, frame.line or "") for frame in frames])] += 1

    def _set(self, mode: str) -> None:
        self._mode = mode
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
        else:
            self._substitute.debug_mode = mode

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """ "default", "warn" (noted) or "error", as ``torch.cuda.set_sync_debug_mode``."""
        before = self._mode
        self._set(mode)
        try:
            yield
        finally:
            self._set(before)

    def forbidding(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.mode("error"):
                return fn(*args, **kwargs)

        return call

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``, with an error at a host sync while one is made."""
        while True:
            with self.mode("error") if self.on_gpu else nullcontext():
                batch = next(batches)
            yield batch

    def check_itself(self, device: str) -> None:
        """RuntimeError if a host sync goes unnoticed, since the check would then be worthless."""
        one = torch.ones(1, device=device)
        with self.mode("warn"):
            one.item()
        noted = self.sites.total()
        try:
            with self.mode("error"):
                one.item()
        except RuntimeError as error:
            if MESSAGE not in str(error):
                raise
        else:
            noted = 0
        self.sites.clear()
        if noted != 1:
            raise RuntimeError("a host sync went unnoticed: the check does not work on this machine")


def runtime_syncs(runner: Runner) -> Counter[str]:
    """Synchronising calls of the CUDA runtime in ``PROFILED`` steps, by name; empty where CUPTI gives none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        runner.run(PROFILED)
    return Counter({event.key: event.count for event in profiler.key_averages() if event.key.endswith("Synchronize")})


def observe(runner: Runner, device: str, *, teaching: bool) -> dict[str, Any]:
    """Sites and counts of the host syncs in ``STEPS`` steps; RuntimeError at one in this package."""
    trainer: Any = runner.trainer
    runner.run(WARMUP)
    exchanges = 0

    def counted(flush: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal exchanges
            exchanges += 1
            return flush(*args, **kwargs)

        return call

    with Watch(device) as watch:
        watch.check_itself(device)
        if teaching:
            for system in trainer.systems:
                system.after_step = watch.forbidding(system.after_step)
                if hasattr(system, "buffer"):
                    system.buffer.flush = counted(system.buffer.flush)
            trainer.forward_backward_step = watch.forbidding(trainer.forward_backward_step)
            runner.batches = watch.batches(runner.batches)
        with watch.mode("warn"):
            runner.run(STEPS)
    calls = runtime_syncs(runner) if device == "cuda" else Counter[str]()
    return {"sites": watch.sites, "exchanges": exchanges, "calls": calls}
