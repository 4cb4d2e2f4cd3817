"""The sets and the rules of the vision experiment, and the cost of a rule. Pure.

The steps of a rule follow from its share of uniform's compute: scoring, and its scorers, reduce the number of steps.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.common.rules import ADAPTIVE, COMMON, EXPERT, PAIR, UNBOUNDED, UNIFORM, Rule
from benchmarks.common.tasks import FORWARD_COST
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.schedule import Plan, selection_size

BATCH_SIZE = 64
CONDITIONS = ("clean", "wrong_labels", "copies", "long_tail")
ROUND_TO = 10
"""Steps of a run are a multiple of this, the number of its validations."""


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """The training task on a set of images.

    Attributes:
        rows, test: images trained and tested on.
        tail: images of the most frequent class over those of the rarest, under ``long_tail``.
        flavor, vision: the learner, a ``vit_attent``; ``[vision]`` sets its patches and the augmentation.
        steps, lr: of a full run. The lr is the best of 1e-3, 2e-3 and 4e-3 for uniform on clean digits (seed 0: 96.9,
            98.1, 97.2%); on fashion the three are within 0.1 points.
        trusted, held_out: images for the expert, and for the calibrated schedule; no learner is trained on them.
        sample: images for the amateur, taken from the data itself.
        scorer_vision, scorer_steps, scorer_batch, scorer_lr: settings of expert and amateur, both ``tiny``.
        scorer_cost: FLOPs per image of a scorer over those of the learner.
    """

    rows: int
    test: int
    tail: float
    flavor: str
    vision: dict[str, Any]
    steps: int
    lr: float
    trusted: int
    held_out: int
    sample: int
    scorer_vision: dict[str, Any]
    scorer_steps: int
    scorer_batch: int
    scorer_lr: float
    scorer_cost: float

    @property
    def scorer_charge(self) -> float:
        """The cost of an expert or amateur, with its losses on all scored images, in steps of the learner."""
        scored = self.rows + self.held_out
        return self.scorer_cost * (self.scorer_steps * self.scorer_batch + FORWARD_COST * scored) / BATCH_SIZE


SETS = {
    "digits": ImageTask(
        rows=1078,
        test=359,
        tail=10,
        flavor="tiny",
        vision={"patch_size": 4},
        steps=300,
        lr=2e-3,
        trusted=300,
        held_out=60,
        sample=300,
        scorer_vision={"patch_size": 8},
        scorer_steps=200,
        scorer_batch=16,
        scorer_lr=3e-3,
        scorer_cost=0.252,
    ),
    "fashion": ImageTask(
        rows=12_000,
        test=4_000,
        tail=100,
        flavor="tiny",
        vision={"patch_size": 14},
        steps=1500,
        lr=2e-3,
        trusted=1_000,
        held_out=500,
        sample=1_000,
        scorer_vision={"patch_size": 28},
        scorer_steps=250,
        scorer_batch=16,
        scorer_lr=3e-3,
        scorer_cost=0.279,
    ),
}

# -- rules ------------------------------------------------------------------------------------------------------------

HALF: dict[str, Any] = COMMON | {"full_data_tail": 0.125}
"""A first full pass, half of the data a pass, the last eighth of the steps on all of it."""
HARD = HALF | {"strategy": "hard"}
ATTAINMENT = ADAPTIVE | {"importance": "attainment"}
ATTAINMENT_HALF = ATTAINMENT | {"initial_ratio": 0.5}
PAPER: dict[str, Any] = {
    "strategy": "hard",
    "importance": "loss",
    "scoring": "forward",
    "warmup_passes": 0,
    "ratio_schedule": "cosine",
    "initial_ratio": 0.2,
    "final_ratio": 0.8,
    "interval_schedule": "incremental",
    "initial_interval": 2,
    "max_interval": 5,
    "full_data_tail": 0.0,
}
PAPER_SOFT = PAPER | {
    "strategy": "soft",
    "ratio_schedule": "incremental",
    "weighting": "none",
    "min_inclusion_probability": 0.0,
}
"""The best variant in the paper's ablation."""
SCORERS: dict[str, Any] = {
    "strategy": "hard",
    "importance": "cross_entropy_difference",
    "scores": PAIR,
    "ratio_schedule": "calibrated",
    "max_repeats": UNBOUNDED,
    "full_data_tail": 0.0,
}
EXCESS = HALF | {"strategy": "hard", "importance": "excess_loss", "scores": EXPERT}
DIRTY = ("wrong_labels", "copies")

