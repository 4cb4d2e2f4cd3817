"""What a user is told: plans that cannot teach, and teaching that does not pay."""

import logging
import math
import os

from titan_attent.data.examples import Examples
from titan_attent.data.text.mixing import documents_per_example
from titan_attent.foundations.ledger import Ledger
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.schedule import Plan, RepeatBound
from titan_attent.systems.teaching.strategies import READ_THE_RATIO

logger = logging.getLogger(__name__)


def log_plan(config: TeacherConfig, plan: Plan, *, num_examples: int, batch_size: int, total_steps: int) -> None:
    """Log on the first rank what a run of ``total_steps`` will do, and warn where it will not teach."""
    if not is_first_rank():
        return
    logger.info(
        f"Teacher: {config.strategy}, {num_examples:,} examples, warm-up {plan.warmup_steps} steps, full data "
        f"again from step {plan.tail_start + 1} of {total_steps}{_visits(config, plan, num_examples, batch_size)}"
    )
    if plan.warmup_steps >= plan.tail_start:
        logger.warning(
            f"The teacher never selects: its warm-up of {plan.warmup_passes} full passes takes {plan.warmup_steps} "
            f"steps and the tail on the full data starts at {plan.tail_start}. Train for more steps, or lower "
            "teacher.warmup_passes or teacher.full_data_tail"
        )
    visits = total_steps * batch_size / num_examples
    if visits <= 1 and config.strategy != "random":
        if config.scoring == "train" and not plan.has_amateur:
            logger.warning(
                f"An example is trained {visits:.2g} times in this run: its loss of training comes too late to choose "
                'it by. Use teacher.scoring = "forward" with a teacher.pool_size and warmup_passes = 0, or weights '
                'alone (teacher.weighting = "loss")'
            )
        if config.importance == "learnability":
            logger.warning(
                f"An example is trained {visits:.2g} times in this run: learnability needs two readings of its loss "
                "and falls back to the loss itself"
            )
    key = "initial_interval" if config.interval_schedule == "fixed" else "max_interval"
    if config.pool_size and (passes := plan.interval(total_steps)) < (asked := getattr(config, key)):
        logger.warning(
            f"A selection from a pool is trained in {passes} passes, not in the {asked} of teacher.{key}: with "
            f"teacher.max_repeats = {plan.max_repeats:g} no example comes more often"
        )
    if config.scores and plan.tail > 0:
        logger.info(
            f"The last {plan.tail:.1%} of the steps train on the full data, which holds what the scores leave out. "
            "Where that is dirt, set teacher.full_data_tail to 0"
        )
    if config.strategy == "hard" and config.weighting == "inverse_probability":
        logger.info("Hard selection has equal weights: no weight corrects for examples dropped with certainty")
    if (risk := risk_of(config, has_amateur=plan.has_amateur)) is not None:
        logger.log(*risk)


def _visits(config: TeacherConfig, plan: Plan, num_examples: int, batch_size: int) -> str:
    """How often a selected example will be trained, as far as the plan alone tells."""
    if config.strategy not in READ_THE_RATIO or plan.warmup_steps >= plan.tail_start:
        return ""
    if config.ratio_schedule in DECIDED_BY_SCORES:
        return ""  # forecast.py tells, once there are scores
    visits = plan.visits(None, num_examples=num_examples, batch_size=batch_size)
    return f"; an example that is always selected is trained {visits:.1f} times"


def warn_of_unread_keys(config: TeacherConfig) -> None:
    """Say on the first rank which keys are not read where nothing is chosen."""
    if os.environ.get("RANK", "0") == "0" and (unread := keys_without_a_rule(config)):
        logger.warning(
            f'teacher.strategy is "uniform": not read {"is" if len(unread) == 1 else "are"} {", ".join(unread)}. '
            'To teach, name a strategy: "hard" takes the examples of largest importance'
        )


def keys_without_a_rule(config: TeacherConfig) -> list[str]:
    """Those that ask for a choice of examples, where none is made: set in the TOML, and the strategy left out."""
    keys = ("importance", "scores", "scoring", "pool_size", "ratio_schedule")
    before = TeacherConfig()
    return [f"teacher.{key}" for key in keys if getattr(config, key) != getattr(before, key)]


