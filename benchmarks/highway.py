"""Highway backpropagation: what it does to the validation loss, and which seconds it saves.

    python benchmarks/highway.py --output DIR [--seeds 0 1 2] [--rules ...] [--steps 600] [--lr 1e-2] [--jobs 2]

A run is one (rule, seed): the product's own command on one process, fp32, a three-layer decoder of 0.9 M parameters, 32
rows of 96 tokens a step of the Python standard library's sources, every row alike (``strategy = "uniform"``), a
learning rate that falls linearly to zero at the run's own end, validation on held-out rows. Rules differ in
``[backward]`` and, the last one, in their steps. A seed is that of model and data order.

``exact_fewer`` is backpropagation with as many steps as the seconds of ``highway_0`` buy, fully decayed: what the saved
seconds are worth without the method. Its steps come from the medians of both, so it runs after them. What cutting the
backward off below the last n blocks would do is not among the rules.

    DIR/corpora/                      the data sets (corpora.py)
    DIR/runs/RULE/seed-0/             config.toml, log.txt, tb/; result.json once it has finished
    DIR/table.md                      all that has finished so far

Called again, it goes on: what has a result.json is kept, what was interrupted starts again. ``--jobs 1`` on an idle
machine for the seconds; with more runs side by side only the losses count. Cost: 600 steps take three minutes of one
CPU core.
"""

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convergence_rules import LEARNING_RATE, Task, run_config
from convergence_runs import load_result, machine, run_tasks
from corpora import build_corpora

from titan_attent.data.format import write_atomically
from titan_attent.report import read_run

SECONDS = "time_metrics/end_to_end(s)"
CONTROL, FEWER, PACE = "exact", "exact_fewer", "highway_0"
ROUND_TO = 20
"""The steps of ``exact_fewer`` are a multiple: torchtitan validates and logs at multiples only."""


@dataclass(frozen=True)
class Rule:
    about: str
    backward: dict[str, Any]


def highway(iterations: int, exact_fraction: float) -> dict[str, Any]:
    cut = "block" if iterations else "branch"
    return {"method": "highway", "iterations": iterations, "cut": cut, "exact_fraction": exact_fraction}


