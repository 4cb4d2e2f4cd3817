"""The forecast: before a selection is first trained, the log says how much is selected, how often, and of which source.

Scores on disk never change, so the forecast from them holds for the whole run. If importances follow the learner, it
holds for the first round that selects.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.teaching.config import TeacherConfig

logger = logging.getLogger(__name__)

MAX_VISITS = 2
"""Visits of an example above which the log warns: repeated training teaches less each time."""
MIN_SOURCE_SHARE = 0.05
"""Selected share of a source's examples below which the log warns."""
NUM_NAMED_SOURCES = 4
"""Number of sources named with the smallest, and with the largest, selected share."""

_INCLUSION = "teacher/inclusion/"


class Forecast(NamedTuple):
    """A sentence or more about a selection.

    Attributes:
        level: of the log; WARNING if the selection has a risk.
        text: without a period at the end.
    """

    level: int
    text: str


def forecast(
    config: TeacherConfig,
    metrics: Mapping[str, float],
    *,
    visits: float | None,
    step: int,
    num_examples: int,
    takes_all: bool,
    noun: str = "examples",
) -> Forecast:
    """Say which share is selected and how often it is trained; warn of many repeats and neglected sources.

    Args:
        metrics: the teacher's metrics of the current decision.
        visits: how often the run trains a selected example, or would, in a dry run; None if unknown.
        step: training steps done.
        num_examples: size of the data set, in what the shares count.
        takes_all: the scores leave nothing out.
        noun: "examples", or "tokens" where examples differ in length.
    """
    if takes_all:
        trained = "" if visits is None else f". Each of {num_examples:,} {noun} is trained {visits:.1f} times"
        return Forecast(logging.INFO, f"nothing is left out{trained}")
    by_source = {tag.removeprefix(_INCLUSION): share for tag, share in metrics.items() if tag.startswith(_INCLUSION)}
    trained = "" if visits is None else f", each trained {visits:.1f} times in this run"
    sentences = [
        f"from step {step + 1} on, {metrics['teacher/ratio']:.1%} of {num_examples:,} {noun} "
        f"{'would be' if config.dry_run else 'are'} selected{trained}"
    ]
    if by_source:
        shares = sorted(by_source.items(), key=lambda item: item[1])
        if len(shares) > 2 * NUM_NAMED_SOURCES:
            shares = [*shares[:NUM_NAMED_SOURCES], *shares[-NUM_NAMED_SOURCES:]]
        sentences.append("Selected share by source: " + ", ".join(f"{name} {share:.1%}" for name, share in shares))
    if config.follows_learner:
        sentences.append("Later rounds select anew")
    risks = []
    if visits is not None and visits > MAX_VISITS and config.strategy != "random":
        risks.append(
            f"Text that is trained more than {MAX_VISITS} times teaches less each time. Train for fewer steps, add "
            "data or select a larger share"
        )
    if neglected := [name for name, share in by_source.items() if share < MIN_SOURCE_SHARE]:
        risks.append(
            f"Almost nothing of {', '.join(neglected[:NUM_NAMED_SOURCES])} is trained. If you want it, put text of its "
            "kind into the trusted text, or select by other scores"
        )
    return Forecast(logging.WARNING if risks else logging.INFO, ". ".join([*sentences, *risks]))


def log_forecast(config: TeacherConfig, metrics: Mapping[str, float], **values: Any) -> None:
    """Log :func:`forecast`, whose arguments it takes, on the first rank."""
    if is_first_rank():
        level, text = forecast(config, metrics, **values)
        logger.log(level, f"Teacher: {text}")
