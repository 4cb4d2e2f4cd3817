"""The rules of the evidence, and the commands of its runs: all that tells two runs apart.

A run is one (corpus, rule, seed). Scorers are made once for (trusted text, corpus, seed) by the product's own command.
"""

from dataclasses import dataclass
from typing import Any

from convergence_rules import LEARNING_RATE, Task, divisor, run_config
from evidence_corpora import CORPORA

STEPS = 400
"""Of a full run: 12,800 of 32,000 rows, none twice."""
SCORER_STEPS = 100
SCORER_FLAVOR = "scorer"

NONE: dict[str, Any] = {"strategy": "uniform"}
SCORES = "<scores>"
"""Stands for the folder of this corpus's and seed's scorers; ``SCORES/expert`` is one of its two."""
ON_DISK: dict[str, Any] = {
    "strategy": "hard",
    "amateur_path": f"{SCORES}/amateur",
    "interval_schedule": "fixed",
    "anneal_fraction": 0.0,
}
DIFFERENCE = ON_DISK | {
    "importance": "cross_entropy_difference",
    "reference_path": f"{SCORES}/expert",
    "ratio_schedule": "calibrated",
}
ATTAINMENT = ON_DISK | {
    "importance": "attainment",
    "scoring": "amateur",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the table.

    Attributes:
        about: what it does.
        teacher: its ``[teacher]``.
        steps: as a multiple of ``STEPS``; every run decays its learning rate to zero at its own end.
        data: what of the corpus it trains on: all, without duplicates, or the middle by the amateur's loss.
        corpora: where it runs; all if empty.
    """

    about: str
    teacher: dict[str, Any]
    steps: float = 1.0
    data: str = ""
    corpora: tuple[str, ...] = ()

    @property
    def reads_scores(self) -> bool:
        return self.data == "middle" or any(SCORES in str(value) for value in self.teacher.values())


DUPLICATED = ("clean", "copies", "mixture", "near_duplicates", "target", "minority", "junk", "web")
RULES = {
    "uniform": Rule(about="everything, in random order", teacher=NONE),
    "uniform_110": Rule(about="the same with a tenth more compute: one run's scorers charged", teacher=NONE, steps=1.1),
    "difference": Rule(about="amateur - expert above what trusted text shows", teacher=DIFFERENCE),
    "difference_60": Rule(about="the same in 0.6 of the steps", teacher=DIFFERENCE, steps=0.6),
    "difference_80": Rule(about="the same in 0.8 of the steps", teacher=DIFFERENCE, steps=0.8),
    "difference_50": Rule(about="the same in half of the steps", teacher=DIFFERENCE, steps=0.5),
    "attainment": Rule(about="attainment of the amateur, its own ratio; no trusted text", teacher=ATTAINMENT),
    "dedup": Rule(about="uniform, rows that share 50 tokens with another left out", teacher=NONE, data="dedup"),
    "perplexity": Rule(about="uniform on the middle half by the amateur's loss", teacher=NONE, data="middle"),
    "defaults": Rule(about="[teacher] left empty", teacher={}),
}


def scores_folder(corpus: str, seed: int) -> str:
    return f"scorers/{corpus}/seed-{seed}"


def data_of(corpus: str, rule: Rule, seed: int) -> str:
    """Folder below ``corpora/``."""
    if rule.data == "middle":
        return f"{corpus}-middle-{seed}"
    return f"{corpus}-{rule.data}" if rule.data else corpus


def config(folder: str, corpus: str, *, data: str, teacher: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    made = run_config(folder, data=data, teacher=teacher, seed=seed, steps=steps, lr=LEARNING_RATE)
    made["data"]["validation_path"] = f"corpora/validation-{CORPORA[corpus].name}"
    made["validation"]["freq"] = divisor(steps, at_most=80)
    return made


def rule_task(corpus: str, name: str, seed: int) -> Task:
    rule, folder = RULES[name], f"runs/{corpus}/{name}/seed-{seed}"
    scores = scores_folder(corpus, seed)
    teacher = {
        key: value.replace(SCORES, scores) if isinstance(value, str) else value for key, value in rule.teacher.items()
    }
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=config(
            folder,
            corpus,
            data=data_of(corpus, rule, seed),
            teacher=teacher,
            seed=seed,
            steps=max(1, round(rule.steps * STEPS / 10) * 10),
        ),
        labels={"corpus": corpus, "rule": name, "seed": seed},
    )
