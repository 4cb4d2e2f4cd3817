"""What makes a step cheaper, [modules] and [backward]: what it does to the validation loss, and what it saves.

    python benchmarks/cheaper_steps.py --output DIR --rules modules [--seeds 0 1 2] [--steps 600] [--lr 1e-2] [--jobs 1]

A run is one (rule, seed): the product's own command on one process, fp32, a three-layer decoder of 0.9 M parameters, 32
rows of 96 tokens a step of the Python standard library's sources, every row alike (``strategy = "uniform"``), a
learning rate that falls linearly to zero at the run's own end, validation on held-out rows. A seed is that of model and
data order. ``--rules`` takes names, or ``modules`` and ``highway`` for all of one method with its controls.

Controls: backpropagation through everything, in all steps and in as many as the FLOPs or the seconds of a rule buy,
fully decayed; the same layout with eigenvalues that have changed places; modules drawn at random. FLOPs are those that
the run counts (``modules/saved_of_step``), probes charged. Steps that follow from a rule are taken from the medians
over its seeds, so that these runs come after it.

    DIR/corpora/                      the data sets (corpora.py)
    DIR/runs/RULE/seed-0/             config.toml, log.txt, tb/; result.json once it has finished
    DIR/table.md                      all that has finished so far

Called again, it goes on: what has a result.json is kept, what was interrupted starts again. ``--jobs 1`` on an idle
machine for the seconds; with more runs side by side only the losses and FLOPs count. Cost: 600 steps take three minutes
of one CPU core.
"""

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convergence_rules import LEARNING_RATE, Task, run_config
from convergence_runs import load_result, machine, run_tasks
from corpora import build_corpora
from evidence_numbers import interval

from titan_attent.data.format import write_atomically
from titan_attent.report import read_run

