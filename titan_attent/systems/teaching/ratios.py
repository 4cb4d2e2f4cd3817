"""The ratio of a draw where the scores decide it: what they ask for, what bounds it, and that the user hears of it.

Cost: for the calibrated schedule a count of the scores below each trusted one, an all-reduce of 8 bytes for each of at
most 65,536 of these a draw, and once more over all of the data before the first.
"""

from collections.abc import Callable

from torch import Tensor

from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.advice import warn_of_foreign_text, warn_of_repeats
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO


class RatioFromScores:
    """Decides the ratio of draws from pools of one size, and tells once what kept it from what the scores ask for.

    Args:
        config: the schedule.
        size: P, candidates of a pool.
        bound: how often the run may train an example (schedule.py).
        trusted: fp32, sorted: cross-entropy differences of trusted examples, for the calibrated schedule.
        all_scores: the scores of all examples, whatever the pool; asked for once. A collective.

    Where the strategy does not read the ratio nothing is told of it.
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        size: int,
        bound: schedule.RepeatBound,
        trusted: Tensor | None,
        all_scores: Callable[[], Scores],
    ):
        self.config, self.size, self.bound, self.trusted, self.all_scores = config, size, bound, trusted, all_scores
        self._is_foreign = None if config.strategy in READ_THE_RATIO else False
        self._told = config.strategy not in READ_THE_RATIO

    @property
    def never_selects(self) -> bool:
        """Whether every draw of the run takes all, whatever its scores."""
        return self.bound.min_ratio == 1.0 or bool(self._is_foreign)

    def decide(self, scores: Scores, *, batch_size: int) -> float:
        """The ratio of a draw. A collective.

        Args:
            scores: of the pool.
            batch_size: a selection holds a multiple of it.
        """
        if self._is_foreign is None:
            self._is_foreign = self._finds_foreign_text()
        decided = schedule.decided_ratio(
            self.config,
            share=scores.metrics.clipped_share,
            below=[] if self.trusted is None else scores.num_below(self.trusted),
            num_examples=self.size,
            least=self.bound.min_ratio,
            is_foreign=self._is_foreign,
        )
        least, selected = (
            schedule.selection_size(self.size, ratio=ratio, batch_size=batch_size)
            for ratio in (decided.asked, decided.ratio)
        )
        if selected > 1.01 * least and not (self._told or self._is_foreign):  # a difference that one can see
            asked = max(decided.asked, batch_size / self.size)
            warn_of_repeats(self.config, self.bound, asked=asked, ratio=decided.ratio, size=self.size)
            self._told = True
        return decided.ratio

    def _finds_foreign_text(self) -> bool:
        """Whether the trusted text is of another kind than the data, and say so if it is."""
        if self.trusted is None:
            return False
        everything = self.all_scores()
        below, num_examples = everything.num_below(self.trusted), everything.sharding.num_examples
        asked = schedule.calibrated_ratio(below, num_examples=num_examples)
        likeness = schedule.likeness(below, num_examples=num_examples)
        if schedule.holds_trusted_kind(asked=asked, likeness=likeness, least=self.bound.min_ratio):
            return False
        warn_of_foreign_text(asked=asked, likeness=likeness)
        return True
