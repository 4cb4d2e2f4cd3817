"""What task vectors and means of checkpoints do, on small models.

    python -m benchmarks.editing --output outputs/editing [--publish docs/results/editing]

    languages     task addition and negation with aligned, irrelevant and contradictory languages; five seeds
    unlearning    one package of the standard library, against a random vector and gradient ascent; three seeds
    means         of the last checkpoints, against runs that decay, at equal steps; three seeds

    DIR/languages/seed-N/, DIR/packages/seed-N/    data sets
    DIR/PART/seed-N/RUN/                           the trainings; DIR/PART/seed-N/measured/ the edits' losses

A second call resumes: tasks with a result.json are kept, and those of published results (--known) are not repeated.
Runs use one core. Cost: README.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.forks import Forks, hide_gpus
from benchmarks.common.runner import about_here, load_result, run_tasks
from benchmarks.common.tables import write_page
from benchmarks.common.tasks import Task
from benchmarks.editing.edits import do
from benchmarks.editing.languages import write_languages
from benchmarks.editing.packages import write_packages
from benchmarks.editing.page import page
from benchmarks.editing.runs import MEASURE, PARTS, SEEDS, tasks_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the data, the runs and results.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: as many as a part needs")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each; 0 only writes the page")
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--publish", type=Path, help="write the page and the results to this path with .md and .json")
    args = parser.parse_args(argv)
    hide_gpus()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    if args.known:
        published = json.loads(args.known.read_bytes())["results"]
        results = {(result["part"], result["seed"]): result for result in published}
    wanted = [(part, seed) for part in args.parts for seed in args.seeds or range(SEEDS[part])]
    tasks: dict[str, Task] = {}
    for part, seed in wanted:
        if (part, seed) not in results:
            tasks |= {task.folder: task for task in tasks_of(part, seed)}
            if args.jobs > 0:
                write = {"languages": write_languages}.get(part, write_packages)
                place = "languages/seed-{}/data" if part == "languages" else "packages/seed-{}"
                write(args.output / place.format(seed), seed)
    failed: list[str] = []
    try:
        if args.jobs > 0:
            failed = run_tasks(args.output, list(tasks.values()), jobs=args.jobs, starter=Forks(about_here(), do))
        for task in tasks.values():
            if task.module == MEASURE and (result := load_result(args.output, task)):
                results[result["part"], result["seed"]] = result
    except ValueError as error:
        print(f"editing: {error}", file=sys.stderr)
        return 2
    ordered = [results[key] for key in sorted(results)]
    command = "python -m benchmarks.editing --output outputs/editing --publish docs/results/editing"
    text = page(ordered, command=command) + "\n" if ordered else ""
    write_page(args.output, text, ordered, command=command, publish=args.publish if ordered else None)
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