SECONDS = "time_metrics/end_to_end(s)"
SAVED = {"of_backward": "modules/saved_of_backward", "of_step": "modules/saved_of_step"}
CONTROL = "exact"
ROUND_TO = 20
"""Steps that follow from a rule are a multiple: torchtitan validates and logs at multiples only."""


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        about: what it does.
        method: "modules" or "highway"; empty for the control of both.
        sections: of the TOML.
        follows, by: the rule whose "flops" or "seconds" it has.
    """

    about: str
    method: str = ""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    follows: str = ""
    by: str = ""


def modules(policy: str, backward_share: float, **more: Any) -> dict[str, dict[str, Any]]:
    shared = {"warmup_steps": 60, "interval": 40}
    return {"modules": {"policy": policy, "backward_share": backward_share} | shared | more}


def highway(iterations: int, exact_fraction: float) -> dict[str, dict[str, Any]]:
    cut = "block" if iterations else "branch"
    return {"backward": {"method": "highway", "iterations": iterations, "cut": cut, "exact_fraction": exact_fraction}}


RULES = {
    CONTROL: Rule("backpropagation through everything: the control"),
    "mat": Rule("the modules of small eigenvalue frozen, 70% of the backward kept", "modules", modules("mat", 0.7)),
    "mat_shuffled": Rule("the same, eigenvalues of a kind shuffled", "modules", modules("mat", 0.7, shuffle=True)),
    "gradient_norm": Rule("drawn by gradient norm, 70% kept", "modules", modules("gradient_norm", 0.7)),
    "random": Rule("drawn at random, 70% kept", "modules", modules("random", 0.7)),
    "prefix": Rule("least eigenvalue lost per FLOP, 54% kept", "modules", modules("prefix", 0.54)),
    "prefix_shuffled": Rule(
        "the same, eigenvalues of a kind shuffled", "modules", modules("prefix", 0.54, shuffle=True)
    ),
    "prefix_late": Rule(
        "prefix, everything active in the last quarter", "modules", modules("prefix", 0.45, final_fraction=0.25)
    ),
    "flops_of_prefix": Rule("backpropagation with the FLOPs of prefix", "modules", follows="prefix", by="flops"),
    "seconds_of_prefix": Rule("backpropagation with the seconds of prefix", "modules", follows="prefix", by="seconds"),
    "highway_0": Rule("no rounds, the last quarter exact", "highway", highway(0, 0.25)),
    "highway_0_throughout": Rule("no rounds, no exact part", "highway", highway(0, 0.0)),
    "highway_1": Rule("one round, the last quarter exact", "highway", highway(1, 0.25)),
    "seconds_of_highway_0": Rule(
        "backpropagation with the seconds of highway_0", "highway", follows="highway_0", by="seconds"
    ),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What makes a step cheaper: what it does to the validation loss, and what it saves.",
        epilog="\n".join(f"  {name:22}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=["modules", "highway"], metavar="RULE", help="see below")
    parser.add_argument("--steps", type=int, default=600, help=f"of a run; a multiple of {ROUND_TO}, above 60")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate of every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each; 0 only makes the table")
    args = parser.parse_args(argv)
    if args.steps <= 60 or args.steps % ROUND_TO:
        parser.error(f"--steps {args.steps}: give a multiple of {ROUND_TO} above 60")
    wanted = {CONTROL, *args.rules} | {name for name, rule in RULES.items() if rule.method in args.rules}
    if unknown := sorted(set(args.rules) - RULES.keys() - {"modules", "highway"}):
        parser.error(f"--rules {unknown[0]}: unknown; see --help")
    wanted |= {RULES[name].follows for name in wanted & RULES.keys()}
    args.rules = [name for name in RULES if name in wanted]
    return args


class Benchmark:
    """The tasks of a call and what has come of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def task(self, name: str, seed: int, steps: int) -> Task:
        folder = f"runs/{name}/seed-{seed}"
        config = run_config(
            folder, data="clean", teacher={"strategy": "uniform"}, seed=seed, steps=steps, lr=self.args.lr
        )
        task = Task(folder=folder, module="titan_attent.train", config=config | RULES[name].sections)
        return replace(task, labels={"rule": name, "seed": seed})

    def steps_of(self, name: str) -> int:
        """0 where they follow from runs that have not finished."""
        rule = RULES[name]
        if not rule.follows:
            return self.args.steps
        pace, control = self.found(rule.follows), self.found(CONTROL)
        shared = pace.keys() & control.keys()
        if not shared:
            return 0
        if rule.by == "flops":
            share = 1 - statistics.median(pace[seed]["of_step"] for seed in shared)
        else:
            share = statistics.median(pace[seed]["seconds"] / control[seed]["seconds"] for seed in shared)
        return max(ROUND_TO, min(self.args.steps, round(share * self.args.steps / ROUND_TO) * ROUND_TO))

    def found(self, name: str) -> dict[int, dict[str, float]]:
        """Seed -> what a run ended with, of those that have finished."""
        results: dict[int, dict[str, float]] = {}
        steps = self.steps_of(name)
        for seed in self.args.seeds if steps else ():
            task = self.task(name, seed, steps)
            if (result := load_result(self.args.output, task)) is None:
                continue
            scalars = read_run(self.args.output / task.folder).scalars
            seconds = list(scalars[SECONDS].values())[2:]  # it starts and compiles in the first two logged stretches
            results[seed] = {
                "loss": result["final_validation_loss"],
                "step": statistics.median(seconds),
                "seconds": statistics.mean(seconds) * steps,
            } | {key: list(scalars.get(tag, {0: 0.0}).values())[-1] for key, tag in SAVED.items()}
        return results

    def run(self) -> list[str]:
        """Rule after rule within a seed, so that what drifts on the machine falls on all; then those that follow."""
        failed: list[str] = []
        for follows in (False, True):
            names = [name for name in self.args.rules if bool(RULES[name].follows) == follows]
            steps = {name: self.steps_of(name) for name in names}
            tasks = [self.task(name, seed, steps[name]) for seed in self.args.seeds for name in names if steps[name]]
            failed += run_tasks(self.args.output, tasks, jobs=self.args.jobs)
        return failed

    def table(self) -> str:
        """Markdown."""
        args, control = self.args, self.found(CONTROL)
        header = ["rule", "steps", *(f"seed {seed}" for seed in args.seeds), "difference", "share of the loss"]
        lines = [[*header, "backward FLOPs saved", "step FLOPs saved", "seconds a step", "seconds saved"]]
        lines.append(["---"] * len(lines[0]))
        for name in args.rules:
            if not (own := self.found(name)):
                continue
            shared = sorted(own.keys() & control.keys())
            differences = [own[seed]["loss"] - control[seed]["loss"] for seed in shared]
            base = statistics.mean(control[seed]["loss"] for seed in shared) if shared else 1.0
            saved = [1 - own[seed]["seconds"] / control[seed]["seconds"] for seed in shared]
            flops = [statistics.median(result[key] for result in own.values()) for key in SAVED]
            compared = name != CONTROL and bool(shared)
            counted = compared and any(flops)
            steps = self.steps_of(name)
            lines.append(
                [
                    name,
                    str(steps),
                    *(f"{own[seed]['loss']:.4f}" if seed in own else "" for seed in args.seeds),
                    interval(differences) if compared else "",
                    f"{statistics.mean(differences) / base:+.2%}" if compared else "",
                    *((f"{share:.1%}" if counted else "") for share in flops),
                    f"{statistics.median(result['step'] for result in own.values()):.4f}",
                    f"{statistics.median(saved):.1%}" if compared else "",
                ]
            )
        rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        about = "\n".join(f"- `{name}`: {RULES[name].about}" for name in args.rules)
        side_by_side = f"{args.jobs} side by side on " if args.jobs else ""
        return (
            f"{rows}\n\n{about}\n\nFinal validation loss in nats a token. Difference to `{CONTROL}`, seed by seed, "
            "with its 95% interval. FLOPs as the run counts them, probes charged. Seconds a step: median over the "
            f"logged stretches; saved: of all steps, start excluded. {side_by_side}{machine()}.\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    benchmark, failed = Benchmark(args), []
    try:
        build_corpora(args.output / "corpora")
        if args.jobs > 0:
            failed = benchmark.run()
        text = benchmark.table()
    except (ValueError, RuntimeError) as error:
        print(f"cheaper_steps: {error}", file=sys.stderr)
        return 2
    write_atomically(args.output / "table.md", text.encode())
    print(text)
    print("\n".join(f"failed: {folder}" for folder in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
