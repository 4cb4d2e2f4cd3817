"""The command; see the package's docstring. It resumes: a run with a result is not repeated."""

import argparse
import json
from collections.abc import Callable, Sequence
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
    "fuzzy_logic": {"steps": 10_000, "batch_size": 32, "weight_decay": 0.03, "warmup": 100},
    "sraven": {"steps": 4000, "batch_size": 32, "weight_decay": 0.1, "warmup": 1000},
}
"""The size of a run: all of them take about an hour and a half of one core. The decays are among the authors'."""
RATES: dict[str, list[float]] = {"fuzzy_logic": [1e-3, 3e-3], "sraven": [1e-3]}
"""The authors' rates for fuzzy logic, and one of theirs for SRAVEN."""
SEEDS: dict[str, list[int]] = {"fuzzy_logic": [0, 1, 2, 3, 4], "sraven": [0, 1]}
PILOT_SEED = 100
PILOT_SHARE = 4
"""A pilot has a quarter of the steps of a run."""


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


def best_rate(
    task: str,
    method: str,
    sizes: dict[str, Any],
    *,
    rates: Sequence[float],
    result_of: Callable[[Run], dict[str, Any]],
) -> float:
    """The rate with the best score of trained combinations in a pilot per rate: a shorter run of a seed of its own."""
    if len(rates) == 1:
        return rates[0]
    pilots = sizes | {"steps": max(1, sizes["steps"] // PILOT_SHARE), "seed": PILOT_SEED, "pilot": True}
    runs = [Run(task=task, method=method, lr=lr, **pilots) for lr in rates]
    scores = [result_of(run)["scores"][PROBLEMS[task].splits[0]] for run in runs]
    return rates[scores.index(max(scores))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hyla", description="HYLA against softmax and linear attention."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["hyla", "softmax", "linear"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the task's; none: the tables alone")
    parser.add_argument("--steps", type=int, help="steps of a run, instead of the task's")
    parser.add_argument("--batch-size", type=int, help="rows of a step, instead of the task's")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="peak learning rates, instead of the task's: a pilot takes the best"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--known", nargs="*", type=Path, default=[], help="results.json of other calls: not run again")
    parser.add_argument("--publish", type=Path, help="also write PREFIX.md and PREFIX.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    changes = {key: getattr(args, key) for key in ("steps", "batch_size") if getattr(args, key) is not None}
    known = [result for path in args.known for result in json.loads(path.read_text(encoding="utf-8"))["results"]]
    results = []

    def result_of(run: Run) -> dict[str, Any]:
        path = args.output / "runs" / run.name / RESULT_FILE
        result = load(path, run) or next((one for one in known if one["run"] == asdict(run)), None)
        if result is None:
            result = train(run) | about_here()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
            print(f"{run.name}: {result['scores']}, {result['cpu_seconds']:.0f} s of CPU", flush=True)
        results.append(result)
        return result

    for task in args.tasks if args.seeds != [] else ():
        sizes = SIZES[task] | changes
        lr_of = {
            method: best_rate(task, method, sizes, rates=args.rates or RATES[task], result_of=result_of)
            for method in args.methods
        }
        for seed in SEEDS[task] if args.seeds is None else args.seeds:
            for method in args.methods:
                result_of(Run(task=task, method=method, seed=seed, lr=lr_of[method], **sizes))
    if args.seeds == []:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.output.rglob(RESULT_FILE))]
        results = found + [one for one in known if one["run"] not in [result["run"] for result in found]]
    if not results:
        parser.error(f"{args.output} and --known have no results")
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in changes.items()]
    changed += [f"--{key} {' '.join(map(str, getattr(args, key)))}" for key in ("tasks", "rates") if getattr(args, key)]
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
