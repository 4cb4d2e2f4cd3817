"""The arms of the text experiment, and the tasks of their runs. Pure.

A student is the flavor ``bench``, its source ``bench_source`` of six times as many parameters. Students learn from
targets on disk: 32 ids per token, drawn once from each checkpoint of a seed's source for all of its students.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.common.rules import UNIFORM
from benchmarks.common.tasks import Task, divisor, run_config
from benchmarks.distillation_text.data import CPP, PYTHON

STUDENTS = 5
NUM_IDS = 32
LABEL_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
SHARE = 0.7
"""Steps of a distilled student, as a share of those of the labels alone: the goal is 30% fewer steps."""
LEARNING_RATE, SOURCE_LEARNING_RATE = 1e-2, 3e-3
DRAWS, HALF, DOUBLE, ARGMAX = "draws", "T0.5", "T2", "argmax"
TARGETS: dict[str, tuple[str, ...]] = {
    DRAWS: ("--ids", str(NUM_IDS)),
    HALF: ("--ids", str(NUM_IDS), "--temperature", "0.5"),
    DOUBLE: ("--ids", str(NUM_IDS), "--temperature", "2"),
    ARGMAX: ("--kind", "argmax"),
}
"""Kind of the targets -> arguments of the command that writes them."""
TEMPERATURES = {DRAWS: 1.0, HALF: 0.5, DOUBLE: 2.0, ARGMAX: 0.0}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the runs.

    Attributes:
        steps: of the labels alone, and of a source.
        checkpoints: of a source, evenly spaced.
        flavors: of student and source.
    """

    steps: int = 600
    checkpoints: int = 6
    student: str = "bench"
    source: str = "bench_source"

    @property
    def save_every(self) -> int:
        return self.steps // self.checkpoints


FULL = Scale()
REHEARSAL = Scale(steps=20, checkpoints=2, student="scorer_xs", source="scorer_s")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table.

    Attributes:
        schedule: of ``[distillation]``; "" for the labels alone.
        label_weight: a.
        kind: of the targets, a key of ``TARGETS``.
        share: of the full steps.
    """

    about: str
    schedule: str = ""
    label_weight: float = 0.5
    kind: str = DRAWS
    share: float = SHARE


LABELS = "labels"
ARMS: dict[str, Arm] = {
    LABELS: Arm(about="cross-entropy with the labels, all steps", share=1.0),
    "labels, 0.7": Arm(about=f"the same in {SHARE} of the steps"),
    **{
        f"{schedule}, a = {a:g}": Arm(about=f"{about}; the labels have weight {a:g}", schedule=schedule, label_weight=a)
        for schedule, about in (
            ("final", "the source's last checkpoint"),
            ("even", "all of its checkpoints in turn"),
            ("two_shot", "the checkpoint in its steepest fall, then the last"),
        )
        for a in LABEL_WEIGHTS
    },
    **{
        f"final, a = 0.5, {kind}": Arm(
            about=f"the last checkpoint at temperature {TEMPERATURES[kind]:g}", schedule="final", kind=kind
        )
        for kind in (HALF, DOUBLE, ARGMAX)
    },
}


def checkpoints_of(schedule: str, scale: Scale) -> list[int]:
    """The source's checkpoints whose targets an arm may read."""
    steps = [scale.save_every * (i + 1) for i in range(scale.checkpoints)]
    return steps[-1:] if schedule == "final" else steps


def _config(folder: str, *, seed: int, steps: int, lr: float, flavor: str) -> dict[str, dict[str, Any]]:
    config = run_config(folder, data="clean", teacher=UNIFORM, seed=seed, steps=steps, lr=lr)
    config["model"]["flavor"] = flavor
    config["data"] |= {"validation_path": "validation", "num_workers": 0}
    config["validation"]["freq"] = divisor(steps, at_most=max(1, steps // 6))
    return config


def source_task(seed: int, scale: Scale) -> Task:
    """Trains a source, and saves its checkpoints."""
    folder = f"source/seed-{seed}"
    config = _config(folder, seed=seed, steps=scale.steps, lr=SOURCE_LEARNING_RATE, flavor=scale.source)
    config["checkpoint"] = {
        "enable": True,
        "interval": scale.save_every,
        "keep_latest_k": 0,
        "last_save_model_only": True,
    }
    return Task(folder=folder, module="titan_attent.train", config=config, labels={"role": "source", "seed": seed})


def targets_folder(seed: int, kind: str) -> str:
    return f"targets/seed-{seed}/{kind}"


def targets_task(seed: int, kind: str, step: int, scale: Scale) -> Task:
    """Writes the targets of one checkpoint."""
    source, folder = source_task(seed, scale), f"targets/seed-{seed}/commands/{kind}-{step}"
    config = _config(folder, seed=seed, steps=scale.steps, lr=SOURCE_LEARNING_RATE, flavor=scale.source)
    config["checkpoint"] = {"enable": False, "initial_load_path": f"{source.folder}/checkpoint/step-{step}"}
    return Task(
        folder=folder,
        module="titan_attent.score",
        arguments=("targets", "--output", targets_folder(seed, kind), *TARGETS[kind]),
        config=config,
        labels={"role": "targets", "seed": seed, "kind": kind, "step": step},
        needs=(source.folder,),
    )


def arm_task(name: str, seed: int, scale: Scale) -> Task:
    """Trains a student."""
    arm, folder = ARMS[name], f"runs/{name.replace(', ', '_').replace(' = ', '')}/seed-{seed}"
    steps = round(arm.share * scale.steps)
    config = _config(folder, seed=seed, steps=steps, lr=LEARNING_RATE, flavor=scale.student)
    needs: list[str] = []
    if arm.schedule:
        source = source_task(seed, scale)
        config["distillation"] = {
            "schedule": arm.schedule,
            "source": f"{source.folder}/checkpoint",
            "flavor": scale.source,
            "targets": targets_folder(seed, arm.kind),
            "label_weight": arm.label_weight,
            "temperature": TEMPERATURES[arm.kind],
            "students": STUDENTS,
        }
        needs = [targets_task(seed, arm.kind, step, scale).folder for step in checkpoints_of(arm.schedule, scale)]
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=config,
        labels={"role": "student", "arm": name, "seed": seed},
        needs=tuple(needs),
    )


def tasks_of(arms: list[str], seed: int, scale: Scale) -> list[Task]:
    """The runs of a seed, each after those that it needs."""
    tasks: dict[str, Task] = {}
    for name in arms:
        arm = ARMS[name]
        if arm.schedule:
            needed = [source_task(seed, scale)]
            needed += [targets_task(seed, arm.kind, step, scale) for step in checkpoints_of(arm.schedule, scale)]
            tasks |= {task.folder: task for task in needed}
        own = arm_task(name, seed, scale)
        tasks[own.folder] = own
    return list(tasks.values())


DOMAINS = {PYTHON: "Python, as in training", CPP: "C++ headers"}
