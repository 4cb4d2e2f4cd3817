"""The ratio of a draw if the scores decide it: what they request, the bounds, and the warnings about them.

Cost: for the calibrated schedule, a count of the scores below each trusted score per draw, an all-reduce of 16 bytes
for each of at most 65,536; and one more over all of the data before the first draw.
"""

from collections.abc import Callable

from torch import Tensor

from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.advice import warn_of_foreign_text, warn_of_repeats
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO


class RatioFromScores:
    """Decides the ratio of draws from pools of one size, and warns once if it differs from the ratio that the scores
    request.

    Args:
        config: the schedule.
        size: P, candidates of a pool, or their tokens where examples differ in length.
        bound: how often the run may train an example (schedule.py).
        trusted: fp32, sorted: cross-entropy differences of trusted examples, for the calibrated schedule.
        all_scores: returns the scores of all examples, whatever the pool; called once. A collective.
        noun: what ``size`` counts, for the warning: "examples" or "tokens".

    A strategy that does not read the ratio causes no warnings.
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        size: int,
        bound: schedule.RepeatBound,
        trusted: Tensor | None,
        all_scores: Callable[[], Scores],
        noun: str = "examples",
    ):
        self.noun = noun
        self.config, self.size, self.bound, self.trusted, self.all_scores = config, size, bound, trusted, all_scores
        self._is_foreign = None if config.strategy in READ_THE_RATIO else False
        self._repeats_warned = config.strategy not in READ_THE_RATIO

    @property
    def never_selects(self) -> bool:
        """Whether every draw of the run takes all candidates, whatever their scores."""
        return self.bound.min_ratio == 1.0 or bool(self._is_foreign)

    def decide(self, scores: Scores, *, batch_size: int) -> float:
        """The ratio of a draw. A collective.

        Args:
            scores: the scores of the pool.
            batch_size: the size of a selection is a multiple of it; in tokens where ``size`` is.
        """
        if self._is_foreign is None:
            self._is_foreign = self._trusted_text_is_foreign()
        decided = schedule.decided_ratio(
            self.config,
            share=scores.metrics.clipped_share,
            below=None if self.trusted is None else scores.below(self.trusted),
            min_ratio=self.bound.min_ratio,
            is_foreign=self._is_foreign,
        )
        num_requested, num_selected = (
            schedule.selection_size(self.size, ratio=ratio, batch_size=batch_size)
            for ratio in (decided.requested, decided.ratio)
        )
        # A difference of up to 1% is not worth a warning.
        if num_selected > 1.01 * num_requested and not (self._repeats_warned or self._is_foreign):
            requested = max(decided.requested, batch_size / self.size)
            warn_of_repeats(
                self.config, self.bound, requested=requested, ratio=decided.ratio, size=self.size, noun=self.noun
            )
            self._repeats_warned = True
        return decided.ratio

    def _trusted_text_is_foreign(self) -> bool:
        """Whether the trusted text is of another kind than the data; warns if it is. A collective."""
        if self.trusted is None:
            return False
        below = self.all_scores().below(self.trusted)
        requested = schedule.calibrated_share(below)
        likeness = schedule.likeness(below.examples, num_examples=below.num_examples)
        if schedule.holds_trusted_kind(requested=requested, likeness=likeness, min_ratio=self.bound.min_ratio):
            return False
        warn_of_foreign_text(requested=requested, likeness=likeness.probability)
        return True
