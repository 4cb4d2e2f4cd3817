"""Keys of ``[teacher]`` that do not go together: one ValueError with the mend. config.py has the range of each key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_attent.teacher.importance import reads

if TYPE_CHECKING:
    from titan_attent.teacher.config import TeacherConfig


def check_combinations(config: TeacherConfig) -> None:
    """Refuse keys that contradict each other, or that one of them needs."""
    if "reference" in reads(config.importance) and not config.reference_path:
        raise ValueError(
            f'[teacher] importance = "{config.importance}" needs reference_path: the folder of reference losses, '
            "written by torchrun -m titan_attent.score"
        )
    _check_amateur(config)
    if config.scoring == "forward_once" and config.pool_size:
        raise ValueError(
            f'[teacher] scoring = "forward_once" with pool_size = {config.pool_size}: each round has a pool of '
            'its own; use scoring = "forward", or pool_size = 0'
        )
    if config.strategy == "uniform" and config.weighting == "loss":
        raise ValueError(
            '[teacher] weighting = "loss" with strategy = "uniform", which is torchtitan\'s own loss: for weights '
            'alone use strategy = "random", ratio_schedule = "constant", initial_ratio = 1.0 and warmup_passes = 0'
        )
    if config.strategy == "uniform" and config.loss_chunks > 1:
        raise ValueError(
            f'[teacher] loss_chunks = {config.loss_chunks} with strategy = "uniform", which is torchtitan\'s own '
            "loss: set it to 1, or choose another strategy"
        )
    if config.strategy == "uniform" and config.shadow:
        raise ValueError(
            '[teacher] shadow = true with strategy = "uniform", which decides nothing: name the strategy whose '
            'decisions are to be seen, such as strategy = "hard", or set shadow = false'
        )
    if config.strategy == "threshold" and config.weighting == "loss":
        raise ValueError(
            '[teacher] weighting = "loss" with strategy = "threshold", which has weights of its own: choose '
            "another of the two"
        )
    if config.ratio_schedule == "adaptive" and config.initial_ratio > config.final_ratio:
        raise ValueError(
            f"[teacher] initial_ratio = {config.initial_ratio} is above final_ratio = {config.final_ratio}: the "
            "adaptive schedule moves between the two; swap them"
        )


def _check_amateur(config: TeacherConfig) -> None:
    """Refuse an amateur that nothing reads, and what reads one where none is given."""
    needed = reads(config.importance)
    if not config.amateur_path and ("amateur" in needed or config.scoring == "amateur"):
        key = "scoring" if config.scoring == "amateur" else "importance"
        raise ValueError(
            f'[teacher] {key} = "{getattr(config, key)}" needs amateur_path: the folder of an amateur\'s losses, '
            "written by torchrun -m titan_attent.scorers"
        )
    if config.amateur_path and not {"loss", "amateur"} & needed:
        raise ValueError(
            f'[teacher] importance = "{config.importance}" has no use for amateur_path: it reads more of an example '
            'than one loss. Use "attainment", "cross_entropy_difference" or "excess_loss", or remove amateur_path'
        )
    if "amateur" in needed and config.scores_forward:
        raise ValueError(
            f'[teacher] scoring = "{config.scoring}" with importance = "{config.importance}", which reads nothing of '
            'the learner: the forward passes would be for nothing. Use scoring = "amateur"'
        )
    if config.ratio_schedule == "calibrated" and config.importance != "cross_entropy_difference":
        raise ValueError(
            f'[teacher] ratio_schedule = "calibrated" with importance = "{config.importance}": it compares with the '
            'differences of trusted text; use importance = "cross_entropy_difference", or another schedule'
        )
