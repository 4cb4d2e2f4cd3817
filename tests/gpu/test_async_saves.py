"""Kill and resume in each way to save checkpoints: is the resumed run the uninterrupted one?

    python tests/gpu/test_async_saves.py [--device cuda] [--output resume.json]

The real command (``torchrun -m titan_attent.train``), a tiny llama on text of the Python standard library. For each of
checkpoint.async_mode = disabled, async, async_with_pinned_mem a run is killed (SIGKILL) some steps after its first
checkpoint is complete, and started again. The ids of every step must be those of a run that nobody killed; the losses,
too, to 1e-5 of their size: equal to the last digit where the device's kernels are deterministic.

On CPU (--device cpu) async_with_pinned_mem is refused by the command: there is no accelerator to copy from.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import measure
from titan_attent.data.text.writer import write_dataset

MODES = ("disabled", "async", "async_with_pinned_mem")
STEPS, SAVED, KILLED = 30, 10, 13
LOSS = "loss_metrics/global_avg_loss"
TIMEOUT = 150.0
CONFIG = """
[model]
name = "llama3_attent"
flavor = "bench"
[data]
path = "{data}"
[teacher]
strategy = "soft"
initial_ratio = 0.5
max_repeats = 1000
trace = true
[training]
local_batch_size = {local}
global_batch_size = 8
seq_len = 64
steps = {steps}
mixed_precision_param = "float32"
[lr_scheduler]
warmup_steps = 2
[metrics]
log_freq = 1
enable_tensorboard = true
[checkpoint]
enable = true
interval = {saved}
last_save_model_only = false
[activation_checkpoint]
mode = "none"
[debug]
seed = 0
deterministic = true
"""


def command(config: Path, dump: Path, mode: str, *, processes: int) -> list[str]:
    """The command line of a run."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
        *("-m", "titan_attent.train", "--job.config_file", str(config), "--job.dump_folder", str(dump)),
        *("--checkpoint.async_mode", mode),
    ]


def trace_of(dump: Path) -> list[dict[str, Any]]:
    path = dump / "teacher" / "trace.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(dump: Path) -> dict[int, float]:
    losses: dict[int, float] = {}
    for folder in sorted({path.parent for path in (dump / "tb").rglob("events.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        losses |= {event.step: event.value for event in accumulator.Scalars(LOSS)}
    return losses


def run(arguments: list[str], log: Path) -> None:
    """To the end; RuntimeError with the end of its output where it fails."""
    with open(log, "ab") as file:
        code = subprocess.run(arguments, stdout=file, stderr=file, timeout=TIMEOUT).returncode
    if code:
        raise RuntimeError(f"exit code {code}: {log.read_text(errors='replace')[-1500:]}")


def run_until_killed(arguments: list[str], log: Path, dump: Path) -> int:
    """Start, SIGKILL all processes once a checkpoint is complete and step ``KILLED`` done; the last step traced."""
    complete = dump / "checkpoint" / f"step-{SAVED}" / ".metadata"
    with open(log, "ab") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (complete.exists() and len(trace_of_lines(dump)) >= KILLED):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no checkpoint to kill after: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.005)
    finally:
        # torchrun's workers have sessions of their own: all that name this dump folder.
        subprocess.run(["pkill", "-KILL", "-f", str(dump)], check=False)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return len(trace_of_lines(dump))


def trace_of_lines(dump: Path) -> list[str]:
    path = dump / "teacher" / "trace.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def compare(straight: Path, resumed: Path) -> dict[str, Any]:
    """Ids of every step, and the largest relative difference of the losses."""
    first, second = trace_of(straight), trace_of(resumed)
    ids = [line["ids"] for line in first] == [line["ids"] for line in second] and len(first) == STEPS
    losses, others = losses_of(straight), losses_of(resumed)
    common = losses.keys() & others.keys()
    difference = (
        max(abs(losses[step] - others[step]) / abs(losses[step]) for step in common) if common else float("inf")
    )
    return {"ids": ids, "losses": difference, "steps": len(common)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume in every way to save.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, choices=[1, 2, 4], help="default: up to 2 GPUs, or 2")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.processes = args.processes or (min(2, torch.cuda.device_count()) if args.device == "cuda" else 2)

    header, rows = measure.header(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        write_dataset([stdlib / "json"], output=folder / "data", tokenizer="train:512")
        config = folder / "config.toml"
        values = {"data": folder / "data", "local": 8 // args.processes, "steps": STEPS, "saved": SAVED}
        config.write_text(CONFIG.format(**values))
        straight = folder / "straight"
        run(command(config, straight, "disabled", processes=args.processes), folder / "straight.log")
        for mode in MODES:
            if mode == "async_with_pinned_mem" and args.device == "cpu":
                rows.append({"async_mode": mode, "result": "skipped: the command refuses it without an accelerator"})
                continue
            dump = folder / mode
            arguments = command(config, dump, mode, processes=args.processes)
            try:
                killed_after = run_until_killed(arguments, folder / f"{mode}.log", dump)
                run(arguments, folder / f"{mode}.log")
                seen = compare(straight, dump)
                good = seen["ids"] and seen["losses"] <= 1e-5 and seen["steps"] == STEPS
                result = f"{'passed' if good else 'FAILED'}: killed after step {killed_after}, ids "
                result += f"{'equal' if seen['ids'] else 'DIFFER'}, losses differ by {seen['losses']:.1e} at most"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                result = f"FAILED: {error}"
            rows.append({"async_mode": mode, "result": result})
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, rows)
    sys.exit(any(row["result"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
