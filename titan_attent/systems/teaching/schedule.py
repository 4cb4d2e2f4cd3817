"""Schedules: progress in [0, 1] -> the ratio and the interval of a round. Pure.

AtteNT's "complex" recipe moves both during training. Selections are small and quickly renewed while losses change fast,
large and longer-lived later (the paper's ablation: 0.2 -> 0.8). Both are computed once per round, at its start.

Where examples differ in length, ratios are shares of tokens, and sizes of data, pools and batches are in tokens
(tokens.py).
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.tokens import Below


def progress(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """(step - warm-up) / (total - warm-up), clipped to [0, 1]."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def ratio_at(progress: float, *, schedule: str, initial: float, final: float) -> float:
    """The share of the pool to train on."""
    if schedule == "constant":
        return initial
    if schedule == "cosine":
        return initial + (final - initial) * (1 - math.cos(math.pi * progress)) / 2
    assert schedule == "incremental"
    return initial + (final - initial) * progress


MIN_LEFT_OUT = 0.3
"""If the adaptive schedule would leave out less than this share, it leaves out nothing."""


def adaptive_ratio(share: float, *, lowest: float, highest: float) -> float:
    """The ratio from the effective sample size: ``share`` squared, within bounds.

    share = (sum s)^2 / (N sum s^2) of the importances is 1 when all are equal, and about m / N when m of them matter.
    On clean data it stays near 1, and the selection approaches uniform training; the square leaves out more when few
    matter.

    On clean text that was trained once, some examples are learned better than others, and the ratio is 0.73 to 0.78.
    Leaving out a quarter of that text does harm (docs/results/convergence.md), so from 0.7 on nothing is left out. A
    twentieth of junk brings the ratio below 0.7.
    """
    ratio = share * share
    return min(highest, max(lowest, 1.0 if ratio >= 1 - MIN_LEFT_OUT else ratio))


WEIGHT_OF_TRUSTED = 2
"""Cost of leaving out a share of the trusted text, relative to the gain of leaving out the same share of the data."""
MIN_GAIN = 0.1
"""If the maximum of :func:`calibrated_ratio` is less than this, nothing is left out."""


def calibrated_cut(below: Sequence[int], *, num_examples: int) -> int | None:
    """The index of the trusted score below which data is left out; None if nothing is to be left out.

    The cut maximises (share of the data below it) - 2 x (share of the trusted text below it). Below the cut, scores are
    less than half as frequent in trusted text as in the data, so an example with such a score is more likely something
    else, whatever the other data is. If the maximum is less than a tenth, nothing is left out: the saving is small, and
    the examples may be good text of a kind that is rare in the trusted text.

    It is the two-sample statistic of Kolmogorov and Smirnov, weighted by the costs of the two errors (Youden 1950).

    Args:
        below: for each score of trusted text, in ascending order: the number of examples that score lower.
        num_examples: size of the data.
    """
    loss = WEIGHT_OF_TRUSTED / len(below)
    gain, minus_j = max((count / num_examples - loss * j, -j) for j, count in enumerate(below))
    return -minus_j if gain >= MIN_GAIN else None


def calibrated_ratio(below: Sequence[int], *, num_examples: int) -> float:
    """The share of the data that :func:`calibrated_cut` keeps."""
    cut = calibrated_cut(below, num_examples=num_examples)
    return 1.0 if cut is None else 1.0 - below[cut] / num_examples


def calibrated_share(below: Below) -> float:
    """The share of the pool, or of its tokens, that :func:`calibrated_cut` keeps.

    Where examples differ in length, the cut still compares examples of the data with examples of trusted text, so that
    both sides are measured alike.
    """
    if below.tokens is None or below.num_tokens is None:
        return calibrated_ratio(below.examples, num_examples=below.num_examples)
    cut = calibrated_cut(below.examples, num_examples=below.num_examples)
    return 1.0 if cut is None else 1.0 - below.tokens[cut] / below.num_tokens


MIN_LIKENESS = 0.1
"""If :func:`likeness` of the kept data is significantly below this, nothing is left out."""
MIN_REQUESTED = 1 / 30
"""If the scores request less than this fraction of the share that ``max_repeats`` requires, nothing is left out."""


class Likeness(NamedTuple):
    """How much the data that :func:`calibrated_ratio` would keep is like trusted text.

    Attributes:
        probability: that a kept example scores at least as high as a trusted one: 1/2 if they are of the same kind.
        standard_error: of this estimate from a sample of trusted text and of the kept data.
    """

    probability: float
    standard_error: float

    @property
    def is_low(self) -> bool:
        """Whether the probability is below ``MIN_LIKENESS`` by more than its error, at 97.5% confidence."""
        return self.probability + 1.96 * self.standard_error < MIN_LIKENESS


