"""Distillation on text: how many steps does a student save, in its own domain and out of it?

    python -m benchmarks.distillation_text --output DIR [--seeds 0 1 2] [--publish docs/results/distillation_text]
    python -m benchmarks.distillation_text --output DIR --rehearse          # all of it, tiny, in minutes

A run is the product's own command on one process, fp32. rules.py has the arms, data.py the text.

    DIR/corpora/, DIR/validation/          data sets
    DIR/source/seed-N/                     a source with its checkpoints
    DIR/targets/seed-N/KIND/step-M/        target ids of a checkpoint
    DIR/runs/ARM/seed-N/                   config.toml, log.txt, tb/; result.json once it has finished
    DIR/results.json, table.md             all results so far

A second call resumes: runs with a result.json are kept. ``--known`` names results of other calls: students in them are
not run again. On SIGTERM the page of the finished runs is written. Cost: README.md.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.forks import Forks, hide_gpus
from benchmarks.common.runner import about_here, load_result, run_tasks
from benchmarks.common.tables import write_page
from benchmarks.common.tasks import Task
from benchmarks.distillation_text.data import prepare
from benchmarks.distillation_text.measure import do
from benchmarks.distillation_text.rules import ARMS, FULL, REHEARSAL, Scale, tasks_of
from benchmarks.distillation_text.table import page

Known = dict[str, dict[str, Any]]
"""Folder of a task -> its result."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation_text",
        description="How many steps does a student of a language model save, and in which domain?",
        epilog="\n".join(f"  {name:26}{arm.about}" for name, arm in ARMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="see below")
    parser.add_argument("--known", type=Path, nargs="+", default=[], metavar="FILE", help="results of other calls")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each; 0 only writes the page")
    parser.add_argument("--rehearse", action="store_true", help="tiny models and few steps: shows that all of it works")
    parser.add_argument("--publish", type=Path, help="write the page and the results to this path with .md and .json")
    return parser.parse_args(argv)


def all_tasks(seeds: Sequence[int], scale: Scale) -> list[Task]:
    return [task for seed in seeds for task in tasks_of(list(ARMS), seed, scale)]


def read_known(files: Sequence[Path], seeds: Sequence[int], scale: Scale) -> Known:
    """The results in ``files`` whose configuration is that of this code; others are named on stderr. ValueError."""
    wanted = {task.folder: task for task in all_tasks(seeds, scale)}
    known: Known = {}
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            folders = [(one["folder"], one["config"], one) for one in results if one["seed"] in seeds]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--known {file}: not the results of this command ({type(error).__name__}: {error}): name a .json that "
                "--publish wrote, or DIR/results.json"
            ) from error
        left_out = [folder for folder, config, _ in folders if folder not in wanted or wanted[folder].config != config]
        known |= {folder: result for folder, _, result in folders if folder not in left_out}
        if left_out:
            print(
                f"distillation_text: {file}: left out, of another configuration: {', '.join(left_out)}", file=sys.stderr
            )
    return known


def gather(output: Path, seeds: Sequence[int], scale: Scale, known: Known) -> list[dict[str, Any]]:
    """All results, those in ``output`` first; ValueError for other settings."""
    results = []
    for task in all_tasks(seeds, scale):
        result = load_result(output, task) or known.get(task.folder)
        if result is not None:
            results.append(result | {"folder": task.folder})
    return results


def needed(tasks: Sequence[Task], known: Known) -> list[Task]:
    """The tasks whose results are not known, and those that they need, although their results are known."""
    by_folder, wanted = {task.folder: task for task in tasks}, set()

    def add(task: Task) -> None:
        wanted.add(task.folder)
        for folder in task.needs:
            add(by_folder[folder])

    for task in tasks:
        if task.labels["role"] == "student" and task.folder not in known:
            add(task)
    return [task for task in tasks if task.folder in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    hide_gpus()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scale = REHEARSAL if args.rehearse else FULL
    words = [
        "python",
        "-m",
        "benchmarks.distillation_text",
        "--output",
        str(args.output),
        "--seeds",
        *map(str, args.seeds),
    ]
    command = shlex.join(words + ["--rehearse"] * args.rehearse)
    failed: list[str] = []
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    starter = Forks(about_here(), do)
    try:
        known = read_known(args.known, args.seeds, scale)
        gather(args.output, args.seeds, scale, known)  # before the first run: refuses runs with other settings
        try:
            for seed in args.seeds if args.jobs > 0 else []:
                prepare(args.output)
                failed += run_tasks(
                    args.output, needed(tasks_of(args.arms, seed, scale), known), jobs=args.jobs, starter=starter
                )
        finally:  # finished runs are on the page even after an interrupt
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            results = gather(args.output, args.seeds, scale, known)
            text = page(results, command=command, scale=scale, planned=len(args.seeds))
            write_page(args.output, text, results, command=command, publish=args.publish)
    except (ValueError, RuntimeError) as error:
        print(f"distillation_text: {error}", file=sys.stderr)
        return 2
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