RULES = {
    "uniform": Rule(about="everything, always", teacher=UNIFORM),
    "uniform_80": Rule(about="the same in 0.8 of the steps", teacher=UNIFORM, share=0.8),
    "uniform_70": Rule(about="in 0.7 of the steps", teacher=UNIFORM, share=0.7, only_on=("clean", *DIRTY)),
    "uniform_50": Rule(about="in half of the steps", teacher=UNIFORM, share=0.5, only_on=("clean", *DIRTY)),
    "random_80": Rule(
        about="a random half per pass", teacher=HALF | {"strategy": "random"}, share=0.8, only_on=("clean",)
    ),
    "hard_80": Rule(about="the half of largest loss", teacher=HARD, share=0.8),
    "soft_80": Rule(about="a weighted draw of half by loss", teacher=HALF | {"strategy": "soft"}, share=0.8),
    "threshold_80": Rule(
        about="half of those below the mean left out", teacher=HALF | {"strategy": "threshold"}, share=0.8
    ),
    "paper_80": Rule(
        about="the largest losses by one forward pass per round, 0.2 to 0.8 of the data (AtteNT)",
        teacher=PAPER,
        share=0.8,
    ),
    "paper_soft_80": Rule(
        about="the same with a weighted draw, and a share that grows linearly",
        teacher=PAPER_SOFT,
        share=0.8,
        only_on=("clean", "long_tail"),
    ),
    "attainment_80": Rule(
        about="the largest attainments, as many as their effective sample size says, scored once",
        teacher=ATTAINMENT,
        share=0.8,
    ),
    "attainment_half_80": Rule(about="the same, but never less than half", teacher=ATTAINMENT_HALF, share=0.8),
    "functional_gradient_80": Rule(
        about="the half of largest functional gradient",
        teacher=HARD | {"importance": "functional_gradient"},
        share=0.8,
        only_on=("clean", "long_tail"),
    ),
    "hard_70": Rule(about="hard_80 in less", teacher=HARD, share=0.7, only_on=DIRTY),
    "attainment_half_70": Rule(about="the same in less", teacher=ATTAINMENT_HALF, share=0.7, only_on=DIRTY),
    "excess_70": Rule(
        about="the half of largest loss above that of an expert, which is made and charged (RHO-loss)",
        teacher=EXCESS,
        share=0.7,
        only_on=DIRTY,
    ),
    "scorers_70": Rule(
        about="amateur - expert above what trusted images show, both made and charged",
        teacher=SCORERS,
        share=0.7,
        only_on=DIRTY,
    ),
}


def num_scored(teacher: dict[str, Any], *, rows: int, steps: int) -> int:
    """The number of images that a run of ``steps`` steps scores by its own forward passes."""
    config = TeacherConfig(**teacher)
    if not config.scores_forward:
        return 0
    plan = Plan(config, steps_of_full_pass=rows // BATCH_SIZE, total_steps=steps)
    step, rounds = plan.warmup_steps, 0
    while step < plan.tail_start:
        rounds += 1
        ratio = plan.ratio(step)
        if config.scoring == "forward_once" or ratio is None:
            break
        step += plan.interval(step) * (selection_size(rows, ratio=ratio, batch_size=BATCH_SIZE) // BATCH_SIZE)
    return rounds * rows


def scorers_charge(rule: Rule, image_task: ImageTask) -> float:
    """The cost of a rule's scorers, in steps of the learner."""
    return len(rule.scorers) * image_task.scorer_charge


def compute_of(rule: Rule, image_task: ImageTask, *, rows: int, steps: int) -> float:
    """The cost of a run in steps of the learner: its steps, its scoring, its scorers."""
    scored = num_scored(rule.teacher, rows=rows, steps=steps)
    return steps + FORWARD_COST * scored / BATCH_SIZE + scorers_charge(rule, image_task)


def steps_of(rule: Rule, image_task: ImageTask, *, rows: int) -> int:
    """The most steps, a multiple of ``ROUND_TO``, that the rule's share of the compute pays for; ValueError if none."""
    allowed = rule.share * image_task.steps
    for steps in range(int(allowed + 1e-9) // ROUND_TO * ROUND_TO, 0, -ROUND_TO):
        if compute_of(rule, image_task, rows=rows, steps=steps) <= allowed + 1e-9:
            return steps
    raise ValueError(f"{rule.about}: its scoring costs more than the allowed {allowed:.0f} steps")
