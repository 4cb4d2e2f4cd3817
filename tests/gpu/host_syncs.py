"""Does the host wait for the device anywhere in a teaching step where torchtitan's own step does not?

    python tests/gpu/host_syncs.py [--variants defaults soft ...] [--output sync.json]

Whole steps of the real trainers, from the next batch to what follows the optimizer, inside a pass. In what this package
brings (the next batch, forward to backward with the record of the losses, and the exchange after the step) every host
sync is an error: ``torch.cuda.set_sync_debug_mode("error")``. In the rest of the step each one is noted with the line
that called it, and must be one that torchtitan's own trainer has in the same run. Two exchanges begin and are applied.

Not seen by that mode: waits inside torch.distributed and for events. The synchronising calls of the CUDA runtime, which
the profiler counts, include them; they stand beside stock's in the table and are not judged, because torchtitan copies
two more tensors of a batch to the device (example ids and weights), each with a wait of its own.

On CPU (--device cpu) nothing waits. A double notes the operators that would, in the same places but the next batch,
whose tensors are the host's: a rehearsal of this script. tests/distributed/titan/test_hot_path.py is the test on CPU.
"""

import argparse
import functools
import gc
import sys
import tempfile
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
from one_gpu import meshes_of_one
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import measure
from benchmarks.speed import step_time
from benchmarks.speed.step_time import RATIO_1, TEACHING, Runner
from titan_attent.data.text.shards import TokenShards
from titan_attent.scores.reference import Scoring
from titan_attent.scores.writer import ReferenceWriter

WARMUP, STEPS, PROFILED = 20, 48, 16
"""Steps before the watch (compilation, the first exchange), under it (exchanges at 32, 48 and 64), and profiled."""
MESSAGE = "called a synchronizing CUDA operation"
PACKAGES = {name: str(Path(sys.modules[name].__file__ or "").parent) for name in ("titan_attent", "torchtitan")}
BATCH_COPY = "input_dict[k] = v.to(self.device)"
TENSORS_OF_A_BATCH = 3
"""That torchtitan copies in a loop: the input, and here example ids and weights, too."""
OPERATORS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"})
"""Of the double: the size or the branch after them depends on values."""

SOFT = ["--teacher.strategy", "soft", *TEACHING]
VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "uniform": ["--teacher.strategy", "uniform"],
    "random": ["--teacher.strategy", "random", *TEACHING],
    "hard": ["--teacher.strategy", "hard", *TEACHING],
    "soft": SOFT,
    "threshold": ["--teacher.strategy", "threshold", *TEACHING],
    "soft, equal weights": [*SOFT, "--teacher.weighting", "none"],
    "soft, functional gradient": [*SOFT, "--teacher.importance", "functional_gradient"],
    "soft, excess loss": [*SOFT, "--teacher.importance", "excess_loss", "--teacher.reference_path", "{reference}"],
    "soft, learnability": [*SOFT, "--teacher.importance", "learnability"],
    "soft, attainment": [*SOFT, "--teacher.importance", "attainment"],
    "soft, loss in chunks": [*SOFT, "--teacher.loss_chunks", "4"],
    "soft, pools": [*SOFT, *RATIO_1, "--teacher.pool_size", "{pool}"],
    "soft, shadow": [*SOFT, "--teacher.shadow"],
    "reweighting": ["--teacher.strategy", "random", "--teacher.weighting", "loss", *RATIO_1, *TEACHING],
    "soft, two microbatches": [*SOFT, "--training.global_batch_size", "{two_microbatches}"],
    "soft, compiled": [*SOFT, "--compile.enable"],
}


def site(frames: Sequence[tuple[str, int, str]]) -> str:
    """Who called: "package/file.py:line source" of the innermost frame in torchtitan or in this package.

    Args:
        frames: (file, line number, source line), outermost first.
    """
    for file, line, source in reversed(frames):
        for package, folder in PACKAGES.items():
            if file.startswith(folder + "/"):
                return f"{package}/{file[len(folder) + 1 :]}:{line} {source}"
    return "elsewhere"


