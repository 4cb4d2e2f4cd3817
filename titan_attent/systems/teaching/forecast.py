"""The forecast: before the first step of a selection the log says what will be trained, how often, of which source.

Scores on disk are known before step 1 and never change, so that the forecast is then the whole run's. Where importances
follow the learner it is of the first round that selects.
"""

import logging
from collections.abc import Mapping

from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.teaching.config import TeacherConfig

logger = logging.getLogger(__name__)

MAX_VISITS = 2
"""Beyond it a warning: what is trained more often teaches less each time."""
MIN_SOURCE_SHARE = 0.05
"""Of a source's examples: where fewer are selected, next to nothing of it is trained."""
NUM_NAMED_SOURCES = 4
"""Of those with the smallest and with the largest share, as many are named."""

_INCLUSION = "teacher/inclusion/"


def log_forecast(
    config: TeacherConfig, metrics: Mapping[str, float], *, visits: float, step: int, num_examples: int, takes_all: bool
) -> None:
    """Log on the first rank what the decision in force means for the run; a warning where examples come often.

    Args:
        metrics: the teacher's, of that decision.
        visits: how often the run trains an example that is selected, or would, in a dry run.
        step: training steps done.
        num_examples: of the data set.
        takes_all: the scores leave nothing out.
    """
    if not is_first_rank():
        return
    if takes_all:
        logger.info(f"Teacher: nothing is left out; each of {num_examples:,} examples is trained {visits:.1f} times")
        return
    by_source = {tag.removeprefix(_INCLUSION): share for tag, share in metrics.items() if tag.startswith(_INCLUSION)}
    said = [
        f"Teacher: from step {step + 1} on {metrics['teacher/ratio']:.1%} of {num_examples:,} examples "
        f"{'would be' if config.dry_run else 'are'} selected, each trained {visits:.1f} times in this run"
    ]
    if by_source:
        told = sorted(by_source.items(), key=lambda item: item[1])
        if len(told) > 2 * NUM_NAMED_SOURCES:
            told = [*told[:NUM_NAMED_SOURCES], *told[-NUM_NAMED_SOURCES:]]
        said.append("selected of " + ", ".join(f"{name} {share:.1%}" for name, share in told))
    if config.follows_learner:
        said.append("later rounds choose anew")
    risks = []
    if visits > MAX_VISITS and config.strategy != "random":
        risks.append(
            f"That is more than {MAX_VISITS} times: repeated text teaches less each time. Fewer steps, more data or a "
            "larger ratio repeat less"
        )
    if left := [name for name, share in by_source.items() if share < MIN_SOURCE_SHARE]:
        risks.append(
            f"Next to nothing of {', '.join(left[:NUM_NAMED_SOURCES])} is trained: if it is wanted, put text of its kind "
            "into the trusted text, or score it otherwise"
        )
    logger.log(logging.WARNING if risks else logging.INFO, ". ".join(["; ".join(said), *risks]))
