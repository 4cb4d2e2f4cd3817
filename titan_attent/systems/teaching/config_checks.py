"""Checks of the values of ``[teacher]``: values out of their range, and keys that contradict each other."""

from dataclasses import fields

from titan_attent.foundations.checks import check_number, check_one_of
from titan_attent.systems.teaching.config import RANGES, RATIO_SCHEDULES, WORST_CASE, TeacherConfig
from titan_attent.systems.teaching.importance import IMPORTANCES, reads
from titan_attent.systems.teaching.rule import DIFFERENCE, KEYS, check_rule, with_rule
from titan_attent.systems.teaching.strategies import STRATEGIES

SPAN = "span"
"""The value of ``level`` with which labels are masked instead of examples selected."""
READ_WITH_SPANS = {"level", "scores", "dry_run", "trace", "seed", *KEYS}
"""The keys that may be set with ``level = "span"``."""


def check_config(config: TeacherConfig) -> None:
    """Raise a ValueError with the key, its value and how to fix it if a value is out of its range."""
    check_one_of("strategy", config.strategy, ("uniform", DIFFERENCE, *STRATEGIES))
    check_one_of("level", config.level, ("example", SPAN))
    check_rule(config)
    if config.level == SPAN:
        _check_span_keys(config)
    config = with_rule(config)
    check_one_of("importance", config.importance, tuple(IMPORTANCES))
    check_one_of("scoring", config.scoring, ("train", "forward", "forward_once", "amateur"))
    check_one_of("ratio_schedule", config.ratio_schedule, RATIO_SCHEDULES)
    check_one_of("interval_schedule", config.interval_schedule, ("fixed", "incremental"))
    check_one_of("normalization", config.normalization, ("softmax", "sigmoid"))
    check_one_of("weighting", config.weighting, ("none", "inverse_probability", "loss", WORST_CASE))
    for key, bounds in RANGES.items():
        check_number(key, getattr(config, key), **bounds)
    if config.full_data_tail != -1:
        check_number("full_data_tail", config.full_data_tail, at_least=0, at_most=1)
    incremental = config.interval_schedule == "incremental"  # the fixed one does not read max_interval
    min_interval = config.initial_interval if incremental else 1
    check_number("max_interval", config.max_interval, at_least=min_interval, whole=True)
    if 0 < config.max_repeats < 1:
        raise ValueError(
            f"[teacher] max_repeats = {config.max_repeats}: a selected example is trained at least once; set it to 1 "
            "or more, or to 0 for the default"
        )
    _check_combinations(config)


def _check_combinations(config: TeacherConfig) -> None:
    """Refuse keys that contradict each other, or that lack another key they need."""
    if config.scoring == "forward_once" and config.pool_size:
        raise ValueError(
            f'[teacher] scoring = "forward_once" with pool_size = {config.pool_size}: each round has another pool, '
            'which has to be scored; use scoring = "forward", or pool_size = 0'
        )
    if config.strategy == "uniform" and config.weighting == "loss":
        raise ValueError(
            '[teacher] weighting = "loss" with strategy = "uniform", which is torchtitan\'s own loss: for weights '
            'alone use strategy = "random", ratio_schedule = "constant", initial_ratio = 1.0 and warmup_passes = 0'
        )
    if config.weighting == WORST_CASE and config.strategy != "uniform":
        raise ValueError(
            f'[teacher] weighting = "{WORST_CASE}" with strategy = "{config.strategy}": it is the worst case over the '
            'inputs of the data, and a selection would leave out some. Set strategy = "uniform", or another weighting'
        )
    if config.weighting == WORST_CASE and config.pool_size:
        raise ValueError(
            f'[teacher] pool_size = {config.pool_size} with weighting = "{WORST_CASE}", which selects nothing from a '
            "pool: set it to 0"
        )
    if config.strategy == "uniform" and config.loss_chunks > 1 and not config.weighs_worst_case:
        raise ValueError(
            f'[teacher] loss_chunks = {config.loss_chunks} with strategy = "uniform", which is torchtitan\'s own '
            "loss: set it to 1, or choose another strategy"
        )
    if config.strategy == "uniform" and config.dry_run:
        raise ValueError(
            '[teacher] dry_run = true with strategy = "uniform", which decides nothing: set the strategy that you want '
            'to try, such as strategy = "hard", or set dry_run = false'
        )
    if config.strategy == "threshold" and config.weighting == "loss":
        raise ValueError(
            '[teacher] weighting = "loss" with strategy = "threshold", which sets its own weights: choose another '
            "weighting or strategy"
        )
    if "amateur" in reads(config.importance) and config.scores_forward:
        raise ValueError(
            f'[teacher] scoring = "{config.scoring}" with importance = "{config.importance}", which does not read the '
            'learner\'s losses: the forward passes would have no effect. Use scoring = "amateur"'
        )
    if config.ratio_schedule == "calibrated" and config.importance != "cross_entropy_difference":
        raise ValueError(
            f'[teacher] ratio_schedule = "calibrated" with importance = "{config.importance}": it compares with the '
            'differences of trusted text; use importance = "cross_entropy_difference", or another schedule'
        )
    if config.ratio_schedule == "adaptive" and config.initial_ratio > config.final_ratio:
        raise ValueError(
            f"[teacher] initial_ratio = {config.initial_ratio} is above final_ratio = {config.final_ratio}: the "
            "adaptive schedule moves between the two; swap them"
        )


def _check_span_keys(config: TeacherConfig) -> None:
    """Refuse keys that ``level = "span"`` does not read."""
    if config.strategy != DIFFERENCE:
        raise ValueError(
            f'[teacher] level = "{SPAN}" with strategy = "{config.strategy}": labels are masked by the difference of '
            f'two scorers alone. Set strategy = "{DIFFERENCE}", or level = "example"'
        )
    default = TeacherConfig()
    names = [field.name for field in fields(TeacherConfig) if field.name not in READ_WITH_SPANS]
    if unread := [name for name in names if getattr(config, name) != getattr(default, name)]:
        raise ValueError(
            f'[teacher] {", ".join(unread)} with level = "{SPAN}": it does not read '
            f"{'this key' if len(unread) == 1 else 'these keys'}, because it selects no examples. Remove "
            f'{"it" if len(unread) == 1 else "them"}, or set level = "example"'
        )


def check_scores_named(config: TeacherConfig) -> None:
    """Refuse a rule that reads scores if none are named, and scores that the rule does not read."""
    config = with_rule(config)
    needs = {"expert", "amateur"} & reads(config.importance)
    if not config.scores and (needs or config.scoring == "amateur"):
        key = "importance" if needs else "scoring"
        raise ValueError(
            f'[teacher] {key} = "{getattr(config, key)}" needs scores: the folder that torchrun -m titan_attent.score '
            "pair writes"
        )
    if config.scores and not scorers_read(config):
        raise ValueError(
            f'[teacher] importance = "{config.importance}" does not read scores: one loss per example is not enough '
            'for it. Use "attainment", "cross_entropy_difference" or "excess_loss", or remove scores'
        )


def scorers_read(config: TeacherConfig) -> set[str]:
    """The scorers whose losses a run can use: "expert", "amateur"; none with strategy = "uniform"."""
    if config.strategy == "uniform":
        return set()
    needs = reads(config.importance)
    can_use_amateur = {"loss", "amateur"} & needs
    return {"expert"} & needs | ({"amateur"} if can_use_amateur else set())
