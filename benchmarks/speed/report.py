"""Reading the scalars of many runs: the report's reader against TensorBoard's own EventAccumulator.

    python -m benchmarks.speed.report [--output docs/results/cpu/report.json]

Every run is one event file of 100,000 points: ten tags at 10,000 steps, one event per point, as torchtitan writes them.

    report            read_run: checksums, events, sessions, and the clock of every point
    EventAccumulator  Reload with all points kept, of the same folder; it reads the same checksums

Both read every run in each round, one after the other in changing order. The files are in the page cache. Seconds are
those of all runs; seconds of CPU depend less on other work of the machine. Every value is compared.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from benchmarks.common import measure
from titan_attent.report import SPEED, TRAIN, VALIDATION, read_run

TAGS = (TRAIN, VALIDATION, SPEED, "tflops", "mfu(%)", "n_tokens_seen", "loss_metrics/global_max_loss")
TAGS += ("memory/max_active(GiB)", "grad_norm", "lr")
STAMP = "20260101-1200"


def write_run(run: Path, *, num_points: int, seed: int) -> None:
    """One event file of ``num_points`` scalars."""
    folder = run / "tb" / STAMP
    folder.mkdir(parents=True)
    with open(folder / "events.out.tfevents.1700000000.host.1.0", "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=1.7e9, file_version="brain.Event:2").SerializeToString())
        for i in range(num_points):
            event = Event(wall_time=1.7e9 + 0.01 * i, step=1 + i // len(TAGS))
            event.summary.value.add(tag=TAGS[i % len(TAGS)], simple_value=1.0 / (1 + i + seed))
            writer.write(event.SerializeToString())


def with_report(run: Path) -> dict[str, dict[int, float]]:
    return read_run(run).scalars


def with_accumulator(run: Path) -> dict[str, dict[int, float]]:
    accumulator = EventAccumulator(str(run / "tb" / STAMP), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


WAYS: dict[str, Callable[[Path], dict[str, dict[int, float]]]] = {
    "report": with_report,
    "EventAccumulator": with_accumulator,
}


def compare(runs: list[Path], *, rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds of the seconds for all runs, and the report's speed as a multiple of either way."""
    wall: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(rounds):
        totals = {name: [0.0, 0.0] for name in WAYS}
        for j, run in enumerate(runs):
            found = []
            for name in list(WAYS) if (i + j) % 2 else list(WAYS)[::-1]:
                start, cpu_start = time.perf_counter(), time.process_time()
                found.append(WAYS[name](run))
                totals[name][0] += time.perf_counter() - start
                totals[name][1] += time.process_time() - cpu_start
            assert found[0] == found[1], f"{run}: the two readers differ"
        for name, (seconds, cpu_seconds) in totals.items():
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)
    medians = {name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in WAYS}
    return [
        {
            "way": name,
            "seconds": medians[name][0],
            "CPU seconds": medians[name][1],
            "report is faster by": medians[name][0] / medians["report"][0],
            "report is faster by, CPU": medians[name][1] / medians["report"][1],
            "rounds": wall[name],
            "CPU rounds": cpu[name],
        }
        for name in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The report's reading of runs against TensorBoard's.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--points", type=int, default=100_000, help="per run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    header = measure.header()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run-{number:02d}" for number in range(args.runs)]
        for number, run in enumerate(runs):
            write_run(run, num_points=args.points, seed=number)
        rows = compare(runs, rounds=args.rounds)
    settings = {"runs": args.runs, "points": args.points, "rounds": args.rounds}
    shown = [{key: value for key, value in row.items() if not key.endswith("rounds")} for row in rows]
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
