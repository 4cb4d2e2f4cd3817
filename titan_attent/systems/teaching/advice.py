"""Log lines and warnings for the user: plans that never select, risks of a rule, and teaching that costs too much."""

import logging
import math
import os

from titan_attent.data.examples import Examples
from titan_attent.data.text.mixing import documents_per_example
from titan_attent.foundations.ledger import Ledger
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.rule import name_of
from titan_attent.systems.teaching.schedule import Plan, RepeatBound
from titan_attent.systems.teaching.strategies import READ_THE_RATIO

logger = logging.getLogger(__name__)


def log_plan(config: TeacherConfig, plan: Plan, *, num_examples: int, batch_size: int, total_steps: int) -> None:
    """Log on the first rank the plan of a run of ``total_steps``, and warn if it never selects or does harm."""
    if not is_first_rank():
        return
    if config.strategy == "uniform":
        logger.info(
            f"Teacher: every pass trains all {num_examples:,} examples. The gradient is that of the q-norm of the "
            f"losses of a step's inputs, with q = {config.q:g}"
        )
        return
    strategy, num_last = name_of(config), total_steps - plan.tail_start
    full = f". The first {plan.warmup_steps} and the last {num_last} of {total_steps} steps train on the full data"
    logger.info(
        f'Teacher: strategy = "{strategy}" on {num_examples:,} examples{full * (plan.warmup_steps + num_last > 0)}'
        f"{_visits(config, plan, num_examples, batch_size)}"
    )
    if plan.warmup_steps >= plan.tail_start:
        logger.warning(
            f"The teacher never selects: its warm-up of {plan.warmup_passes} full passes takes {plan.warmup_steps} "
            f"steps, and the full-data tail starts after step {plan.tail_start}. All steps train on the full data. "
            "Train for more steps, or lower teacher.warmup_passes or teacher.full_data_tail"
        )
    visits = total_steps * batch_size / num_examples
    if visits <= 1 and config.strategy != "random":
        if config.scoring == "train" and not plan.has_amateur:
            logger.warning(
                f"This run trains on each example {visits:.2g} times, so training losses come too late to select by. "
                'Set teacher.scoring = "forward" with a teacher.pool_size and teacher.warmup_passes = 0, or only '
                'weight the examples (teacher.weighting = "loss")'
            )
        if config.importance == "learnability":
            logger.warning(
                f"This run trains on each example {visits:.2g} times, but learnability needs two losses of an example. "
                "It uses the loss itself instead, which is highest for noise. Set another teacher.importance"
            )
    key = "initial_interval" if config.interval_schedule == "fixed" else "max_interval"
    if config.pool_size and (passes := plan.interval(total_steps)) < (requested := getattr(config, key)):
        logger.warning(
            f"Each selection from a pool is trained in {passes} passes, not in the {requested} of teacher.{key}: "
            f"teacher.max_repeats = {plan.max_repeats:g} allows no more. Raise it for more passes"
        )
    if config.scores and plan.tail > 0:
        logger.info(
            f"The last {plan.tail:.1%} of the steps train on the full data, including examples that the scores leave "
            "out. If these are dirt, set teacher.full_data_tail = 0"
        )
    if strategy == "hard" and config.weighting == "inverse_probability":
        logger.info(
            'All selected examples have equal weights: strategy = "hard" drops the others with certainty, and no '
            "weight corrects for that"
        )
    if (risk := risk_of(config, has_amateur=plan.has_amateur)) is not None:
        logger.log(*risk)


def _visits(config: TeacherConfig, plan: Plan, num_examples: int, batch_size: int) -> str:
    """A phrase for the log: how often a selected example will be trained, if the plan alone decides that."""
    if config.strategy not in READ_THE_RATIO or plan.warmup_steps >= plan.tail_start:
        return ""
    if config.ratio_schedule in DECIDED_BY_SCORES:
        return ""  # forecast.py logs it once there are scores
    visits = plan.visits(None, num_examples=num_examples, batch_size=batch_size)
    return f". An example that is always selected is trained {visits:.1f} times"


def warn_of_unread_keys(config: TeacherConfig) -> None:
    """Log on the first rank the keys that are set but not read, because the strategy is "uniform"."""
    if os.environ.get("RANK", "0") == "0" and (unread := keys_without_a_rule(config)):
        logger.warning(
            f'teacher.strategy = "uniform" trains on every example. These keys are set but not read: '
            f'{", ".join(unread)}. To select examples, set another strategy: "hard" takes those of largest importance'
        )


def keys_without_a_rule(config: TeacherConfig) -> list[str]:
    """Keys about the selection of examples that differ from their defaults; they have no effect without a strategy."""
    keys = ("importance", "scores", "scoring", "pool_size", "ratio_schedule")
    default = TeacherConfig()
    return [f"teacher.{key}" for key in keys if getattr(config, key) != getattr(default, key)]


