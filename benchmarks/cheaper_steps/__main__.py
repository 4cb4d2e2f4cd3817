"""Cheaper steps by [freezing] and [highway]: their effect on the validation loss, and their savings.

    python -m benchmarks.cheaper_steps --output DIR --rules modules [--seeds 0 1 2] [--steps 600] [--lr 1e-2] [--jobs 1]

A run is one (rule, seed): the product's own command on one process, fp32, a three-layer decoder of 0.9 M parameters, 32
rows of 96 tokens per step from the Python standard library's sources, all trained (``strategy = "uniform"``). The
learning rate falls linearly to zero at the run's own end; validation is on held-out rows. The seed sets the model and
the data order. ``--rules`` takes names, or ``modules`` and ``highway`` for all rules of one method with its controls.
Warm-up and interval of ``[freezing]`` are shares of the steps (rules.py).

Controls: backpropagation through everything, for all steps and for as many as the FLOPs or the seconds of a rule allow,
fully decayed; the same layout with permuted eigenvalues; modules drawn at random; the top of the model alone. FLOPs are
those that the run counts (``freezing/saved_of_step``, ``highway/saved_of_step``), with probes charged. Steps that
follow from a rule are computed from the medians over its seeds, so these runs start after it.

    DIR/corpora/                      the data sets (corpora/stdlib_code.py)
    DIR/runs/RULE/seed-0/             config.toml, log.txt, tb/; result.json once it has finished
    DIR/table.md, table.json          all results so far, with a verdict per goal
    DIR/curves.png                    validation loss against FLOPs and against seconds

A second call resumes: runs with a result.json are kept, interrupted ones start again. A run uses the accelerator if
there is one; parallel runs share it. Measure seconds with ``--jobs 1`` on an idle machine; with parallel runs only the
losses and FLOPs are meaningful. Cost: 600 steps take three minutes of one CPU core.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cheaper_steps.curves import draw_curves
from benchmarks.cheaper_steps.rules import CONTROL, ROUND_TO, RULES, task
from benchmarks.cheaper_steps.table import rows_of, table, verdicts
from benchmarks.common.runner import load_result, machine, run_tasks
from benchmarks.common.tasks import LEARNING_RATE, Task
from benchmarks.common.torchrun import Torchrun
from benchmarks.corpora.stdlib_code import build_corpora
from titan_attent.data.io.atomic import write_atomically
from titan_attent.report import read_run

SECONDS = "time_metrics/end_to_end(s)"
SYSTEMS = ("freezing", "highway")
SAVED = ("of_backward", "of_step")
IS_EXACT = "highway/exact"
MIN_STEPS = 40


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cheaper_steps",
        description="Cheaper steps by [freezing] and [highway]: their effect on the validation loss, their savings.",
        epilog="\n".join(f"  {name:24}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=["modules", "highway"], metavar="RULE", help="see below")
    parser.add_argument("--steps", type=int, default=600, help=f"steps of a run; a multiple of {ROUND_TO}")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate of every run")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each; 0 only writes the table")
    args = parser.parse_args(argv)
    if args.steps < MIN_STEPS or args.steps % ROUND_TO:
        parser.error(f"--steps {args.steps}: give a multiple of {ROUND_TO}, at least {MIN_STEPS}")
    names = {CONTROL, *args.rules} | {name for name, rule in RULES.items() if rule.method in args.rules}
    if unknown := sorted(set(args.rules) - RULES.keys() - {"modules", "highway"}):
        parser.error(f"--rules {unknown[0]}: unknown; see --help")
    names |= {RULES[name].follows for name in names & RULES.keys()}
    args.rules = [name for name in RULES if name in names]
    return args


def numbers_of(scalars: dict[str, dict[int, float]], *, steps: int) -> dict[str, Any]:
    """The numbers of a run from its scalars, ``scalars[tag][step]``.

    Returns:
        of_backward, of_step: FLOPs saved, as shares of those of all its backward passes and of all its steps.
        step, cut_step: median seconds per step, over all logged spans of steps and over those that were not exact.
        seconds: of all steps, without the start.
        seconds_at, saved_at: step -> the seconds up to it, and the share of the steps' FLOPs saved up to it.
    """
    spans = scalars[SECONDS]
    paces, at = list(spans.values()), list(spans)
    paces = [*paces[2:3] * 2, *paces[2:]]  # the first two spans include start and compilation
    is_exact = scalars.get(IS_EXACT, {})
    cut = [pace for step, pace in list(zip(at, paces, strict=True))[2:] if not is_exact.get(step)]
    elapsed, seconds_at = 0.0, {0: 0.0}
    for (before, step), pace in zip(pairwise([0, *at]), paces, strict=True):
        elapsed += pace * (step - before)
        seconds_at[step] = elapsed

    def saved(key: str) -> dict[int, float]:
        tags = [tag for system in SYSTEMS if (tag := f"{system}/saved_{key}") in scalars]
        return {step: sum(scalars[tag].get(step, 0.0) for tag in tags) for step in at} if tags else {at[-1]: 0.0}

    return {key: saved(key)[at[-1]] for key in SAVED} | {
        "step": statistics.median(paces[2:]),
        "cut_step": statistics.median(cut or paces[2:]),
        "seconds": statistics.mean(paces[2:]) * steps,
        "seconds_at": seconds_at,
        "saved_at": {0: 0.0} | saved("of_step"),
    }


class Benchmark:
    """The tasks of a call and their results."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._read: dict[Path, dict[str, Any]] = {}

    def task(self, name: str, seed: int, steps: int) -> Task:
        return task(name, seed, steps=steps, lr=self.args.lr)

    def steps_of(self, name: str) -> int:
        """The steps of a rule; 0 where they follow from runs that have not finished."""
        rule = RULES[name]
        if not rule.follows:
            return self.args.steps
        pace, control = self.finished(rule.follows), self.finished(CONTROL)
        shared = pace.keys() & control.keys()
        if not shared:
            return 0
        if rule.by == "flops":
            share = 1 - statistics.median(pace[seed]["of_step"] for seed in shared)
        else:
            share = statistics.median(pace[seed]["seconds"] / control[seed]["seconds"] for seed in shared)
        return max(ROUND_TO, min(self.args.steps, round(share * self.args.steps / ROUND_TO) * ROUND_TO))

    def finished(self, name: str) -> dict[int, dict[str, Any]]:
        """Seed -> the numbers of a finished run: :func:`numbers_of`, its steps, loss (nats per token) and validation
        losses."""
        results: dict[int, dict[str, Any]] = {}
        steps = self.steps_of(name)
        for seed in self.args.seeds if steps else ():
            own = self.task(name, seed, steps)
            if (result := load_result(self.args.output, own)) is None:
                continue
            folder = self.args.output / own.folder
            if folder not in self._read:
                self._read[folder] = numbers_of(read_run(folder).scalars, steps=steps)
            losses = {int(step): loss for step, loss in result["validation_loss"].items()}
            about = {"steps": steps, "loss": result["final_validation_loss"], "validation_loss": losses}
            results[seed] = about | self._read[folder]
        return results

    def results(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Rule -> seed -> the numbers of a finished run; rules without finished runs are left out."""
        return {name: own for name in self.args.rules if (own := self.finished(name))}

    def run(self) -> list[str]:
        """Run rule after rule within a seed, so that drift of the machine affects all rules; then those that follow."""
        failed: list[str] = []
        for follows in (False, True):
            names = [name for name in self.args.rules if bool(RULES[name].follows) == follows]
            steps = {name: self.steps_of(name) for name in names}
            tasks = [self.task(name, seed, steps[name]) for seed in self.args.seeds for name in names if steps[name]]
            failed += run_tasks(self.args.output, tasks, jobs=self.args.jobs, starter=Torchrun())
        return failed

    def write(self) -> str:
        """Write the table, as Markdown and as JSON, and the picture; returns the Markdown."""
        output, results = self.args.output, self.results()
        where = f"{self.args.jobs} in parallel on {machine()}" if self.args.jobs else machine()
        text = table(results, seeds=self.args.seeds, where=where)
        about = {"steps": self.args.steps, "lr": self.args.lr, "where": where}
        content = about | {"rows": rows_of(results), "goals": verdicts(results)}
        write_atomically(output / "table.md", text.encode())
        write_atomically(output / "table.json", (json.dumps(content, indent=1) + "\n").encode())
        draw_curves(results, output / "curves.png")
        return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended, too
    benchmark, failed = Benchmark(args), []
    try:
        build_corpora(args.output / "corpora")
        if args.jobs > 0:
            failed = benchmark.run()
        print(benchmark.write())
    except (ValueError, RuntimeError) as error:
        print(f"cheaper_steps: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"failed: {folder}" for folder in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
