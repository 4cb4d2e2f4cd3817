"""Code for the speed benchmarks: interleaved timing, peak memory, processes, and results that name their machine.

Times are compared within one run only. The variants take turns, in a different order in every round, and medians are
compared, so that a machine that slows down slows all of them. ``spread`` (interquartile range / median) is the noise.
"""

import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait for the device, so that a wall clock can be read."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- time -------------------------------------------------------------------------------------------------------------


def seconds(fn: Callable[[], Any], *, device: str) -> float:
    """Wall time of one call, device work included."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    before: Callable[[], Any] = lambda: None,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` per variant in turns; ``before`` runs untimed before each call."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            before()
            elapsed = seconds(variants[name], device=device)
            if i >= 0:
                times[name].append(elapsed)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """The median, the minimum and interquartile range / median of the seconds of one variant."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"seconds": middle, "min_seconds": min(times), "spread": (high - low) / middle, "rounds": len(times)}


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(fn: Callable[[], Any], *, device: str) -> int:
    """The peak of the bytes that ``fn`` allocated from torch, beyond those allocated before it.

    CUDA: max_memory_allocated. CPU: the running sum of the profiler's events of torch's CPU allocator, which counts
    the same thing. Neither includes memory of numpy or of libraries.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    result = profiler.profiler.kineto_results  # type: ignore[union-attr]
    allocated = peak = 0
    for event in sorted((e for e in result.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def reset_peak_rss() -> None:
    """Reset the kernel's high-water mark of this process's memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def rss_bytes(*, peak: bool) -> int:
    """Resident memory of this process, now or at its peak (Linux), including that of numpy and libraries."""
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# -- processes --------------------------------------------------------------------------------------------------------


def run_ranks(fn: Callable[..., Any], *args: Any, num_ranks: int, device: str) -> Any:
    """Run ``fn(mesh, *args)`` in a world of processes and return rank 0's result; ``mesh`` has one dimension, "batch".

    One GPU per rank over NCCL, or CPU processes of one thread each over gloo. ``fn`` must be a module-level function.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=_work, args=(queue, folder, rank, num_ranks, device, fn, args))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            while True:
                if not queue.empty():
                    return queue.get()
                if any(process.exitcode for process in ranks):
                    raise RuntimeError(f"{fn.__name__} failed, exit codes {[process.exitcode for process in ranks]}")
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.join(timeout=30)
                if process.is_alive():
                    process.kill()


def _work(
    queue: Any, folder: str, rank: int, num_ranks: int, device: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=num_ranks)
    mesh: DeviceMesh = init_device_mesh(device, (num_ranks,), mesh_dim_names=("batch",))
    result = fn(mesh, *args)
    if rank == 0:
        queue.put(result)
    dist.barrier()
    dist.destroy_process_group()


# -- results ----------------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = os.getloadavg()[0]
    return {"cpus": os.cpu_count(), "cpu": cpu_model(), "gpu": gpu, "load_at_start": load}


def versions() -> dict[str, str]:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    own = {"commit": git.stdout.strip(), "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in ("torch", "torchtitan", "numpy")}


def module_name(path: str) -> str:
    """The name by which ``python -m`` finds a file below the root; for a ``__main__.py``, that of its package."""
    parts = Path(os.path.relpath(path, ROOT)).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def command_of(argv: Sequence[str]) -> str:
    """The command as it is on any machine: an interpreter, the value of ``--python`` or ``--*-python``, is PYTHON."""
    words = ["python", "-m", module_name(argv[0]), *argv[1:]]
    pairs = zip(["", *words], words, strict=False)
    return shlex.join("PYTHON" if re.fullmatch("--(.*-)?python", before) else word for before, word in pairs)


def header() -> dict[str, Any]:
    """The command, machine, versions and date of a result; called first, to exclude the benchmark's own load."""
    return {
        "command": command_of(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the keys of the first row are the columns. Floats get three significant digits."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(
        lines + ["| " + " | ".join(text(row.get(column, "")) for column in columns) + " |" for row in rows]
    )


def time_and_memory(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """The columns of a table: ``names`` of the row, then its time and peak memory and their ratios."""
    return {name: row[name] for name in names} | {
        "ms": 1e3 * row["seconds"],
        "time": f"{row['time_ratio']:.3f}",
        "spread": f"{row['spread']:.0%}",
        "MiB": row["peak_bytes"] // 2**20,
        "memory": f"{row['memory_ratio']:.2f}",
    }


def publish(output: Path | None, result: Mapping[str, Any], *rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the header and the tables; write the whole result as JSON to ``output`` if there is one."""
    for key in ("command", "machine", "versions"):
        print(f"{key}: {result[key]}")
    for one in rows:
        print(f"\n{table(one)}", flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, output)