def violations(seen: Counter[str], stock: Counter[str], *, microbatches: int) -> list[str]:
    """The sites of a teaching trainer that torchtitan's has not, or that come up more often than there."""
    more = []
    for where, count in seen.items():
        allowed = stock[where] * microbatches * (TENSORS_OF_A_BATCH if BATCH_COPY in where else 1)
        if count > allowed:
            more.append(f"{where} ({count} times, {allowed} allowed)")
    return more


class Double(TorchDispatchMode):
    """On CPU: what CUDA's sync debug mode would do at an operator that waits for the device."""

    debug_mode = "default"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATORS:
            if self.debug_mode == "error":
                raise RuntimeError(MESSAGE)
            if self.debug_mode == "warn":
                warnings.warn(MESSAGE, stacklevel=1)
        return func(*args, **(kwargs or {}))


class Watch:
    """Within it, host syncs are ignored, noted in ``sites``, or errors, as :meth:`mode` says."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.sites: Counter[str] = Counter()
        self._mode = "default"
        self._double = Double()
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "Watch":
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=MESSAGE)
        warnings.showwarning = self._note
        if not self.on_gpu:
            self._double.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set("default")
        if not self.on_gpu:
            self._double.__exit__(kind, error, trace)
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
            self._double.debug_mode = mode

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
        """``batches``, made without a host sync."""
        while True:
            with self.mode("error") if self.on_gpu else nullcontext():
                batch = next(batches)
            yield batch

    def check_itself(self, device: str) -> None:
        """Raise a RuntimeError where a host sync goes unnoticed: the check would be worth nothing."""
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
            raise RuntimeError("a host sync went unnoticed: the check is worth nothing here")


def runtime_syncs(runner: Runner) -> Counter[str]:
    """Synchronising calls of the CUDA runtime in ``PROFILED`` steps, by name; empty where CUPTI gives none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        runner.run(PROFILED)
    return Counter({event.key: event.count for event in profiler.key_averages() if event.key.endswith("Synchronize")})


def observe(runner: Runner, device: str, *, teaching: bool) -> dict[str, Any]:
    """Sites and counts of the host syncs in ``STEPS`` steps; a RuntimeError at one that is this package's."""
    trainer: Any = runner.trainer
    runner.run(WARMUP)
    exchanges = 0
    with Watch(device) as watch:
        watch.check_itself(device)
        if teaching:
            (teaching,) = trainer.systems
            flush = teaching.buffer.flush

            def counted_flush(*args: Any, **kwargs: Any) -> Any:
                nonlocal exchanges
                exchanges += 1
                return flush(*args, **kwargs)

            teaching.buffer.flush = counted_flush
            trainer.forward_backward_step = watch.forbidding(trainer.forward_backward_step)
            teaching.step_done = watch.forbidding(teaching.step_done)
            runner.batches = watch.batches(runner.batches)
        with watch.mode("warn"):
            runner.run(STEPS)
    calls = runtime_syncs(runner) if device == "cuda" else Counter[str]()
    return {"sites": watch.sites, "exchanges": exchanges, "calls": calls}


