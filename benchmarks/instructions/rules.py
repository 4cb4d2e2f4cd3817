"""The rules of the instruction experiment, and the tasks of its runs. Pure.

A run is one (kind, condition, rule, seed). It starts from the base model of its seed and takes ``STEPS`` steps, or a
share of them, at a learning rate that falls linearly to zero at its own end.
"""

from typing import Any

from benchmarks.common.rules import COMMON, PAIR, UNIFORM, Rule
from benchmarks.common.tasks import Config, Task, divisor, run_config

KINDS = ("messages", "docstrings", "dictionary")
CONDITIONS = ("clean", "shuffled")
SHUFFLED = 0.2
"""Share of the pairs of "shuffled" that have the completion of another pair."""

BASE_STEPS = 300
BASE_LEARNING_RATE = 1e-2
STEPS = 100
"""Steps of a full run: three epochs of pairs of 32 tokens."""
LEARNING_RATE = 3e-3
BATCH_SIZE, SEQ_LEN = 8, 96
"""Windows per step, and the tokens of one; several pairs are packed into each."""
SEQ_LEN_OF_PAIR = 64
"""Most tokens of a pair, which is validated in a row of its own."""

GOALS = {"clean": 0.87, "shuffled": 0.75}
"""Condition -> the share of uniform's steps in which a rule is to end with uniform's loss. The paper fine-tunes
language models in 13% less time."""

RATIO = 0.7
"""Share of the pairs that the paper selects when it fine-tunes language models."""
CHOSEN: dict[str, Any] = COMMON | {"initial_ratio": RATIO}
HARD = CHOSEN | {"strategy": "hard", "initial_interval": 100}
SOFT = CHOSEN | {"strategy": "soft"}
THRESHOLD = CHOSEN | {"strategy": "threshold"}
ATTAINMENT: dict[str, Any] = {
    "strategy": "hard",
    "importance": "attainment",
    "scoring": "train",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.5,
    "final_ratio": 1.0,
    "max_repeats": 8,
    "full_data_tail": 0.0,
}
SCORERS: dict[str, Any] = {"strategy": "difference", "scores": PAIR}

TEACHERS = {
    "uniform": ("everything", UNIFORM),
    "random": ("a random 70% per pass, after a first full pass", CHOSEN | {"strategy": "random"}),
    "hard": ("the 70% of largest loss in the first pass, to the end: the paper's recipe", HARD),
    "soft": ("a weighted draw of 70% by loss per pass, after a first full pass", SOFT),
    "threshold": ("half of the pairs below the mean loss left out per pass (InfoBatch)", THRESHOLD),
    "attainment": (
        'importance = "attainment" with scoring = "train", the losses seen in training: the largest, as many as their '
        "effective sample size says but at least half; all of them from 70% on; after a first full pass",
        ATTAINMENT,
    ),
    "scorers": ("strategy = difference: two tables of bigrams, an amateur and an expert of trusted pairs", SCORERS),
}
RULES = {"uniform": Rule(about="all pairs in every pass: the control", teacher=UNIFORM)} | {
    f"{name}_{100 * share:.0f}": Rule(
        about=f"{about}; in {share} of the steps", teacher=teacher, share=share, only_on=(condition,)
    )
    for condition, share in GOALS.items()
    for name, (about, teacher) in TEACHERS.items()
}
ORACLE = "oracle"
RULES[f"{ORACLE}_{100 * GOALS['shuffled']:.0f}"] = Rule(
    about=f"uniform on the pairs with their own completions; in {GOALS['shuffled']} of the steps",
    teacher=UNIFORM,
    share=GOALS["shuffled"],
    data="right",
    only_on=("shuffled",),
)


def corpus(kind: str, condition: str) -> str:
    """The name of a column of the tables."""
    return f"{kind}, {condition}"


def base_task(seed: int) -> Task:
    """Pretrains a model on plain text, and saves its weights."""
    folder = f"base/seed-{seed}"
    config = run_config(folder, data="", teacher=UNIFORM, seed=seed, steps=BASE_STEPS, lr=BASE_LEARNING_RATE)
    config["training"] |= {"local_batch_size": BATCH_SIZE}
    config["data"] |= {"path": f"data/seed-{seed}/base", "num_workers": 0}
    del config["data"]["validation_path"]
    config["validation"] = {"enable": False}
    config["checkpoint"] = {"enable": True, "interval": 1_000_000, "last_save_model_only": True}
    return Task(folder=folder, module="titan_attent.train", config=config, labels={"seed": seed})


def config_of(
    folder: str, kind: str, condition: str, *, teacher: dict[str, Any], seed: int, steps: int, lr: float
) -> Config:
    """The TOML of a fine-tuning."""
    config = run_config(folder, data="", teacher=teacher, seed=seed, steps=steps, lr=lr)
    data, base = f"data/seed-{seed}/{kind}", base_task(seed)
    config["data"] |= {
        "path": f"{data}/{condition}",
        "validation_path": f"{data}/validation",
        "unit": "document",
        "num_workers": 0,
    }
    config["training"] |= {"local_batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    config["validation"] |= {
        "local_batch_size": 2 * BATCH_SIZE,
        "seq_len": SEQ_LEN_OF_PAIR,
        "freq": divisor(steps, at_most=steps // 3),
    }
    config["checkpoint"] = {
        "enable": True,
        "initial_load_path": f"{base.folder}/checkpoint/step-{BASE_STEPS}",
        "initial_load_model_only": True,
        "interval": 1_000_000,
        "last_save_model_only": True,
    }
    return config


def scorers_folder(kind: str, condition: str, seed: int) -> str:
    return f"scorers/{kind}/{condition}/seed-{seed}"


def scorers_task(kind: str, condition: str, seed: int) -> Task:
    """Makes the amateur and the expert, and their losses on the pairs."""
    folder = scorers_folder(kind, condition, seed)
    config = config_of(f"{folder}/run", kind, condition, teacher=UNIFORM, seed=seed, steps=STEPS, lr=LEARNING_RATE)
    config["checkpoint"] = {"enable": False}
    return Task(
        folder=f"{folder}/command",
        module="titan_attent.score",
        arguments=("pair", "--trusted", f"data/seed-{seed}/{kind}/trusted", "--output", f"{folder}/pair"),
        config=config,
        labels={"corpus": corpus(kind, condition), "rule": "scorers", "seed": seed},
    )


def rule_task(kind: str, condition: str, name: str, seed: int, *, lr: float = LEARNING_RATE) -> Task:
    rule, folder = RULES[name], f"runs/{kind}/{condition}/{name}/seed-{seed}"
    needs = [base_task(seed).folder, *([scorers_task(kind, condition, seed).folder] if rule.scorers else [])]
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=config_of(
            folder,
            kind,
            rule.data or condition,
            teacher=rule.teacher_with({PAIR: f"{scorers_folder(kind, condition, seed)}/pair"}),
            seed=seed,
            steps=round(rule.share * STEPS),
            lr=lr,
        ),
        labels={"corpus": corpus(kind, condition), "rule": name, "seed": seed, "kind": kind, "condition": condition},
        needs=tuple(needs),
    )
