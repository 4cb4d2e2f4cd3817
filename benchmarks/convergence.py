"""The convergence benchmark: what each teaching rule does to the validation loss, on clean and on dirty text.

    python benchmarks/convergence.py --output DIR [--seeds 0 1 2] [--rules ...] [--corpora ...] [--steps 600] [--jobs 2]

A run is one (corpus, rule, seed): the product's own command on one process, fp32, a three-layer decoder, 32 rows of 96
tokens a step, a learning rate that falls linearly to zero at the run's own end, validation on the same held-out rows.
All that tells two rules apart stands in ``RULES``; the seed of a run is that of model, data order and teacher.

    DIR/corpora/                      the data sets (corpora.py), equal for all runs
    DIR/reference/seed-0/             a small model of trusted text, and its losses on each corpus, for ``excess_loss``
    DIR/runs/CORPUS/RULE/seed-0/      config.toml, log.txt, tb/, teacher/trace.jsonl; result.json once it has finished
    DIR/results.json, DIR/table.md    all that has finished so far

Called again, it goes on: what has a result.json is kept, what was interrupted starts again.

Compute is counted in step-equivalents: a training step is one, a forward pass over a batch a third. Cost: README.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from corpora import CORPORA, KINDS, KINDS_FILE, Sizes, build_corpora

from titan_attent.data.format import write_atomically
from titan_attent.job_config import TeacherConfig
from titan_attent.report import VALIDATION, read_run

ROOT = Path(__file__).resolve().parents[1]

BATCH_SIZE = 32
LEARNING_RATE = 1e-2
"""The best of 3e-3, 6e-3 and 1e-2 for the control on clean text."""
FORWARD_COST = 1 / 3
"""Of a training step, for the same batch."""

COMMON: dict[str, Any] = {
    "warmup_passes": 1,
    "ratio_schedule": "constant",
    "initial_ratio": 0.5,
    "interval_schedule": "fixed",
    "initial_interval": 1,
    "max_interval": 1,
    "anneal_fraction": 0.0,
}
"""The teacher of every rule but ``defaults``, as in the measurements that this benchmark repeats."""

REFERENCE = "<reference>"
"""Stands for the losses of this seed's reference model on this corpus."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the table: ``[teacher]`` overrides, and the steps as a multiple of ``--steps``."""

    about: str
    teacher: dict[str, Any]
    steps: float = 1.0
    by_default: bool = True

    @property
    def needs_reference(self) -> bool:
        return REFERENCE in self.teacher.values()


RULES = {
    "uniform": Rule(about="everything, always: the control", teacher={"strategy": "uniform"}),
    "uniform_half": Rule(
        about="the control with half the steps, fully decayed", teacher={"strategy": "uniform"}, steps=0.5
    ),
    "uniform_scored": Rule(
        about="the control with the compute of a rule that scores once", teacher={"strategy": "uniform"}, steps=1.1
    ),
    "uniform_epochs": Rule(
        about="the control with as many epochs as a teacher of ratio 0.5 covers: 1.68 times the compute",
        teacher={"strategy": "uniform"},
        steps=1.68,
        by_default=False,
    ),
    "random": Rule(about="a random half, anew each round", teacher=COMMON | {"strategy": "random"}),
    "hard": Rule(about="the half of largest loss", teacher=COMMON | {"strategy": "hard"}),
    "soft": Rule(about="a weighted draw of half by loss", teacher=COMMON | {"strategy": "soft"}),
    "threshold": Rule(
        about="all but half of the rows below the mean loss (InfoBatch)", teacher=COMMON | {"strategy": "threshold"}
    ),
    "functional_gradient": Rule(
        about="the half of largest functional gradient",
        teacher=COMMON | {"strategy": "hard", "importance": "functional_gradient"},
    ),
    "learnability": Rule(
        about="the half of largest learnability, scored once",
        teacher=COMMON | {"strategy": "hard", "importance": "learnability", "scoring": "forward_once"},
    ),
    "learnability_adaptive": Rule(
        about="the same with a share of the data that adapts",
        teacher=COMMON
        | {
            "strategy": "hard",
            "importance": "learnability",
            "scoring": "forward_once",
            "ratio_schedule": "adaptive",
            "initial_ratio": 0.1,
            "final_ratio": 1.0,
        },
    ),
    "attainment_adaptive": Rule(
        about="the largest attainments, as many as their effective sample size says, scored once",
        teacher=COMMON
        | {
            "strategy": "hard",
            "importance": "attainment",
            "scoring": "forward_once",
            "ratio_schedule": "adaptive",
            "initial_ratio": 0.1,
            "final_ratio": 1.0,
        },
    ),
    "learnability_rescored": Rule(
        about="learnability, scored before each round",
        teacher=COMMON | {"strategy": "hard", "importance": "learnability", "scoring": "forward"},
        by_default=False,
    ),
    "excess_loss": Rule(
        about="the half of largest loss above that of a model of trusted text",
        teacher=COMMON | {"strategy": "hard", "importance": "excess_loss", "reference_path": REFERENCE},
    ),
    "excess_loss_pools": Rule(
        about="every step the half of the next 64 rows with the largest loss above that model's, no warm-up",
        teacher=COMMON
        | {"strategy": "hard", "importance": "excess_loss", "reference_path": REFERENCE}
        | {"scoring": "forward", "pool_size": 2 * BATCH_SIZE, "warmup_passes": 0},
    ),
    "defaults": Rule(about="[teacher] left empty", teacher={}, by_default=False),
}