def likeness(below: Sequence[int], *, num_examples: int, cluster_size: float = 1.0) -> Likeness:
    """How much the data that :func:`calibrated_ratio` would keep is like trusted text.

    If no data is of the trusted text's kind, trusted text scores higher than nearly all of it, and the kept examples
    are outliers. But with a hundred trusted documents, or scorers that know the trusted text better than the rest of
    its kind, the estimate is also low for the same kind; therefore its error.

    Sources: Mann and Whitney 1947; DeLong et al. 1988 (the standard error).

    Args:
        below: see :func:`calibrated_ratio`.
        cluster_size: mean number of examples that share one score, because they are of one span.
    """
    kept, num_trusted = round(calibrated_ratio(below, num_examples=num_examples) * num_examples), len(below)
    if not kept:
        return Likeness(0.0, 0.0)
    # Of each trusted score: the share of the kept examples that reach it.
    above = [min(kept, num_examples - count) / kept for count in below]
    probability = math.fsum(above) / num_trusted
    of_trusted = math.fsum((share - probability) ** 2 for share in above) / max(1, num_trusted - 1)
    # Of the kept examples between two trusted scores: the share of the trusted scores that they reach.
    steps = zip([1.0, *above], [*above, 0.0], strict=True)
    of_kept = math.fsum((more - less) * (j / num_trusted - probability) ** 2 for j, (more, less) in enumerate(steps))
    return Likeness(probability, math.sqrt(cluster_size * (of_trusted / num_trusted + of_kept / kept)))


MAX_REPEATS = 4.0
"""Passes over the same text that teach almost as much as new text (Muennighoff et al., NeurIPS 2023)."""


class RepeatBound(NamedTuple):
    """How often a run may train an example, and the ratio that follows from it.

    Attributes:
        min_ratio: the smallest ratio that a schedule may take from the scores.
        max_repeats: how often a run may train an example.
        visits: ratio -> how often a run with this ratio trains an example that it selects.
    """

    min_ratio: float
    max_repeats: float
    visits: Callable[[float], float]


UNBOUNDED = RepeatBound(0.0, math.inf, lambda ratio: 0.0)