def first_lines(error: BaseException) -> str:
    """Where and what, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = site([(frame.filename, frame.lineno or 0, frame.line or "") for frame in frames])
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} at {where}"


def work(mesh: DeviceMesh, args: argparse.Namespace, data: str, dump: str, values: dict[str, str]) -> Any:
    """One rank: torchtitan's own trainer, then each variant against it."""
    step_time.prepare(mesh, args.flavor)
    microbatch = {"{two_microbatches}": 2}
    rows = []
    stock: dict[str, Any] = {}
    for name in [None, *args.variants]:
        gc.collect()
        torch.compiler.reset()
        settings = None if name is None else [values.get(setting, setting) for setting in VARIANTS[name]]
        count = 1 if name is None else max(microbatch.get(setting, 1) for setting in ["", *VARIANTS[name]])
        row: dict[str, Any] = {"configuration": "torchtitan's own trainer" if name is None else name}
        rows.append(row)
        runner = None
        try:
            with meshes_of_one(mesh.size()):
                runner = step_time.build(args, data, dump, settings)
                seen = observe(runner, args.device, teaching=name is not None)
            if name is None:
                stock = seen
            found = violations(seen["sites"], stock["sites"], microbatches=count)
            if name not in (None, "uniform") and seen["exchanges"] < 3:
                found.append(f"{seen['exchanges']} exchanges, 3 were due")
            row |= {
                "result": "passed" if not found else "FAILED: " + "; ".join(found),
                "steps": STEPS,
                "exchanges": seen["exchanges"],
                "noted a step": seen["sites"].total() / STEPS,
                "runtime calls a step": seen["calls"].total() / PROFILED,
                "sites": dict(seen["sites"]),
                "calls": dict(seen["calls"]),
            }
        except Exception as error:
            row |= {"result": f"FAILED: {first_lines(error)}"}
            if name is None:
                raise
        finally:
            if runner is not None:
                runner.trainer.close()
    return rows


def write_reference(folder: Path, *, data: str, seq_len: int) -> None:
    """Made-up reference losses of every example, for the importance that reads them."""
    shards = TokenShards(data)
    num_examples = (shards.num_tokens - 1) // seq_len
    scoring = Scoring(
        **{"data_fingerprint": shards.fingerprint, "seq_len": seq_len, "num_examples": num_examples},
        **{"model": "made up", "precision": "float32", "checkpoint": "none", "checkpoint_sha256": "none"},
    )
    with ReferenceWriter(folder, scoring=scoring) as writer:
        writer.append(torch.rand(num_examples, generator=torch.Generator().manual_seed(0)) * 5)
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description="Host syncs of the teaching step against those of torchtitan's own.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, help="default: up to 2 GPUs, or 2 on CPU")
    parser.add_argument("--flavor", choices=step_time.FLAVORS, default="debugmodel")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a process and step")
    parser.add_argument("--seq-len", type=int, help="default 512 on a GPU, 32 on CPU")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; on CPU all but the compiled one")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.processes = args.processes or (min(2, torch.cuda.device_count()) if gpu else 2)
    args.seq_len = args.seq_len or (512 if gpu else 32)
    args.compile = False  # a variant of its own
    args.variants = args.variants or [name for name in VARIANTS if gpu or name != "soft, compiled"]

    header = measure.header()
    batch = args.batch * args.processes
    # A pass of half of the data is longer than all steps, two microbatches a step included.
    steps = 4 * (WARMUP + STEPS + PROFILED + 1)
    with tempfile.TemporaryDirectory() as folder:
        data = str(step_time.write_data(Path(folder), num_tokens=(steps * batch + 1) * args.seq_len))
        reference = str(Path(folder) / "reference")
        write_reference(Path(reference), data=data, seq_len=args.seq_len)
        values = {
            "{reference}": reference,
            "{pool}": str(batch * steps // 2),
            "{two_microbatches}": str(2 * batch),
        }
        rows = measure.run_ranks(work, args, data, folder, values, num_ranks=args.processes, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    shown = [{key: row.get(key, "") for key in rows[0] if key not in ("sites", "calls")} for row in rows]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)
    print("\ntorchtitan's own host syncs, in all steps:")
    for where, count in rows[0]["sites"].items():
        print(f"  {count:>5}  {where}")
    if not gpu:
        print(
            "A rehearsal on CPU: nothing waits there, so nothing is shown about host syncs. The compiled step is left "
            "out."
        )
    sys.exit(any(row["result"] != "passed" for row in rows))


if __name__ == "__main__":
    main()