REFERENCE_STEPS = 0.5
"""Of the reference model, as a multiple of ``--steps``."""


def why_not_available(rule: Rule) -> str:
    """What the installed package lacks for ``rule``; empty if nothing."""
    known = {field.name for field in fields(TeacherConfig)}
    if missing := sorted(rule.teacher.keys() - known):
        return "[teacher] has no " + ", ".join(missing)
    try:
        TeacherConfig(**rule.teacher).validate()
    except ValueError as error:
        return str(error)
    if rule.needs_reference and importlib.util.find_spec("titan_attent.score") is None:
        return "there is no titan_attent.score"
    return ""


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command: ``torchrun -m module`` with ``config`` as its TOML, in ``folder``; all paths are below DIR.

    ``config`` is also its identity: a result of another configuration is not this task's result.
    """

    folder: str
    module: str
    config: dict[str, dict[str, Any]]
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.config["training"]["steps"]


def divisor(number: int, *, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)


def run_config(
    folder: str, *, data: str, teacher: dict[str, Any], seed: int, steps: int, lr: float
) -> dict[str, dict[str, Any]]:
    """The TOML of a training run, section by section."""
    seq_len = Sizes().seq_len
    return {
        "job": {"dump_folder": folder, "custom_config_module": "titan_attent.job_config"},
        "model": {"name": "llama3_attent", "flavor": "bench"},
        "data": {"path": f"corpora/{data}", "validation_path": "corpora/validation", "num_workers": 1, "seed": seed},
        "teacher": teacher | {"trace": True, "seed": seed},
        "training": {
            "local_batch_size": BATCH_SIZE,
            "seq_len": seq_len,
            "steps": steps,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": lr},
        "lr_scheduler": {"warmup_steps": max(1, steps // 20), "decay_type": "linear", "min_lr_factor": 0.0},
        # torchtitan logs and validates at multiples only: divisors, so that the last step is among them.
        "metrics": {"log_freq": divisor(steps, at_most=10), "enable_tensorboard": True},
        "validation": {
            "enable": True,
            "local_batch_size": BATCH_SIZE,
            "seq_len": seq_len,
            "freq": divisor(steps, at_most=100),
            "steps": -1,
        },
        "checkpoint": {"enable": False},
        "activation_checkpoint": {"mode": "none"},
        "debug": {"seed": seed},
    }


def rule_task(corpus: str, name: str, seed: int, *, steps: int, lr: float) -> Task:
    rule, folder = RULES[name], f"runs/{corpus}/{name}/seed-{seed}"
    losses = score_task(corpus, seed, steps=steps, lr=lr).config["teacher"]["reference_path"]
    teacher = {key: losses if value == REFERENCE else value for key, value in rule.teacher.items()}
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=run_config(
            folder, data=corpus, teacher=teacher, seed=seed, steps=max(1, round(rule.steps * steps)), lr=lr
        ),
        labels={"corpus": corpus, "rule": name, "seed": seed},
    )


def reference_task(seed: int, *, steps: int, lr: float) -> Task:
    """The reference model: uniform on trusted text, its weights kept."""
    folder, steps = f"reference/seed-{seed}/model", max(1, round(REFERENCE_STEPS * steps))
    config = run_config(folder, data="trusted", teacher={"strategy": "uniform"}, seed=seed, steps=steps, lr=lr)
    config["checkpoint"] = {"enable": True, "interval": steps, "last_save_model_only": True}
    return Task(folder=folder, module="titan_attent.train", config=config)


def score_task(corpus: str, seed: int, *, steps: int, lr: float) -> Task:
    """The reference model's losses on a corpus, written to ``teacher.reference_path``."""
    reference, folder = reference_task(seed, steps=steps, lr=lr), f"reference/seed-{seed}/{corpus}"
    teacher = {"strategy": "uniform", "reference_path": f"{folder}/losses"}
    config = run_config(folder, data=corpus, teacher=teacher, seed=seed, steps=steps, lr=lr)
    weights = f"{reference.folder}/checkpoint/step-{reference.steps}"
    config["checkpoint"] = {"enable": True, "initial_load_path": weights, "initial_load_model_only": True}
    return Task(folder=folder, module="titan_attent.score", config=config)