def risk_of(config: TeacherConfig, *, has_amateur: bool) -> tuple[int, str] | None:
    """Level and text of what a rule can do harm by, as measured (docs/guide/choosing.md); None where nothing is known.

    A control has no risk, nor has a dry run.
    """
    if config.strategy in ("uniform", "random", "threshold") or config.dry_run:
        return None
    if config.importance in ("loss", "functional_gradient") and config.strategy == "hard" and not config.warmup_passes:
        return logging.WARNING, (
            f'hard on importance = "{config.importance}" from the first step on teaches the hardest examples to a '
            "learner that knows none of the easy ones: 24 to 38 points of accuracy on clean images "
            '(docs/results/vision.md). Set teacher.warmup_passes = 1, or strategy = "soft"'
        )
    if config.importance in ("loss", "functional_gradient"):
        return logging.WARNING, (
            f'{config.strategy} on importance = "{config.importance}" does harm where data is noisy: noise keeps the '
            "highest loss for ever, and is trained for ever. Unless you know that yours is clean, use strategy = "
            '"difference" (torchrun -m titan_attent.score pair writes the scores that it reads), or "attainment"'
        )
    if config.importance == "cross_entropy_difference":
        return logging.INFO, (
            "What the trusted text has too little of is left out, good or not: watch teacher/inclusion, the share "
            "chosen of each data source, and put text of every kind that you want into the trusted text"
        )
    if config.importance == "attainment" and not has_amateur and not config.scores_forward:
        return logging.WARNING, (
            "Attainment on losses of training, a pass old and more, does harm where data has copies: their losses fall "
            'together. Use scoring = "forward_once", or deduplicate the data first'
        )
    if config.importance == "attainment" and not has_amateur:
        return logging.WARNING, (
            "Attainment takes for noise what is not yet predicted better than by guessing after the first pass, and "
            "does not teach it again: with a long tail of classes, all of the rare ones (docs/results/vision.md). Use "
            "it where no kind of data is rare, or pass over all of the data more often first (teacher.warmup_passes)"
        )
    if config.importance == "attainment" and has_amateur:
        return logging.WARNING, (
            "The amateur alone judges: what is rare in the data, such as a second language, looks like noise to it and "
            'is left out. With trusted text of every kind that you want, use strategy = "difference" (torchrun -m '
            "titan_attent.score pair)"
        )
    return None


def warn_below_break_even(ledger: Ledger) -> bool:
    """Warn on the first rank, and return True, if what was skipped so far does not pay for the teacher."""
    below = ledger.break_even_share > ledger.skipped_share + 0.01
    if below and is_first_rank():
        logger.warning(
            f"Teaching costs more compute than it saves: {ledger.skipped_share:.1%} of the examples were skipped, "
            f"{ledger.break_even_share:.1%} pay for scoring, selecting and exchanging. Lower the ratios, score less "
            'often (teacher.scoring = "forward_once" or "train", a longer interval), or take it as the price of better '
            "examples"
        )
    return below


def warn_of_fallback(step: int, *, share: float, least: float) -> None:
    """Warn on the first rank of a pass that trains its whole pool, as a handful of examples would rule it."""
    if is_first_rank():
        logger.warning(
            f"The pass after step {step} trains its whole pool: the effective sample size of the importances is "
            f"{share:.2%} of the pool, under teacher.min_effective_sample_size = {least}. Said once: the metric "
            "teacher/fallback is 1 for every such pass"
        )


def warn_of_foreign_text(*, asked: float, likeness: float) -> None:
    """Warn on the first rank of trusted text of a kind that the data do not hold; the run trains everything."""
    if is_first_rank():
        logger.warning(
            "Trained uniformly: the trusted text is of another kind than the data. Of the data "
            f"{asked:.2%} come close to it, which score as high as trusted text with a probability of {likeness:.1%}, "
            "where text of one kind has 50%. Make the scorers (torchrun -m titan_attent.score pair) with trusted text "
            "of the kinds that you want of this data. Windows that mix documents look like no kind of text, either"
        )


MIXED_WINDOW_DOCUMENTS = 1.5
"""Documents per window from which on windows are no good unit of choice."""


def warn_of_mixed_windows(config: TeacherConfig, dataset: Examples) -> None:
    """Warn of examples that hold several documents, where scores decide which examples are trained."""
    if config.strategy in ("uniform", "random") or (documents := documents_per_example(dataset)) < MIXED_WINDOW_DOCUMENTS:
        return
    logger.warning(
        f"A window of {dataset.seq_len:,} tokens holds {documents:.1f} documents: its score is their mean, windows "
        "differ less than documents do, and choosing among them gains less or does harm (docs/guide/choosing.md). Set "
        f"training.seq_len to about {_round(dataset.seq_len / documents)}, choose among documents before they are "
        'written, or use strategy = "uniform"'
    )


def _round(tokens: float) -> int:
    """The power of two next to it, 64 at least."""
    return max(64, 1 << round(math.log2(tokens)))


def warn_of_repeats(config: TeacherConfig, bound: RepeatBound, *, asked: float, ratio: float, size: int) -> None:
    """Warn on the first rank that a selection is larger than the scores ask for, since a smaller one would repeat."""
    if is_first_rank():
        first = "" if config.strategy == "random" else ", the best first"
        logger.warning(
            f"The scores ask for {asked:.1%} of {size:,} examples, which this run would train "
            f"{bound.visits(asked):.1f} times each. With teacher.max_repeats = {bound.max_repeats:g} it "
            f"{'leaves nothing out' if ratio == 1.0 else f'selects {ratio:.1%}{first}'}; raise it to follow the scores "
            "all the same. Said once; teacher/repeats tells how often the selected ones are trained"
        )
