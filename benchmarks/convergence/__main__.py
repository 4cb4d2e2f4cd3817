"""The convergence benchmark: the effect of each teaching rule on the validation loss, on clean and on dirty text.

    python -m benchmarks.convergence --output DIR [--seeds 0 1 2] [--rules ...] [--corpora ...] [--steps 600] [--jobs 2]

A run is one (corpus, rule, seed): the product's own command on one process, fp32, a three-layer decoder, 32 rows of 96
tokens per step, a learning rate that falls linearly to zero at the run's own end, validation on the same held-out rows.
rules.py defines the rules; the seed sets the model, the data order and the teacher.

    DIR/corpora/                      the data sets (corpora/stdlib_code.py), equal for all runs
    DIR/reference/seed-0/             a small model of trusted text, and its losses on each corpus, for ``excess_loss``
    DIR/runs/CORPUS/RULE/seed-0/      config.toml, log.txt, tb/, teacher/trace.jsonl; result.json once it has finished
    DIR/results.json, DIR/table.md    all results so far

A second call resumes: runs with a result.json are kept, interrupted ones start again.

Compute is counted in step-equivalents: a training step is one, a forward pass over a batch a third. Cost: README.md.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.runner import run_tasks
from benchmarks.common.tasks import LEARNING_RATE
from benchmarks.common.torchrun import Torchrun
from benchmarks.convergence.rules import RULES, reference_task, rule_task, score_task
from benchmarks.convergence.table import gather, report
from benchmarks.corpora.stdlib_code import CORPORA, build_corpora


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description="Validation loss of every teaching rule on every corpus.",
        epilog="\n".join(f"  {name:22}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    by_default = [name for name, rule in RULES.items() if rule.by_default]
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=by_default, metavar="RULE", help="see below")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), metavar="CORPUS")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run; below 100 or a multiple of 100")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate of every run")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, one core each; 0 only writes the table")
    args = parser.parse_args(argv)
    if args.steps < 2 or (args.steps > 100 and args.steps % 100):
        parser.error(f"--steps {args.steps}: give a number from 2 to 100, or a multiple of 100")
    return args


def run_all(args: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """References, their scores, then the runs, seed by seed; returns the folders of failed tasks."""
    pairs = [(corpus, seed) for seed in args.seeds for corpus in args.corpora]
    batches = [[rule_task(corpus, name, seed, **settings) for corpus, seed in pairs for name in args.rules]]
    if any(RULES[name].scorers for name in args.rules):
        models = [reference_task(seed, **settings) for seed in args.seeds]
        batches = [models, [score_task(corpus, seed, **settings) for corpus, seed in pairs], *batches]
    return [folder for tasks in batches for folder in run_tasks(args.output, tasks, jobs=args.jobs, starter=Torchrun())]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended, too
    command = shlex.join(["python", "-m", "benchmarks.convergence", *(sys.argv[1:] if argv is None else argv)])
    settings: dict[str, Any] = {"steps": args.steps, "lr": args.lr}
    try:
        gather(args.output, **settings)  # before the first run: refuses a folder with other settings
        build_corpora(args.output / "corpora")
        try:
            failed = run_all(args, settings) if args.jobs > 0 else []
        finally:  # finished runs are in the tables even after an interrupt
            results = gather(args.output, **settings)
            text = report(args.output, results, command=command)
    except ValueError as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 2
    print(text)
    for folder in failed:
        print(f"failed: {args.output / folder / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
