"""The instruction experiment: does teaching save steps where a pretrained model is fine-tuned on pairs?

    python -m benchmarks.instructions --output DIR [--seeds 0 1 2 3 4] [--publish docs/results/instructions]
        [--known docs/results/instructions.json]

A run is one (kind of pairs, clean or shuffled, rule, seed): the product's own command on one process, fp32, with
``unit = "document"``: examples are pairs, packed into windows. data.py defines the pairs, rules.py the runs.

    DIR/texts/, DIR/pairs/, DIR/data/          downloads, pairs, data sets
    DIR/base/seed-N/, DIR/scorers/             the pretrained models; the scorers' losses
    DIR/runs/KIND/CONDITION/RULE/seed-N/       config.toml, log.txt, tb/, teacher/trace.jsonl; result.json at its end
    DIR/results.json, DIR/table.md             all results so far

A second call resumes: runs with a result.json are kept, and those of published results (--known) are not repeated. A
seed is finished before the next one begins, and on SIGTERM the page of the finished runs is written. Cost: README.md.
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
from benchmarks.common.tables import write_page
from benchmarks.common.tasks import Task
from benchmarks.instructions.data import prepare
from benchmarks.instructions.measure import do
from benchmarks.instructions.rules import CONDITIONS, KINDS, RULES, base_task, corpus, rule_task, scorers_task
from benchmarks.instructions.table import charge, page


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description="Does teaching save steps in fine-tuning on instruction pairs?",
        epilog="\n".join(f"  {name:16}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="see below")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each; 0 only writes the page")
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--publish", type=Path, help="write the page and the results to this path with .md and .json")
    return parser.parse_args(argv)


Key = tuple[str, str, int]
"""Of a run: its corpus, rule and seed."""


def load_known(path: Path | None) -> dict[Key, dict[str, Any]]:
    """The published results by run; ValueError if the file holds none."""
    if path is None:
        return {}
    try:
        results = json.loads(path.read_bytes())["results"]
        return {(result["corpus"], result["rule"], result["seed"]): result for result in results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--known {path}: not a .json that --publish wrote: {error!r}") from error


def tasks_of(args: argparse.Namespace, seed: int, known: Collection[Key]) -> list[Task]:
    """The requested runs of a seed that are not ``known``, and the tasks that they need."""
    tasks: dict[str, Task] = {}
    for kind in args.kinds:
        for condition in CONDITIONS:
            for name in args.rules:
                if RULES[name].is_for(condition) and (corpus(kind, condition), name, seed) not in known:
                    own = rule_task(kind, condition, name, seed)
                    needed = [base_task(seed), *([scorers_task(kind, condition, seed)] if RULES[name].scorers else [])]
                    tasks |= {task.folder: task for task in [*needed, own]}
    return list(tasks.values())


def gather(output: Path, known: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """All results below ``output``, charged, and those that are ``known``; ValueError for other settings."""
    results, scorers = [], {}
    for path in sorted(output.glob("runs/*/*/*/seed-*/result.json")):
        kind, condition, name, seed = *path.parts[-5:-2], int(path.parts[-2].removeprefix("seed-"))
        if name in RULES and (result := load_result(output, rule_task(kind, condition, name, seed))):
            results.append(result)
            if RULES[name].scorers:
                made = load_result(output, scorers_task(kind, condition, seed))
                if made is None:
                    results.pop()  # removed since
                else:
                    scorers[corpus(kind, condition), seed] = made
    measured = {(result["corpus"], result["rule"], result["seed"]): result for result in charge(results, scorers)}
    return [result for _, result in sorted((known | measured).items())]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    hide_gpus()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Without --jobs: the page of a call that only writes it names the command that makes its runs.
    command = shlex.join(
        ["python", "-m", "benchmarks.instructions", "--output", str(args.output), "--seeds", *map(str, args.seeds)]
    )
    failed: list[str] = []
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    starter = Forks(about_here(), do)
    try:
        known = load_known(args.known)
        gather(args.output, known)  # before the first run: refuses runs with other settings
        try:
            for seed in args.seeds if args.jobs > 0 else []:
                prepare(args.output, seed)
                failed += run_tasks(args.output, tasks_of(args, seed, known), jobs=args.jobs, starter=starter)
        finally:  # finished runs are on the page even after an interrupt
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            results = gather(args.output, known)
            text = page(results, command=command, planned=len(args.seeds))
            write_page(args.output, text, results, command=command, publish=args.publish)
    except (ValueError, RuntimeError) as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