def risk_of(config: TeacherConfig, *, has_amateur: bool) -> tuple[int, str] | None:
    """Level and text of the known risk of a rule, as measured (docs/guide/choosing.md); None if no risk is known.

    A control has no risk, nor has a dry run.
    """
    if config.strategy in ("uniform", "random", "threshold") or config.dry_run:
        return None
    if config.importance in ("loss", "functional_gradient") and config.strategy == "hard" and not config.warmup_passes:
        return logging.WARNING, (
            f'strategy = "hard" with importance = "{config.importance}" from the first step on selects the hardest '
            "examples before the learner knows the easy ones. That cost 24 to 38 points of accuracy on clean images "
            '(docs/results/vision.md). Set teacher.warmup_passes = 1, or strategy = "soft"'
        )
    if config.importance in ("loss", "functional_gradient"):
        return logging.WARNING, (
            f'strategy = "{config.strategy}" with importance = "{config.importance}" does harm if the data is noisy: '
            "noise always has the highest loss, so it is selected again and again. Unless you know that the data is "
            'clean, use strategy = "difference" (torchrun -m titan_attent.score pair writes the scores that it reads), '
            'or importance = "attainment"'
        )
    if config.importance == "cross_entropy_difference":
        return logging.INFO, (
            "The run leaves out kinds of text that are rare in the trusted text, good or not. Watch "
            "teacher/inclusion/*, the selected share of each data source. Put text of every kind that you want into "
            "the trusted text"
        )
    if config.importance == "attainment" and not has_amateur and not config.scores_forward:
        return logging.WARNING, (
            'importance = "attainment" with training losses, which are a pass old or older, does harm if the data has '
            'copies: the losses of all copies fall together. Set teacher.scoring = "forward_once", or deduplicate the '
            "data first"
        )
    if config.importance == "attainment" and not has_amateur:
        return logging.WARNING, (
            'importance = "attainment" takes an example for noise if the learner still predicts it no better than by '
            "guessing after the first pass, and does not select it again. In data with many rare classes, these are "
            "all of the rare ones (docs/results/vision.md). Use it if no kind of data is rare, or raise "
            "teacher.warmup_passes"
        )
    if config.importance == "attainment" and has_amateur:
        return logging.WARNING, (
            "Only the amateur decides: rare data, such as a second language, looks like noise to it and is left out. "
            'If you have trusted text of every kind that you want, use strategy = "difference" (torchrun -m '
            "titan_attent.score pair)"
        )
    return None


def warn_below_break_even(ledger: Ledger) -> bool:
    """Warn on the first rank, and return True, if the examples skipped so far save less compute than teaching costs."""
    below = ledger.break_even_share > ledger.skipped_share + 0.01
    if below and is_first_rank():
        logger.warning(
            f"Teaching costs more compute than it saves: {ledger.skipped_share:.1%} of the examples were skipped, "
            f"but {ledger.break_even_share:.1%} would pay for scoring, selecting and exchanging. Lower the ratios, or "
            'score less often (teacher.scoring = "forward_once" or "train", a longer interval). Ignore this if better '
            "examples are worth the compute"
        )
    return below


def warn_of_fallback(step: int, *, share: float, minimum: float) -> None:
    """Warn on the first rank that a pass trains its whole pool, because a few examples would dominate a selection."""
    if is_first_rank():
        logger.warning(
            f"The pass after step {step} trains its whole pool, because a few examples would dominate a selection: the "
            f"effective sample size of the importances is {share:.2%} of the pool, under "
            f"teacher.min_effective_sample_size = {minimum}. If that is intended, lower this key. Logged once; the "
            "metric teacher/fallback is 1 for every such pass"
        )


def warn_of_foreign_text(*, requested: float, likeness: float) -> None:
    """Warn on the first rank that the data hold no text of the trusted text's kind; the run trains on everything."""
    if is_first_rank():
        logger.warning(
            "The run selects nothing and trains on all of the data: the trusted text is of another kind than the data. "
            f"The {requested:.2%} of the data that are closest to it score as high as trusted text with a probability "
            f"of {likeness:.1%}; for text of the same kind it is 50%. Write new scores (torchrun -m titan_attent.score "
            "pair) with trusted text of the kinds in this data that you want. If windows mix documents, set "
            'data.unit = "document" or lower training.seq_len: a mixed window resembles no kind of text'
        )


MIXED_WINDOW_DOCUMENTS = 1.5
"""Documents per window from which selecting among windows may gain less than selecting documents."""


def warn_of_mixed_windows(config: TeacherConfig, dataset: Examples) -> None:
    """Warn if examples hold several documents and scores decide which examples are trained."""
    if (
        config.strategy in ("uniform", "random")
        or (documents := documents_per_example(dataset)) < MIXED_WINDOW_DOCUMENTS
    ):
        return
    logger.warning(
        f"A window of {dataset.seq_len:,} tokens holds {documents:.1f} documents, and its score is their mean. Windows "
        "differ less than documents do, so selecting among them may gain less (docs/guide/choosing.md). Set "
        'data.unit = "document" and score the data again, set training.seq_len to about '
        f'{_round(dataset.seq_len / documents)}, or use strategy = "uniform"'
    )


def _round(tokens: float) -> int:
    """The nearest power of two, at least 64."""
    return max(64, 1 << round(math.log2(tokens)))


def warn_of_repeats(
    config: TeacherConfig, bound: RepeatBound, *, requested: float, ratio: float, size: int, noun: str = "examples"
) -> None:
    """Warn on the first rank that the selection is larger than the scores ask for, since a smaller one would repeat."""
    if is_first_rank():
        first = "" if config.strategy == "random" else ", the best first"
        logger.warning(
            f"The scores ask for {requested:.1%} of {size:,} {noun}, which this run would train "
            f"{bound.visits(requested):.1f} times each. With teacher.max_repeats = {bound.max_repeats:g} it "
            f"{'leaves nothing out' if ratio == 1.0 else f'selects {ratio:.1%}{first}'}. Raise teacher.max_repeats to "
            "follow the scores. Logged once; the metric teacher/repeats is the number of times that the run trains a "
            "selected example"
        )