RULES = {
    CONTROL: Rule("backpropagation: the control", {}),
    PACE: Rule("no rounds, cut at branches, the last quarter exact", highway(0, 0.25)),
    "highway_0_throughout": Rule("no rounds, cut at branches, no exact part", highway(0, 0.0)),
    "highway_1": Rule("one round, cut at blocks, the last quarter exact", highway(1, 0.25)),
    FEWER: Rule("backpropagation with the seconds of highway_0", {}),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What Highway backpropagation does to the validation loss, and which seconds it saves.",
        epilog="\n".join(f"  {name:22}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="see below")
    parser.add_argument("--steps", type=int, default=600, help=f"of a run; a multiple of {ROUND_TO}")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate of every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each; 0 only makes the table")
    args = parser.parse_args(argv)
    if args.steps < ROUND_TO or args.steps % ROUND_TO:
        parser.error(f"--steps {args.steps}: give a multiple of {ROUND_TO}")
    if FEWER in args.rules and not {CONTROL, PACE} <= set(args.rules):
        parser.error(f"--rules {FEWER}: its steps follow from {CONTROL} and {PACE}; name these, too")
    return args


def task_of(name: str, seed: int, *, steps: int, lr: float) -> Task:
    folder = f"runs/{name}/seed-{seed}"
    config = run_config(folder, data="clean", teacher={"strategy": "uniform"}, seed=seed, steps=steps, lr=lr)
    if RULES[name].backward:
        config["backward"] = RULES[name].backward
    return replace(Task(folder=folder, module="titan_attent.train", config=config), labels={"rule": name, "seed": seed})


def step_seconds(output: Path, task: Task) -> list[float]:
    """Of the step, in each logged stretch but the first two, in which it starts and compiles."""
    return list(read_run(output / task.folder).scalars[SECONDS].values())[2:]


def found(output: Path, name: str, seeds: Sequence[int], *, steps: int, lr: float) -> dict[int, dict[str, Any]]:
    """Seed -> what a run ended with, of those that have finished."""
    results = {}
    for seed in seeds:
        task = task_of(name, seed, steps=steps, lr=lr)
        if (result := load_result(output, task)) is not None:
            seconds = step_seconds(output, task)
            total = statistics.mean(seconds) * steps
            results[seed] = {
                "loss": result["final_validation_loss"],
                "median": statistics.median(seconds),
                "total": total,
            }
    return results


def fewer_steps(output: Path, seeds: Sequence[int], *, steps: int, lr: float) -> int:
    """What the seconds of :data:`PACE` buy of backpropagation; 0 where one of the two has not finished."""
    pace, control = (found(output, name, seeds, steps=steps, lr=lr) for name in (PACE, CONTROL))
    if not (pace and control):
        return 0
    share = statistics.median(r["total"] for r in pace.values()) / statistics.median(
        r["total"] for r in control.values()
    )
    return max(ROUND_TO, min(steps, round(share * steps / ROUND_TO) * ROUND_TO))


def table(output: Path, args: argparse.Namespace, fewer: int) -> str:
    """Markdown: final validation losses, their differences to the control seed by seed, seconds."""
    settings = {"lr": args.lr}
    control = found(output, CONTROL, args.seeds, steps=args.steps, **settings)
    header = [
        "rule",
        "steps",
        *(f"seed {seed}" for seed in args.seeds),
        "difference",
        "seconds a step",
        "seconds saved",
    ]
    lines = [header, ["---"] * len(header)]
    for name in args.rules:
        steps = fewer if name == FEWER else args.steps
        own = found(output, name, args.seeds, steps=steps, **settings) if steps else {}
        if not own:
            continue
        shared = sorted(own.keys() & control.keys())
        differences = [own[seed]["loss"] - control[seed]["loss"] for seed in shared]
        saved = [1 - own[seed]["total"] / control[seed]["total"] for seed in shared]
        spread = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        compared = name != CONTROL and bool(shared)
        lines.append(
            [
                name,
                str(steps),
                *(f"{own[seed]['loss']:.4f}" if seed in own else "" for seed in args.seeds),
                f"{statistics.mean(differences):+.4f}{spread}" if compared else "",
                f"{statistics.median(result['median'] for result in own.values()):.4f}",
                f"{statistics.median(saved):.1%}" if compared else "",
            ]
        )
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    about = "\n".join(f"- `{name}`: {RULES[name].about}" for name in args.rules)
    return (
        f"{rows}\n\n{about}\n\nFinal validation loss in nats a token. Difference to `{CONTROL}`: mean over the seeds ± "
        "standard deviation. Seconds a step: median over the logged stretches. Saved: of all seconds in steps, median "
        f"over the seeds, start excluded. {args.jobs or 'An unknown number'} side by side on {machine()}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    settings = {"lr": args.lr}
    failed: list[str] = []
    try:
        build_corpora(args.output / "corpora")
        if args.jobs > 0:
            # Rule after rule within a seed: what drifts on the machine falls on all.
            rules = [name for name in args.rules if name != FEWER]
            tasks = [task_of(name, seed, steps=args.steps, **settings) for seed in args.seeds for name in rules]
            failed += run_tasks(args.output, tasks, jobs=args.jobs)
        fewer = fewer_steps(args.output, args.seeds, steps=args.steps, **settings) if FEWER in args.rules else 0
        if args.jobs > 0 and fewer:
            tasks = [task_of(FEWER, seed, steps=fewer, **settings) for seed in args.seeds]
            failed += run_tasks(args.output, tasks, jobs=args.jobs)
        text = table(args.output, args, fewer)
    except (ValueError, RuntimeError) as error:
        print(f"highway: {error}", file=sys.stderr)
        return 2
    write_atomically(args.output / "table.md", text.encode())
    print(text)
    print("\n".join(f"failed: {folder}" for folder in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
