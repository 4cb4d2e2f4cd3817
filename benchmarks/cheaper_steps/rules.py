"""The rules of the cheaper-steps benchmark, which define its runs, and the goals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.rules import UNIFORM
from benchmarks.common.tasks import Task, divisor, run_config

CONTROL = "exact"
ROUND_TO = 20
"""Steps that follow from a rule are a multiple of this: torchtitan validates and logs only at multiples."""
WARMUP, INTERVAL = 0.15, 0.1
"""Shares of the steps: those in which every module is active, and those between two decisions."""
VALIDATIONS = 8
"""Minimum number of validations per run, evenly spaced, the last one at its end."""

Sections = dict[str, dict[str, Any]]


def _nothing(steps: int) -> Sections:
    return {}


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        about: its description.
        method: "modules" or "highway"; empty for the control of both.
        sections: steps of the run -> its sections of the TOML.
        follows, by: the rule whose "flops" or "seconds" determine its steps.
    """

    about: str
    method: str = ""
    sections: Callable[[int], Sections] = _nothing
    follows: str = ""
    by: str = ""


def modules(policy: str, backward_share: float, *, warmup: float = WARMUP, **more: Any) -> Callable[[int], Sections]:
    """The ``[freezing]`` section. ``warmup`` is a share of the steps; 0 gives one step, the minimum."""

    def sections(steps: int) -> Sections:
        times = {"warmup_steps": max(1, round(warmup * steps)), "interval": max(1, round(INTERVAL * steps))}
        return {"freezing": {"policy": policy, "backward_share": backward_share} | times | more}

    return sections


def highway(iterations: int, exact_fraction: float) -> Callable[[int], Sections]:
    cut = "block" if iterations else "branch"
    keys = {"method": "highway", "iterations": iterations, "cut": cut, "exact_fraction": exact_fraction}
    return lambda steps: {"highway": keys}


def _followers(name: str, method: str, *kinds: str) -> dict[str, Variant]:
    return {
        f"{kind}_of_{name}": Variant(
            f"backpropagation with the {'FLOPs' if kind == 'flops' else kind} of {name}", method, follows=name, by=kind
        )
        for kind in kinds
    }


LATE = {"warmup": 0.5, "final_fraction": 0.25}

RULES = {
    CONTROL: Variant("backpropagation through everything: the control"),
    "mat": Variant("the modules of small eigenvalue frozen, 70% of the backward kept", "modules", modules("mat", 0.7)),
    "mat_shuffled": Variant("the same, eigenvalues of a kind shuffled", "modules", modules("mat", 0.7, shuffle=True)),
    "gradient_norm": Variant("drawn by gradient norm, 70% kept", "modules", modules("gradient_norm", 0.7)),
    "random": Variant("drawn at random, 70% kept", "modules", modules("random", 0.7)),
    "mat_late": Variant("mat, in the third quarter of the steps only", "modules", modules("mat", 0.7, **LATE)),
    "mat_40": Variant(
        "mat, as near to 60% of the backward kept as it gets: weight gradients are half of it",
        "modules",
        modules("mat", 0.6),
    ),
    "random_40": Variant("drawn at random, as near to 60% kept", "modules", modules("random", 0.6)),
    "prefix": Variant("least eigenvalue lost per FLOP, 54% kept", "modules", modules("prefix", 0.54)),
    "prefix_shuffled": Variant(
        "the same, eigenvalues of a kind shuffled", "modules", modules("prefix", 0.54, shuffle=True)
    ),
    "prefix_late": Variant(
        "prefix, 45% kept, everything active in the last quarter",
        "modules",
        modules("prefix", 0.45, final_fraction=0.25),
    ),
    "prefix_gentle": Variant(
        "prefix, in the third quarter of the steps only", "modules", modules("prefix", 0.54, **LATE)
    ),
    "truncated": Variant(
        "the top of the model only, nothing measured, as near to 54% kept as modules allow",
        "modules",
        modules("truncated", 0.54),
    ),
    **_followers("mat", "modules", "flops"),
    **_followers("prefix", "modules", "flops", "seconds"),
    "highway_0": Variant("no rounds, the last quarter exact", "highway", highway(0, 0.25)),
    "highway_0_throughout": Variant("no rounds, no exact part", "highway", highway(0, 0.0)),
    "highway_1": Variant("one round, the last quarter exact", "highway", highway(1, 0.25)),
    "truncated_from_start": Variant(
        "the top of the model only from the second step on, 74% kept, all in the last quarter: as much as highway_0",
        "highway",
        modules("truncated", 0.74, warmup=0.0, final_fraction=0.25),
    ),
    **_followers("highway_0", "highway", "flops", "seconds"),
}


@dataclass(frozen=True)
class Goal:
    """A goal for the rules of one method.

    Attributes:
        section: the section of the TOML.
        about: the goal, with its numbers.
        rules: rule that may reach it -> the rule with equal share that it must beat, or "".
        saves, min_saved: a column of the results, and the share of it that must be saved.
        loss: the share of the control's loss by which it may end higher.
    """

    section: str
    about: str
    rules: dict[str, str]
    saves: str
    min_saved: float
    loss: float


GOALS = {
    "modules": Goal(
        "modules",
        "40% of the backward's FLOPs saved, probes charged, within 0.5% of exact's loss, and better than its control",
        {"mat_40": "random_40", "mat": "random", "prefix": "truncated"},
        saves="of_backward",
        min_saved=0.4,
        loss=0.005,
    ),
    "highway": Goal(
        "backward",
        "20% of the seconds of a step that is not exact saved, within 1% of exact's loss, the last quarter exact",
        {"highway_0": ""},
        saves="seconds_a_step",
        min_saved=0.2,
        loss=0.01,
    ),
}


def task(name: str, seed: int, *, steps: int, lr: float) -> Task:
    folder = f"runs/{name}/seed-{seed}"
    config = run_config(folder, data="clean", teacher=UNIFORM, seed=seed, steps=steps, lr=lr)
    config["validation"]["freq"] = divisor(steps, at_most=max(1, steps // VALIDATIONS))
    config |= RULES[name].sections(steps)
    return Task(folder=folder, module="titan_attent.train", config=config, labels={"rule": name, "seed": seed})
