"""The trainings of the editing experiment, and the tasks that measure edits of their results. Pure."""

from typing import Any

from benchmarks.common.rules import UNIFORM
from benchmarks.common.tasks import Config, Task, run_config
from benchmarks.editing.languages import FIRST, LONGEST, RELATED

PARTS = ("languages", "unlearning", "means")
SEEDS = {"languages": 5, "unlearning": 3, "means": 3}
MEASURE = "benchmarks.editing"
"""The module of a task that edits and measures."""

PEAK, TUNING, LANGUAGE, ASCENT = 1e-2, 3e-3, 1e-3, 3e-4
"""Learning rates: of a base, of a tuning on text and on a language, of gradient ascent."""
LANGUAGE_STEPS, LANGUAGE_TUNING = 150, 100
BASE_STEPS, TUNING_STEPS = 400, 100
ASCENT_STEPS, ASCENT_EVERY = 40, 4
"""Steps of gradient ascent, and between its checkpoints."""
MEAN_STEPS, MEAN_EVERY, MEAN_BATCH, LAST = 600, 25, 8, (4, 8, 16)
"""Steps of the runs whose checkpoints are averaged, between these, rows of a step, and how many of the last ones."""


def text_config(folder: str, data: str, *, seed: int, steps: int, lr: float, load: str = "") -> Config:
    """A run that saves its last weights; ``load``: the checkpoint that it begins with."""
    config = run_config(folder, data="", teacher=UNIFORM, seed=seed, steps=steps, lr=lr)
    config["data"] |= {"path": data, "unit": "document", "num_workers": 0}
    del config["data"]["validation_path"], config["teacher"]["trace"]
    config["validation"] = {"enable": False}
    config["checkpoint"] = {"enable": True, "interval": 1_000_000, "last_save_model_only": True}
    if load:
        config["checkpoint"] |= {"initial_load_path": load, "initial_load_model_only": True}
    return config


def training(folder: str, config: Config, *needs: Task) -> Task:
    return Task(folder=folder, module="titan_attent.train", config=config, needs=tuple(task.folder for task in needs))


def weights(task: Task) -> str:
    """The last checkpoint of a training."""
    return f"{task.folder}/checkpoint/step-{task.steps}"


def language_runs(seed: int) -> dict[str, Task]:
    """The base, and a tuning on each language."""
    root = f"languages/seed-{seed}"

    def config(name: str, steps: int, lr: float, load: str = "") -> Config:
        made = text_config(f"{root}/{name}", f"{root}/data/{name}/train", seed=seed, steps=steps, lr=lr, load=load)
        made["training"] |= {"seq_len": 4 * LONGEST, "local_batch_size": 32}
        return made

    base = training(f"{root}/base", config("base", LANGUAGE_STEPS, PEAK))
    tuned = {
        name: training(f"{root}/{name}", config(name, LANGUAGE_TUNING, LANGUAGE, weights(base)), base)
        for name in (FIRST, *RELATED)
    }
    return {"base": base} | tuned


def unlearning_runs(seed: int) -> dict[str, Task]:
    """The base, a tuning on the target, and gradient ascent on it."""
    root, data = f"unlearning/seed-{seed}", f"packages/seed-{seed}"
    folder = f"{root}/base"
    base = training(folder, text_config(folder, f"{data}/everything", seed=seed, steps=BASE_STEPS, lr=PEAK))
    target, load = f"{data}/target/train", weights(base)
    folder = f"{root}/tuned"
    tuned = training(folder, text_config(folder, target, seed=seed, steps=TUNING_STEPS, lr=TUNING, load=load), base)
    folder = f"{root}/ascent"
    config = text_config(folder, target, seed=seed, steps=ASCENT_STEPS, lr=ASCENT, load=load)
    config["job"] |= {"custom_config_module": "benchmarks.editing.ascent"}
    config["ascent"] = {"enable": True}
    config["lr_scheduler"] |= {"warmup_steps": 1, "min_lr_factor": 1.0}
    config["checkpoint"] |= {"interval": ASCENT_EVERY, "keep_latest_k": 0}
    return {"base": base, "tuned": tuned, "ascent": training(folder, config, base)}


def mean_runs(seed: int) -> dict[str, Task]:
    """A run at a constant learning rate, and for each mean one that decays in its place."""
    root, data = f"means/seed-{seed}", f"packages/seed-{seed}/everything"

    def config(name: str, **schedule: Any) -> Config:
        made = text_config(f"{root}/{name}", data, seed=seed, steps=MEAN_STEPS, lr=PEAK)
        made["lr_scheduler"] |= schedule
        made["training"] |= {"local_batch_size": MEAN_BATCH}
        return made

    constant = config("constant", min_lr_factor=1.0)
    constant["checkpoint"] |= {"interval": MEAN_EVERY, "keep_latest_k": 0}
    runs = {"constant": constant}
    runs |= {f"decayed_{last}": config(f"decayed_{last}", decay_ratio=last * MEAN_EVERY / MEAN_STEPS) for last in LAST}
    return {name: training(f"{root}/{name}", made) for name, made in runs.items()}


RUNS = {"languages": language_runs, "unlearning": unlearning_runs, "means": mean_runs}


def tasks_of(part: str, seed: int) -> list[Task]:
    """The trainings of a part and seed, and the task that measures their edits, last."""
    runs = RUNS[part](seed)
    config: Config = {name: {"steps": task.steps, "lr": task.config["optimizer"]["lr"]} for name, task in runs.items()}
    measured = Task(
        folder=f"{part}/seed-{seed}/measured",
        module=MEASURE,
        config=config,
        labels={"part": part, "seed": seed},
        needs=tuple(task.folder for task in runs.values()),
    )
    return [*runs.values(), measured]
