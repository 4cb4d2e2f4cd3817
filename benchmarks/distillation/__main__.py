"""Does a student learn sooner from intermediate checkpoints of its source? Sparse parity and PCFG.

    python -m benchmarks.distillation --output DIR [--seeds 0 1 2 3 4] [--publish docs/results/distillation]

A run is one (problem, arm, seed): problems.py has the problems, arms.py the arms, runs.py what a run does. It uses one
core. A seed has its own rows, source and first weights of the student.

    DIR/sources/PROBLEM/seed-N.pt          a source: weights of its checkpoints, losses
    DIR/runs/PROBLEM/ARM/seed-N.json       a finished run
    DIR/distillation.md, .json, .png       all results so far

A second call resumes: finished runs are kept. ``--known`` names results of other calls, such as the published ones:
what is in them is not run again. All arms of a seed are finished before the next seed begins, and after each of them
the page is written. Cost: README.md.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.runner import about_here
from benchmarks.distillation.arms import ARMS
from benchmarks.distillation.picture import draw
from benchmarks.distillation.problems import PROBLEMS
from benchmarks.distillation.results import Key, Result, gather, read_known, save
from benchmarks.distillation.runs import Source, run, run_together
from benchmarks.distillation.table import page
from titan_attent.data.io.atomic import write_atomically


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description="Does a student learn sooner from intermediate checkpoints of its source?",
        epilog="\n".join(f"  {name:22}{arm.about}" for name, arm in ARMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for sources, runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="PROBLEM")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="see below")
    parser.add_argument("--known", type=Path, nargs="+", default=[], metavar="FILE", help="results of other calls")
    parser.add_argument("--dry", action="store_true", help="run nothing: write the page of the finished runs")
    parser.add_argument("--publish", type=Path, help="write the page to this path with .md, .json and .png")
    return parser.parse_args(argv)


class Pages:
    """Writes the page of what has finished."""

    def __init__(self, args: argparse.Namespace, known: dict[Key, Result], command: str):
        self.args, self.known, self.command = args, known, command
        # All arms and seeds that have ever finished are on the page, whatever this call runs.
        seeds = sorted({*args.seeds, *(seed for _, _, seed in known)})
        self.keys: list[Key] = [(problem, arm, seed) for problem in PROBLEMS for arm in ARMS for seed in seeds]
        self.planned = len(seeds)

    def write(self) -> str:
        results = list(gather(self.args.output, self.keys, self.known).values())
        text = page(results, command=self.command, planned=self.planned)
        lines = ",\n".join(json.dumps(result) for result in results)
        content = f'{{"command": {json.dumps(self.command)}, "results": [\n{lines}\n]}}\n'
        picture = draw(results) if results else b""
        for stem in filter(None, (self.args.output / "distillation", self.args.publish)):
            for suffix, written in ((".md", text.encode()), (".json", content.encode()), (".png", picture)):
                write_atomically(stem.with_suffix(suffix), written)
        return text


def results_of(source: Source, keys: Sequence[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Run what ``keys`` name."""
    together = [key for key in keys if source.problem.together and not ARMS[key[1]].equal_flops]
    if together:
        numbers = run_together(source, {key[1]: ARMS[key[1]] for key in together})
        yield from ((key, numbers[key[1]]) for key in together)
    yield from ((key, run(source, ARMS[key[1]])) for key in keys if key not in together)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    command = shlex.join(
        ["python", "-m", "benchmarks.distillation", "--output", str(args.output), "--seeds", *map(str, args.seeds)]
    )
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = about_here()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        pages = Pages(args, read_known(args.known), command)
        text = pages.write()  # refuses runs of other sizes before the first one
        for seed in [] if args.dry else args.seeds:
            for problem in args.problems:
                keys: list[Key] = [(problem, arm, seed) for arm in args.arms]
                missing = [key for key in keys if key not in gather(args.output, keys, pages.known)]
                if not missing:
                    continue
                source = Source(PROBLEMS[problem], seed, args.output / "sources" / problem / f"seed-{seed}.pt")
                for key, numbers in results_of(source, missing):
                    save(args.output, key, numbers, about)
                    print(f"{problem}, {key[1]}, seed {seed}: {numbers['seconds']:.1f} s", flush=True)
                text = pages.write()
    except ValueError as error:
        print(f"distillation: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
