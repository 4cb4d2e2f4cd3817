"""The rules of the convergence benchmark, and the configurations of its runs: all that tells two rules apart."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.corpora.stdlib_code import Sizes

BATCH_SIZE = 32
LEARNING_RATE = 1e-2
"""The best of 3e-3, 6e-3 and 1e-2 for the control on clean text."""
FORWARD_COST = 1 / 3
"""Of a training step, for the same batch."""

UNBOUNDED = 1e6
"""``max_repeats`` where scores decide the ratio: these runs pass over their data many times, and with the default, 4,
they would leave out next to nothing. Their tables are of rules that no bound held back."""

COMMON: dict[str, Any] = {
    "importance": "loss",
    "warmup_passes": 1,
    "ratio_schedule": "constant",
    "initial_ratio": 0.5,
    "interval_schedule": "fixed",
    "initial_interval": 1,
    "max_interval": 1,
    "anneal_fraction": 0.0,
}
"""The teacher of every rule but ``attainment_in_training``, as in the measurements that this benchmark repeats."""

ADAPTIVE: dict[str, Any] = COMMON | {
    "strategy": "hard",
    "scoring": "forward_once",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
    "max_repeats": UNBOUNDED,
}
"""Scored once, and then as many as the effective sample size says, from a tenth to all."""

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
    "uniform_pools": Rule(
        about="the control with the compute of excess_loss_pools",
        teacher={"strategy": "uniform"},
        steps=1.94,
        by_default=False,
    ),
    "uniform_reference": Rule(
        about="the control with the compute of excess_loss_pools and its reference",
        teacher={"strategy": "uniform"},
        steps=2.94,
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
        teacher=ADAPTIVE | {"importance": "learnability"},
    ),
    "attainment_adaptive": Rule(
        about="the largest attainments, as many as their effective sample size says, from a tenth to all, scored once",
        teacher=ADAPTIVE | {"importance": "attainment"},
    ),
    "attainment_from_half": Rule(
        about="the same, but never less than half",
        teacher=ADAPTIVE | {"importance": "attainment", "initial_ratio": 0.5},
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
        about="every 8 steps the 256 of the next 640 rows with the largest loss above that model's, no warm-up",
        teacher=COMMON
        | {"strategy": "hard", "importance": "excess_loss", "reference_path": REFERENCE}
        | {"scoring": "forward", "pool_size": 20 * BATCH_SIZE, "initial_ratio": 0.4, "warmup_passes": 0},
    ),
    "attainment_in_training": Rule(
        about="attainment of the losses seen in training, as many as their effective sample size says, from a half on",
        teacher={"strategy": "hard", "max_repeats": UNBOUNDED},
        by_default=False,
    ),
}

REFERENCE_STEPS = 1.0
"""Of the reference model, as a multiple of ``--steps``. Where the learner overtakes it, clean and shuffled rows
look alike to it, and junk comes back (docs/convergence.md)."""


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command: ``torchrun -m module`` with ``config`` as its TOML, in ``folder``; all paths are below DIR.

    ``config`` is also its identity: a result of another configuration is not this task's result.
    """

    folder: str
    module: str
    config: dict[str, dict[str, Any]]
    arguments: tuple[str, ...] = ()
    """More of the command line."""
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.config["training"]["steps"]


def in_words_of_today(config: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A result's configuration, to be compared with the one that is ``wanted``: before there was a bound, none held."""
    before = config.get("teacher", {})
    if "max_repeats" in before or wanted.get("teacher", {}).get("max_repeats") != UNBOUNDED:
        return config
    return config | {"teacher": before | {"max_repeats": UNBOUNDED}}


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