def load_result(output: Path, task: Task) -> dict[str, Any] | None:
    """The task's result, None if it has not finished; ValueError if it was another task's."""
    path = output / task.folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    then, now = (
        {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}
        for config in (result["config"], task.config)
    )
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        was, would = ({key: config.get(key) for key in changed} for config in (then, now))
        raise ValueError(
            f"{path.parent} was measured with {was}, where {would} is asked for: name another --output, or remove this "
            "folder"
        )
    return result


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    task: Task
    process: subprocess.Popen[bytes]
    start: float


def run_tasks(output: Path, tasks: Sequence[Task], *, jobs: int) -> list[str]:
    """Run what has no result yet, ``jobs`` at a time; returns the folders of those that failed.

    When it is interrupted the commands end with it, and leave no result.
    """
    pending = [task for task in tasks if load_result(output, task) is None]
    running: list[Running] = []
    failed: list[str] = []
    begin, total = time.monotonic(), len(pending)
    if len(tasks) > total:
        print(f"{len(tasks) - total} of {len(tasks)} have finished before", flush=True)
    try:
        while pending or running:
            while pending and len(running) < jobs:
                running.append(start(output, pending.pop(0)))
            time.sleep(0.1)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                seconds = time.monotonic() - run.start
                problem = finish(output, run.task, code=run.process.returncode, seconds=seconds)
                if problem:
                    failed.append(run.task.folder)
                done = total - len(pending) - len(running)
                left = (time.monotonic() - begin) / done * (total - done) / 60
                text = problem or f"{seconds:.0f} s"
                print(f"[{done}/{total}] {run.task.folder}: {text}; about {left:.0f} min left", flush=True)
    finally:
        for run in running:
            run.process.terminate()  # torchrun ends its worker
        for run in running:
            run.process.wait()
    return failed


def start(output: Path, task: Task) -> Running:
    folder = output / task.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(task.config), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [*torchrun, "-m", task.module, "--job.config_file", f"{task.folder}/config.toml"],
            cwd=output,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
    return Running(task, process, time.monotonic())


def finish(output: Path, task: Task, *, code: int, seconds: float) -> str:
    """Write the result of a command that has ended; returns what went wrong."""
    folder = output / task.folder
    if code != 0:
        return f"exit code {code}, see {folder / 'log.txt'}"
    try:
        result = measure(output, task) if task.module == "titan_attent.train" else {}
    except ValueError as error:
        return f"{error}, see {folder / 'log.txt'}"
    about = {"config": task.config, "process_seconds": seconds, "machine": machine(), "versions": versions()}
    write_atomically(folder / "result.json", (json.dumps(task.labels | result | about, indent=1) + "\n").encode())
    return ""


def measure(output: Path, task: Task) -> dict[str, Any]:
    """What a training run left behind, as numbers."""
    run = read_run(output / task.folder)
    validation = run.scalars.get(VALIDATION, {})
    if task.steps not in validation:
        raise ValueError(f"no validation loss of step {task.steps}")
    last = {
        tag: list(values.values())[-1] for tag, values in run.scalars.items() if tag.startswith(("teacher/", "ledger/"))
    }
    scored = num_scored(task.config["teacher"], last, num_examples=Sizes().num_rows)
    return {
        "final_validation_loss": validation[task.steps],
        "best_validation_loss": min(validation.values()),
        "validation_loss": validation,
        "steps": task.steps,
        "tokens": task.steps * BATCH_SIZE * Sizes().seq_len,
        "wall_seconds": run.wall_seconds,
        "scoring_seconds": last.get("ledger/score_seconds", 0.0),
        "examples_scored": scored,
        "step_equivalents": task.steps + FORWARD_COST * scored / BATCH_SIZE,
        "trained_kinds": trained_kinds(output, task),
        "last": last,
    }


