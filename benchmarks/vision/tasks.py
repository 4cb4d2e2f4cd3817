"""The tasks of the vision experiment: data, scorers and runs, each identified by its configuration. Pure."""

from typing import Any

from benchmarks.common.rules import EXPERT, PAIR, UNIFORM
from benchmarks.common.tasks import Task, divisor
from benchmarks.vision.rules import BATCH_SIZE, RULES, SETS, steps_of

WRONG_SHARE, COPIED_SHARE, NUM_COPIED = 0.2, 0.5, 64


def data_folder(name: str, condition: str, seed: int) -> str:
    return f"data/{name}/{condition}/seed-{seed}"


def data_task(name: str, condition: str, seed: int) -> Task:
    """Writes the images of a condition, and those of the amateur where a rule reads scorers."""
    task = SETS[name]
    of_condition: dict[str, dict[str, Any]] = {
        "wrong_labels": {"share": WRONG_SHARE},
        "copies": {"share": COPIED_SHARE, "num_copied": NUM_COPIED},
        "long_tail": {"ratio": task.tail},
    }
    about = {"set": name, "condition": condition, "seed": seed, "rows": task.rows, "sample": task.sample}
    return Task(
        folder=data_folder(name, condition, seed),
        module="data",
        config={"data": about | of_condition.get(condition, {})},
    )


def config_of(
    folder: str,
    *,
    data: str,
    test: str,
    flavor: str,
    vision: dict[str, Any],
    teacher: dict[str, Any],
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
) -> dict[str, dict[str, Any]]:
    """The TOML of a training run, section by section."""
    return {
        "job": {"dump_folder": folder},
        "model": {"name": "vit_attent", "flavor": flavor},
        "vision": dict(vision),
        "data": {"path": data, "validation_path": test, "num_workers": 0, "seed": seed},
        "teacher": teacher | {"trace": True, "seed": seed},
        "training": {"local_batch_size": batch_size, "steps": steps, "mixed_precision_param": "float32"},
        "optimizer": {"name": "AdamW", "lr": lr},
        "lr_scheduler": {"warmup_steps": max(1, steps // 20), "decay_type": "linear", "min_lr_factor": 0.0},
        "metrics": {"log_freq": divisor(steps, at_most=10), "enable_tensorboard": True},
        "validation": {
            "enable": True,
            "local_batch_size": 256,
            "freq": divisor(steps, at_most=steps // 10),
            "steps": -1,
        },
        "checkpoint": {"enable": False},
        "activation_checkpoint": {"mode": "none"},
        "debug": {"seed": seed},
    }


LAST_WEIGHTS = {"interval": 1_000_000, "enable": True, "last_save_model_only": True}
"""The ``[checkpoint]`` section that saves the final weights."""


def rule_run(name: str, condition: str, rule_name: str, seed: int, *, rows: int, lr: float | None = None) -> Task:
    """A run of a rule. ``rows``: of the training set. ``lr``: replaces the set's learning rate."""
    rule, task, folder = RULES[rule_name], SETS[name], f"runs/{name}/{condition}/{rule_name}/seed-{seed}"
    pair = losses_folder(name, condition, seed, "losses")
    config = config_of(
        folder,
        data=f"{data_folder(name, condition, seed)}/images",
        test=f"data/{name}/test/images",
        flavor=task.flavor,
        vision=task.vision,
        teacher=rule.teacher_with({EXPERT: f"{pair}/expert", PAIR: pair}),
        seed=seed,
        steps=steps_of(rule, task, rows=rows),
        batch_size=BATCH_SIZE,
        lr=task.lr if lr is None else lr,
    )
    if condition == "long_tail":
        config["checkpoint"] = dict(LAST_WEIGHTS)
    needs = [data_folder(name, condition, seed)]
    if rule.scorers:
        needs += [run.folder for run in scorer_runs(name, condition, seed) if run.module == "titan_attent.score"]
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=config,
        labels={"set": name, "condition": condition, "rule": rule_name, "seed": seed, "rows": rows},
        needs=tuple(needs),
    )


def losses_folder(name: str, condition: str, seed: int, who: str) -> str:
    return f"scorers/{name}/{condition}/seed-{seed}/{who}"


def scorer_runs(name: str, condition: str, seed: int) -> list[Task]:
    """Tasks that train expert and amateur, and score the held-out trusted images and the data with each."""
    task, runs = SETS[name], []
    data = data_folder(name, condition, seed)
    labels = {"set": name, "condition": condition, "rule": "scorers", "seed": seed}
    for who, images in (("expert", f"data/{name}/trusted/images"), ("amateur", f"{data}/sample")):
        folder = losses_folder(name, condition, seed, who)
        settings: dict[str, Any] = {
            "test": f"data/{name}/test/images",
            "flavor": "tiny",
            "vision": task.scorer_vision,
            "seed": seed,
            "steps": task.scorer_steps,
            "batch_size": task.scorer_batch,
            "lr": task.scorer_lr,
        }
        config = config_of(f"{folder}/model", data=images, teacher=UNIFORM, **settings)
        config["checkpoint"] = dict(LAST_WEIGHTS)
        config["validation"]["freq"] = task.scorer_steps
        training = Task(
            folder=f"{folder}/model", module="titan_attent.train", config=config, labels=labels, needs=(data,)
        )
        runs.append(training)
        # A folder within another one is written first.
        before = training.folder
        for part, scored in (("/trusted", f"data/{name}/held_out/images"), ("", f"{data}/images")):
            at = f"{folder}/scoring{part.replace('/', '-')}"
            losses = losses_folder(name, condition, seed, f"losses/{who}{part}")
            scoring = config_of(at, data=scored, teacher=UNIFORM, **settings)
            scoring["checkpoint"] = {
                "enable": True,
                "initial_load_path": f"{training.folder}/checkpoint/step-{task.scorer_steps}",
                "initial_load_model_only": True,
            }
            runs.append(
                Task(
                    folder=at,
                    module="titan_attent.score",
                    arguments=("checkpoint", "--output", losses, "--role", who),
                    config=scoring,
                    labels=labels,
                    needs=(before,),
                )
            )
            before = at
    return runs