def repeat_bound(
    config: TeacherConfig, *, num_examples: int, batch_size: int, total_steps: int, scorers: Collection[str] = ()
) -> RepeatBound:
    """The bound of ``max_repeats`` on a schedule that reads the scores: ratio >= steps x batch / (repeats x data).

    Both sizes are of tokens where examples differ in length.

    The ratio is rounded up to a whole batch. With pools, only whole passes over a selection count, and only the full
    pools of each order of the data. ``UNBOUNDED`` for the other schedules.
    """
    if config.ratio_schedule not in DECIDED_BY_SCORES:
        return UNBOUNDED
    steps = num_examples // batch_size
    plan = Plan(config, steps_of_full_pass=steps, total_steps=total_steps, scorers=scorers)
    repeats, size = plan.max_repeats, config.pool_size or num_examples
    shortest, longest = (plan.interval(step) for step in (0, total_steps)) if config.pool_size else (1, 1)
    allowed = repeats if longest == 1 else shortest * (repeats // longest)
    num_batches = math.ceil(total_steps / (allowed * (num_examples // size)) - 1e-9)
    min_ratio = num_batches * batch_size / size if num_batches < size // batch_size else 1.0
    return RepeatBound(min_ratio, repeats, partial(plan.visits, num_examples=num_examples, batch_size=batch_size))


class DecidedRatio(NamedTuple):
    """The ratio of a schedule that reads the scores.

    Attributes:
        ratio: the ratio to select.
        requested: the ratio that the scores request, without :func:`repeat_bound`.
    """

    ratio: float
    requested: float


def decided_ratio(
    config: TeacherConfig, *, share: float, below: Below | None, min_ratio: float, is_foreign: bool
) -> DecidedRatio:
    """The ratio of a schedule that reads the scores; see the functions above.

    Args:
        share: effective sample size, for the adaptive schedule.
        below: for the calibrated schedule: the pool below each score of trusted text.
        min_ratio: from :func:`repeat_bound`.
        is_foreign: the trusted text is of another kind than the data (not :func:`holds_trusted_kind`): nothing is left
            out.
    """
    if config.ratio_schedule == "calibrated":
        assert below is not None
        requested = calibrated_share(below)
    else:
        requested = adaptive_ratio(share, lowest=config.initial_ratio, highest=config.final_ratio)
    return DecidedRatio(1.0 if is_foreign else max(requested, min_ratio), requested)


def holds_trusted_kind(*, requested: float, likeness: Likeness, min_ratio: float) -> bool:
    """Whether the data hold enough text of the trusted text's kind to select by it.

    If not, the examples closest to the trusted text are of no kind that the user wants, and training on them does harm
    (docs/guide/choosing.md).

    Args:
        requested: :func:`calibrated_ratio` of all data; 1 if nothing is to be left out.
        likeness: :func:`likeness` of all data.
        min_ratio: from :func:`repeat_bound`, the share that the run has to train.
    """
    return requested == 1.0 or (not likeness.is_low and requested >= MIN_REQUESTED * min_ratio)


def interval_at(progress: float, *, schedule: str, initial: int, maximum: int) -> int:
    """Passes over one selection."""
    if schedule == "fixed":
        return initial
    assert schedule == "incremental"
    return initial + round((maximum - initial) * progress)


def selection_size(num_examples: int, *, ratio: float, batch_size: int) -> int:
    """k = round(ratio x pool), rounded down to a multiple of the global batch, at least one batch."""
    return max(batch_size, round(ratio * num_examples) // batch_size * batch_size)


TAIL = 0.125
"""Share of the steps that ``full_data_tail = -1`` stands for without scores on disk."""


class Plan:
    """The phases of a run, and the values of its schedules at a step.

    Args:
        config: schedules, warm-up, tail.
        steps_of_full_pass: training steps of a pass over all examples.
        total_steps: training steps of the run.
        scorers: the scorers whose losses the run reads: "expert", "amateur".

    Attributes:
        has_amateur: whether an amateur's losses replace the learner's until it has any.
        warmup_passes, warmup_steps: full passes before the first selection, and their steps.
        tail_start: number of steps before the tail on the full data.
        tail: share of the steps in the tail on the full data.
        max_repeats: how often the run may train an example because the scores select it again; infinite if they do not
            decide the ratio. ``max_repeats = 0`` stands for 1 if the run takes at most one pass over the data, and for
            ``MAX_REPEATS`` if it takes more.
    """

    def __init__(
        self, config: TeacherConfig, *, steps_of_full_pass: int, total_steps: int, scorers: Collection[str] = ()
    ):
        self.config, self.total_steps, self.has_amateur = config, total_steps, "amateur" in scorers
        passes = config.warmup_passes
        if passes < 0:
            passes = 0 if self.has_amateur else 1
        self.warmup_passes, self.warmup_steps = passes, passes * steps_of_full_pass
        self.tail = config.full_data_tail
        if self.tail < 0:
            self.tail = 0.0 if scorers else TAIL
        self.tail_start = total_steps - int(self.tail * total_steps + 1e-9)  # 0.29 * 100 is below 29
        self.max_repeats = math.inf
        if config.ratio_schedule in DECIDED_BY_SCORES:
            self.max_repeats = config.max_repeats or (1.0 if total_steps <= steps_of_full_pass else MAX_REPEATS)

    def _progress(self, step: int) -> float:
        return progress(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def ratio(self, step: int) -> float | None:
        """The ratio of a round that starts after ``step`` steps; None if the scores decide it."""
        config = self.config
        if config.ratio_schedule in DECIDED_BY_SCORES:
            return None
        initial, final = config.initial_ratio, config.final_ratio
        return ratio_at(self._progress(step), schedule=config.ratio_schedule, initial=initial, final=final)

    def visits(self, ratio: float | None, *, num_examples: int, batch_size: int) -> float:
        """How often the whole run trains an example that it always selects.

        Args:
            ratio: the ratio of every round; None for the ratios of the schedule, if it does not read the scores.
        """
        steps = range(self.warmup_steps, self.tail_start)
        selected = len(steps) / (ratio or 1.0)
        if ratio is None and steps:
            size, sampled = self.config.pool_size or num_examples, steps[:: max(1, len(steps) // 1000)]
            sizes = [selection_size(size, ratio=self.ratio(i) or 1.0, batch_size=batch_size) for i in sampled]
            selected = len(steps) * sum(size / k for k in sizes) / len(sizes)
        passes = selected * batch_size / num_examples
        if self.config.pool_size and ratio != 1.0:  # examples selected from a pool are trained in all passes over it
            passes = max(passes, min(self.interval(self.total_steps), len(steps)))
        return (self.total_steps - len(steps)) * batch_size / num_examples + passes

    def interval(self, step: int) -> int:
        """The passes of a round that starts after ``step`` steps; with pools at most ``max_repeats``."""
        config = self.config
        initial, maximum = config.initial_interval, config.max_interval
        passes = interval_at(self._progress(step), schedule=config.interval_schedule, initial=initial, maximum=maximum)
        return min(passes, int(self.max_repeats)) if config.pool_size and self.max_repeats < passes else passes
