"""The rules of the convergence benchmark, and the configurations of its runs."""

from benchmarks.common.rules import ADAPTIVE, COMMON, EXPERT, UNBOUNDED, UNIFORM, Rule
from benchmarks.common.tasks import BATCH_SIZE, Task, run_config

RULES = {
    "uniform": Rule(about="everything, always: the control", teacher=UNIFORM),
    "uniform_half": Rule(about="the control with half the steps, fully decayed", teacher=UNIFORM, share=0.5),
    "uniform_scored": Rule(about="the control with the compute of a rule that scores once", teacher=UNIFORM, share=1.1),
    "uniform_epochs": Rule(
        about="the control with as many epochs as a teacher of ratio 0.5 covers: 1.68 times the compute",
        teacher=UNIFORM,
        share=1.68,
        by_default=False,
    ),
    "uniform_pools": Rule(
        about="the control with the compute of excess_loss_pools",
        teacher=UNIFORM,
        share=1.94,
        by_default=False,
    ),
    "uniform_reference": Rule(
        about="the control with the compute of excess_loss_pools and its reference",
        teacher=UNIFORM,
        share=2.94,
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
        teacher=COMMON | {"strategy": "hard", "importance": "excess_loss", "scores": EXPERT},
    ),
    "excess_loss_pools": Rule(
        about="every 8 steps the 256 of the next 640 rows with the largest loss above that model's, no warm-up",
        teacher=COMMON
        | {"strategy": "hard", "importance": "excess_loss", "scores": EXPERT}
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
look alike to it, and junk comes back (docs/results/convergence.md)."""


# -- tasks ------------------------------------------------------------------------------------------------------------


def rule_task(corpus: str, name: str, seed: int, *, steps: int, lr: float) -> Task:
    rule, folder = RULES[name], f"runs/{corpus}/{name}/seed-{seed}"
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=run_config(
            folder,
            data=corpus,
            teacher=rule.teacher_with({EXPERT: f"{score_folder(corpus, seed)}/losses"}),
            seed=seed,
            steps=max(1, round(rule.share * steps)),
            lr=lr,
        ),
        labels={"corpus": corpus, "rule": name, "seed": seed},
    )


def reference_task(seed: int, *, steps: int, lr: float) -> Task:
    """Trains the reference model: uniform on trusted text, with its weights saved."""
    folder, steps = f"reference/seed-{seed}/model", max(1, round(REFERENCE_STEPS * steps))
    config = run_config(folder, data="trusted", teacher=UNIFORM, seed=seed, steps=steps, lr=lr)
    config["checkpoint"] = {"enable": True, "interval": steps, "last_save_model_only": True}
    return Task(folder=folder, module="titan_attent.train", config=config)


def score_folder(corpus: str, seed: int) -> str:
    return f"reference/seed-{seed}/{corpus}"


def score_task(corpus: str, seed: int, *, steps: int, lr: float) -> Task:
    """The expert's losses on a corpus."""
    reference, folder = reference_task(seed, steps=steps, lr=lr), score_folder(corpus, seed)
    config = run_config(folder, data=corpus, teacher=UNIFORM, seed=seed, steps=steps, lr=lr)
    weights = f"{reference.folder}/checkpoint/step-{reference.steps}"
    config["checkpoint"] = {"enable": True, "initial_load_path": weights, "initial_load_model_only": True}
    arguments = ("checkpoint", "--output", f"{folder}/losses", "--role", "expert")
    return Task(folder=folder, module="titan_attent.score", arguments=arguments, config=config)