def num_scored(teacher: dict[str, Any], last: dict[str, float], *, num_examples: int) -> int:
    """Forward passes of examples that were only scored: the ledger's count, or one worked out from the rule."""
    if "ledger/examples_scored" in last:
        return round(last["ledger/examples_scored"])
    known = {field.name for field in fields(TeacherConfig)}
    config = TeacherConfig(**{key: value for key, value in teacher.items() if key in known})
    rounds = round(last.get("teacher/round", 0.0))
    passes = {"forward": rounds, "forward_once": min(1, rounds)}.get(getattr(config, "scoring", "train"), 0)
    return passes * num_examples


def trained_kinds(output: Path, task: Task) -> dict[str, float]:
    """Shares of the kinds of rows in what was trained after the first full pass; empty where it did not get there."""
    kinds = output / task.config["data"]["path"] / KINDS_FILE
    trace = output / task.folder / "teacher" / "trace.jsonl"
    if not (kinds.is_file() and trace.is_file()):
        return {}
    steps = [json.loads(line)["ids"] for line in trace.read_text(encoding="utf-8").splitlines()]
    ids = np.array(steps[Sizes().num_rows // BATCH_SIZE :], dtype=np.int64).ravel()
    counts = np.bincount(np.load(kinds)[ids], minlength=len(KINDS))
    return {kind: count / len(ids) for kind, count in zip(KINDS, counts.tolist(), strict=True)} if len(ids) else {}


def to_toml(config: dict[str, dict[str, Any]]) -> str:
    # JSON's strings, numbers and booleans are TOML's.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in config.items()
    )


def machine() -> str:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    name = f"{os.cpu_count()} x {model or platform.processor() or platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {name}" if torch.cuda.is_available() else name


def versions() -> dict[str, str]:
    import titan_attent

    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    own = {"titan_attent": titan_attent.__version__, "commit": git.stdout.strip(), "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in ("torch", "torchtitan", "numpy")}


# -- the table --------------------------------------------------------------------------------------------------------


def gather(output: Path, *, steps: int, lr: float) -> list[dict[str, Any]]:
    """All results below ``output``, in the order of the table; of ``excess_loss`` with what its reference cost."""
    results = []
    for name, rule in RULES.items():
        for corpus in CORPORA:
            folders = (output / "runs" / corpus / name).glob("seed-*")
            for seed in sorted(int(folder.name.removeprefix("seed-")) for folder in folders):
                result = load_result(output, rule_task(corpus, name, seed, steps=steps, lr=lr))
                if result is None:
                    continue
                if rule.needs_reference:
                    scores = load_result(output, score_task(corpus, seed, steps=steps, lr=lr))
                    model = load_result(output, reference_task(seed, steps=steps, lr=lr))
                    if scores is None or model is None:
                        continue  # removed since
                    result["examples_scored"] += Sizes().num_rows
                    for key in ("scoring_seconds", "wall_seconds"):
                        result[key] += scores["process_seconds"]
                    result["step_equivalents"] += FORWARD_COST * Sizes().num_rows / BATCH_SIZE
                    result["reference_step_equivalents"] = model["steps"]
                    result["reference_seconds"] = model["wall_seconds"]
                results.append(result)
    return results


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: rules by corpora, mean ± standard deviation over the seeds and the difference to uniform.

    The difference is the mean over the seeds that both have. Where a cell has fewer seeds than the fullest one, their
    number stands behind it.
    """
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        seeds = losses.setdefault((result["rule"], result["corpus"]), {})
        seeds[result["seed"]] = result["final_validation_loss"]
    corpora = [corpus for corpus in CORPORA if any(corpus == key[1] for key in losses)]
    most = max(map(len, losses.values()), default=0)
    header = ["rule", *corpora, "step-equivalents", "seconds", "of them scoring"]
    lines = [header, ["---"] * len(header)]
    for rule in RULES:
        own = [result for result in results if result["rule"] == rule]
        if not own:
            continue
        controls = {corpus: losses.get(("uniform", corpus), {}) if rule != "uniform" else {} for corpus in corpora}
        cells = [cell(losses.get((rule, corpus), {}), controls[corpus], most=most) for corpus in corpora]
        reference = mean(result.get("reference_step_equivalents", 0) for result in own)
        compute = f"{mean(result['step_equivalents'] for result in own):.0f}"
        cells += [
            compute + (f" (+ {reference:.0f} reference)" if reference else ""),
            f"{mean(result['wall_seconds'] for result in own):.0f}",
            f"{mean(result['scoring_seconds'] for result in own):.1f}",
        ]
        lines.append([rule, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(own: dict[int, float], control: dict[int, float], *, most: int) -> str:
    if not own:
        return "-"
    text = f"{mean(own.values()):.3f}"
    if len(own) > 1:
        text += f" ± {statistics.stdev(own.values()):.3f}"
    if both := own.keys() & control.keys():
        text += f" ({mean(own[seed] - control[seed] for seed in both):+.3f})"
    return text + (f" [{len(own)} of {most} seeds]" if len(own) < most else "")


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def report(output: Path, results: Sequence[dict[str, Any]], *, not_available: dict[str, str], command: str) -> str:
    """Write results.json and table.md; returns the text of the latter."""
    seeds = sorted({result["seed"] for result in results})
    machines = sorted({result["machine"] for result in results})
    code = {json.dumps(result["versions"], sort_keys=True): result["versions"] for result in results}
    lines = [
        make_table(results),
        "",
        "Final validation loss on clean held-out text, nats a token: mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}, and the difference to uniform over the same seeds. Seconds are those of a run "
        "with its validations, beside others.",
        "",
        *(f"- {rule}: {RULES[rule].about}" for rule in RULES if any(rule == result["rule"] for result in results)),
        *(f"- {rule}: not available: {why}" for rule, why in not_available.items()),
        "",
        f"- {len(results)} runs; command: `{command}`",
        *(f"- machine: {name}" for name in machines),
        *("- " + ", ".join(f"{name} {version}" for name, version in entry.items()) for entry in code.values()),
    ]
    text = "\n".join(lines) + "\n"
    document = {
        "command": command,
        "machines": machines,
        "versions": list(code.values()),
        "not_available": not_available,
        "results": list(results),
    }
    write_atomically(output / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(output / "table.md", text.encode())
    return text


# -- the command ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Validation loss of every teaching rule on every corpus.",
        epilog="\n".join(f"  {name:22}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    by_default = [name for name, rule in RULES.items() if rule.by_default]
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=by_default, metavar="RULE", help="see below")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), metavar="CORPUS")
    parser.add_argument("--steps", type=int, default=600, help="of a run; below 100 or a multiple of 100")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate of every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each; 0 only makes the table")
    args = parser.parse_args(argv)
    if args.steps < 2 or (args.steps > 100 and args.steps % 100):
        parser.error(f"--steps {args.steps}: give a number from 2 to 100, or a multiple of 100")
    return args


def run_all(args: argparse.Namespace, rules: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """References, their scores, then the runs, seed by seed; returns the folders of what failed."""
    pairs = [(corpus, seed) for seed in args.seeds for corpus in args.corpora]
    batches = [[rule_task(corpus, name, seed, **settings) for corpus, seed in pairs for name in rules]]
    if any(RULES[name].needs_reference for name in rules):
        models = [reference_task(seed, **settings) for seed in args.seeds]
        batches = [models, [score_task(corpus, seed, **settings) for corpus, seed in pairs], *batches]
    return [folder for tasks in batches for folder in run_tasks(args.output, tasks, jobs=args.jobs)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    command = shlex.join(["python", "benchmarks/convergence.py", *(sys.argv[1:] if argv is None else argv)])
    settings: dict[str, Any] = {"steps": args.steps, "lr": args.lr}
    not_available = {name: why for name in args.rules if (why := why_not_available(RULES[name]))}
    for name, why in not_available.items():
        print(f"{name}: not available: {why}")
    rules = [name for name in args.rules if name not in not_available]
    try:
        gather(args.output, **settings)  # before the first run: refuses a folder of other settings
        build_corpora(args.output / "corpora")
        try:
            failed = run_all(args, rules, settings) if args.jobs > 0 else []
        finally:  # what has finished is kept when the rest is interrupted
            results = gather(args.output, **settings)
            text = report(args.output, results, not_available=not_available, command=command)
    except ValueError as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 2
    print(text)
    for folder in failed:
        print(f"failed: {args.output / folder / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
