"""Recall and graph colouring with a fixed or a random seed, trained on the mean loss or on a q-norm over inputs.

    python -m benchmarks.seeds --output outputs/seeds [--repetitions 0 1 2 3 4] [--publish docs/results/seeds]

A run is (task, arm, repetition). The same command resumes, also from published results (--known).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.runner import machine
from benchmarks.common.tables import write_page
from benchmarks.seeds.arms import ARMS, PROBLEMS
from benchmarks.seeds.page import page
from benchmarks.seeds.training import measure, train

INPUTS, VOTES = 500, 32
"""Inputs that are measured, and their seeds."""
REHEARSED = 4
"""Steps of a run with --rehearse."""


def labels_of(name: str, arm: str, repetition: int, *, steps: int) -> dict[str, Any]:
    """What identifies a run, with the sizes that it was measured with."""
    return {"task": name, "arm": arm, "repetition": repetition, "steps": steps, "inputs": INPUTS, "votes": VOTES}


def key_of(labels: dict[str, Any]) -> str:
    return "/".join(str(labels[name]) for name in ("task", "arm", "steps", "repetition"))


def run(name: str, arm_name: str, repetition: int, *, steps: int) -> dict[str, Any]:
    """One run: its metrics on new inputs, and its seconds of a core."""
    start = time.process_time()
    problem, arm = PROBLEMS[name], ARMS[arm_name]
    torch.manual_seed(repetition)
    task = problem.task(arm, seeds=problem.seeds)
    model = problem.model(task)
    train(model, task, q=arm.q, inputs=problem.inputs, steps=steps, rate=problem.rate)
    metrics = measure(model, problem.task(arm, seeds=VOTES), inputs=INPUTS)
    return {"metrics": metrics, "seconds": time.process_time() - start, "machine": machine()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--repetitions", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="first weights")
    parser.add_argument("--tasks", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--rehearse", action="store_true", help=f"{REHEARSED} steps per run: shows that all of it runs")
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--publish", type=Path, help="write the page and the results to this path with .md and .json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for known in (args.known, args.output / "results.json"):
        if known is not None and known.is_file():
            results |= {key_of(one): one for one in json.loads(known.read_bytes())["results"]}
    args.output.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.seeds" + " --rehearse" * args.rehearse
    own: list[dict[str, Any]] = []
    for repetition, name, arm in product(args.repetitions, args.tasks, ARMS):
        labels = labels_of(name, arm, repetition, steps=REHEARSED if args.rehearse else PROBLEMS[name].steps)
        if key_of(labels) not in results:
            results[key_of(labels)] = one = labels | run(name, arm, repetition, steps=labels["steps"])
            metrics = one["metrics"]
            shares = f"right {metrics['right']:.1%}, vote {metrics['exact_match_vote']:.1%}"
            print(f"{key_of(labels)}: {shares}, {one['seconds']:.0f} s", flush=True)
        own.append(results[key_of(labels)])
        write_page(args.output, page(own), list(results.values()), command=command)
    text = page(own)
    print(text)
    if args.publish:
        write_page(args.output, text, own, command=command, publish=args.publish)
    return 0


if __name__ == "__main__":
    sys.exit(main())
