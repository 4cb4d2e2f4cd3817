"""The command; see the package's docstring. It resumes: a run with a result is not repeated."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.runner import RESULT_FILE, about_here
from benchmarks.common.tables import write_report
from benchmarks.hyla.models import METHODS
from benchmarks.hyla.problems import PROBLEMS
from benchmarks.hyla.table import page
from benchmarks.hyla.training import Run, train
from titan_attent.data.io.atomic import write_atomically

SIZES: dict[str, dict[str, Any]] = {
    "fuzzy_logic": {"steps": 20_000, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.03, "warmup": 100},
    "sraven": {"steps": 10_000, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.1, "warmup": 1000},
}
"""The size of a run on one core; rates and decays are among those that the authors tried."""


def load(path: Path, needed: Run) -> dict[str, Any] | None:
    """The result of ``needed`` in ``path``, if it is there; ValueError if it has other settings."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["run"] != asdict(needed):
        raise ValueError(
            f"{path} was measured with {result['run']}, but this call needs {asdict(needed)}: name "
            "another --output, or remove it"
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hyla", description="HYLA against softmax and linear attention."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=["fuzzy_logic"], choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["hyla", "softmax", "linear"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4], help="none: the tables alone")
    parser.add_argument("--steps", type=int, help="steps of a run, instead of the task's")
    parser.add_argument("--batch-size", type=int, help="rows of a step, instead of the task's")
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of the task's")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--known", nargs="*", type=Path, default=[], help="results.json of other calls: not run again")
    parser.add_argument("--publish", type=Path, help="also write PREFIX.md and PREFIX.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    changes = {key: getattr(args, key) for key in ("steps", "batch_size", "lr") if getattr(args, key) is not None}
    known = [result for path in args.known for result in json.loads(path.read_text(encoding="utf-8"))["results"]]
    results = []
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                run = Run(task=task, method=method, seed=seed, **(SIZES[task] | changes))
                path = args.output / "runs" / run.name / RESULT_FILE
                result = load(path, run) or next((one for one in known if one["run"] == asdict(run)), None)
                if result is None:
                    result = train(run) | about_here()
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
                    print(f"{run.name}: {result['scores']}, {result['cpu_seconds']:.0f} s of CPU", flush=True)
                results.append(result)
    if not args.seeds:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.output.rglob(RESULT_FILE))]
        results = found + [one for one in known if one["run"] not in [result["run"] for result in found]]
    if not results:
        parser.error(f"{args.output} and --known have no results")
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in changes.items()]
    seeds = [f"--seeds {' '.join(map(str, args.seeds))}"] if args.seeds else []
    command = " ".join(["python -m benchmarks.hyla --output", str(args.output), *changed, *seeds])
    args.output.mkdir(parents=True, exist_ok=True)
    text = write_report(args.output, page(results), results, command=command)
    print(text)
    if args.publish:
        for name, suffix in (("table.md", ".md"), ("results.json", ".json")):
            write_atomically(args.publish.with_suffix(suffix), (args.output / name).read_bytes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
