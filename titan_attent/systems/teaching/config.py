"""The TOML section ``[teacher]``, which is also the configuration of a :class:`Teacher` in a custom training loop.

This module must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager
replaces sections instead of merging them.
"""

from dataclasses import dataclass
from typing import Any

DECIDED_BY_SCORES = ("adaptive", "calibrated")
WORST_CASE = "worst_case"
"""The value of ``weighting`` for the worst case over the inputs of a batch."""
RATIO_SCHEDULES = ("constant", "incremental", "cosine", *DECIDED_BY_SCORES)


_SCORES = (
    "the key is scores now: the folder that `torchrun -m titan_attent.score pair` wrote, with the losses of both "
    "scorers, or the folder of one scorer"
)
FORMER_KEYS = {
    "reference_path": _SCORES,
    "amateur_path": _SCORES,
    "anneal_fraction": "the key is full_data_tail now",
    "shadow": "the key is dry_run now",
}
"""Key of an earlier version -> the error message for it."""

RANGES: dict[str, dict[str, Any]] = {
    "initial_ratio": {"above": 0, "at_most": 1},
    "final_ratio": {"above": 0, "at_most": 1},
    "temperature": {"above": 0},
    "min_inclusion_probability": {"at_least": 0, "below": 1},
    "max_weight": {"at_least": 1},
    "warmup_passes": {"at_least": -1, "whole": True},
    "initial_interval": {"at_least": 1, "whole": True},
    "scoring_batch_size": {"at_least": 0, "whole": True},
    "pool_size": {"at_least": 0, "whole": True},
    "loss_chunks": {"at_least": 1, "whole": True},
    "quarantine_after": {"at_least": 0, "whole": True},
    "min_effective_sample_size": {"at_least": 0, "below": 1},
    "max_repeats": {"at_least": 0},
    "q": {"at_least": 1},
    "seed": {"whole": True},
}
"""Arguments of :func:`titan_attent.foundations.checks.check_number`."""


@dataclass
class TeacherConfig:
    strategy: str = "uniform"
    """
    Which examples a round trains on.
    - "uniform": all of them, always, with torchtitan's own loss, bit for bit, unless ``weighting = "worst_case"``.
    - "difference": the recommended rule, by scores on disk. It stands for "hard" with ``importance =
      "cross_entropy_difference"``, ``ratio_schedule = "calibrated"``, ``interval_schedule = "fixed"`` and
      ``full_data_tail = 0``, and needs ``scores``.
    - a function of systems/teaching/strategies.py, with the keys below.
    A rule that leaves examples out can do harm (docs/guide/choosing.md), so no rule is the default.
    """

    level: str = "example"
    """
    What the rule decides about.
    - "example": which examples are trained.
    - "span": which tokens count in the loss. All examples are trained, in the uniform order; the labels of bad spans
      are masked. A span is the tokens of one document in a window, or 64 tokens in data without an eos id inside its
      windows. It needs ``strategy = "difference"``, ``data.unit = "window"`` and the scores of bigrams. Of the other
      keys it reads ``scores``, ``dry_run``, ``trace`` and ``seed``. It saves no compute, and ended behind uniform
      training where it was measured.
    """

    importance: str = "attainment"
    """
    How an example is ranked for selection: a function of importance.py. The loss itself suits only clean or redundant
    data: noise always has the highest loss.
    """

    scores: str = ""
    """
    Folder of scores: small models' losses on every example, computed once before the run. It is the folder that
    ``torchrun -m titan_attent.score pair`` writes, with an expert (trained on trusted text) and an amateur (trained on
    a sample of the data), or the folder of one of the two. "excess_loss" reads the expert, "cross_entropy_difference"
    both. With an amateur the teacher selects from step 1 on, without a warm-up pass: while the learner has no loss of
    an example, the amateur's loss is used.
    """

    scoring: str = "train"
    """
    Which losses examples are selected by.
    - "train": the losses seen in training. They cost nothing, but are as old as an example's last visit.
    - "forward": a forward pass over the pool before each round, at about a third of the cost of training on it.
    - "forward_once": one such forward pass, before the first selection.
    - "amateur": always the amateur's losses in ``scores``; the learner's losses are not read.
    """

    pool_size: int = 0
    """
    Number of candidates of a round: 0 for the whole data set, or the next ``pool_size`` examples of its shuffled order,
    at least one global batch. For training that sees its data about once, set it with ``scoring = "forward"`` and
    ``warmup_passes = 0``. A pool of global batch / ratio selects anew every step; a multiple of that selects better, by
    scores a few steps old.
    """

    scoring_batch_size: int = 0
    """Examples per rank and batch in a scoring pass; 0 for ``training.local_batch_size``."""

    warmup_passes: int = -1
    """
    Full passes before the first selection; the losses seen in them are the first scores. -1 for as many as needed: none
    if ``scores`` holds an amateur, else one.
    """

    ratio_schedule: str = "adaptive"
    """
    How the selected share changes during the run.
    - "constant", "incremental", "cosine": from ``initial_ratio`` to ``final_ratio``.
    - "adaptive": from the effective sample size of the round's importances, between ``initial_ratio`` and
      ``final_ratio``.
    - "calibrated": leaves out the examples whose cross-entropy difference is so low that it is less than half as
      frequent in trusted held-out text. If that would save less than a tenth, it leaves out nothing. It reads neither
      ratio.
    The last two select at least the share that ``max_repeats`` requires.
    """

    max_repeats: float = 0.0
    """
    How often a run may train an example because the scores select it again and again, at least 1. The adaptive and the
    calibrated schedule select at least training steps x global batch / (max_repeats x examples), and train a selection
    from a pool in no more passes. With ``data.unit = "document"`` it counts tokens, as ratios do. 0 for 1 if the run
    takes no more than one pass over the data, and for 4 if it takes more; a run of more than 4 passes then leaves
    nothing out. A tail on the full data comes on top.
    """

    initial_ratio: float = 0.5
    """
    Share of the data set selected at the start, in (0, 1], of its tokens with ``data.unit = "document"``; the smallest
    share of the adaptive schedule, unless ``max_repeats`` requires more.
    """

    final_ratio: float = 1.0
    """
    Share selected at the end, in (0, 1]; the largest share of the adaptive schedule, unless ``max_repeats`` requires
    more. The constant schedule does not read it.
    """

    interval_schedule: str = "fixed"
    """How the number of passes over one selection moves from ``initial_interval`` to ``max_interval``: "fixed",
    "incremental".
    """

    initial_interval: int = 1
    """Passes over a selection at the start."""

    max_interval: int = 2
    """Passes over a selection at the end; the fixed schedule does not read it."""

    temperature: float = 1.0
    """
    Divides the log-probabilities of the soft draw before the noise is added: small is nearly hard, large nearly random.
    Also the temperature of ``weighting = "loss"``.
    """

    normalization: str = "softmax"
    """How losses become log-probabilities of the soft draw: "softmax" or "sigmoid" (flatter for large losses)."""

    min_inclusion_probability: float = 0.05
    """Smallest probability with which the soft draw selects an example, in [0, 1); 0 for none."""

    weighting: str = "inverse_probability"
    """
    Weights of the selected examples in the loss.
    - "none": all equal.
    - "inverse_probability": 1/q of the soft draw, clipped to ``max_weight``, mean 1. Other strategies have equal
      weights: "random" by symmetry, "hard" because weights cannot correct for examples dropped with certainty.
    - "loss": by the example's loss in the same step. Small losses weigh less, all losses above the middle weigh the
      same, and a smaller ``temperature`` makes the difference sharper (Sow et al. 2025, losses/window.py). To use these
      weights without a selection, set ``strategy = "random"``, ratios of 1 and ``warmup_passes = 0``.
    - "worst_case": (l / L)^(q - 1), with the loss l of an input and the q-norm L of the losses of the step's inputs
      (losses/worst_case.py). An input is a group of ``data.group_size`` examples that differ in their random seed;
      their mean is taken first. It goes with ``strategy = "uniform"``, where every example is trained.
    """

    q: float = 8.0
    """
    The power of ``weighting = "worst_case"``, at least 1: 1 is the mean loss, torchtitan's own, bit for bit; the
    larger, the more the worst inputs of a batch count.
    """

    max_weight: float = 4.0
    """Largest inverse-probability weight, at least 1."""

    loss_chunks: int = 1
    """
    Number of chunks into which the loss cuts the tokens of a microbatch, so that only one chunk has fp32 logits at a
    time. The gradient overwrites the logits, and the results are equal (losses/chunked.py). 1 for no chunks. Chunks of
    a thousand tokens cost least. Not allowed if tensor parallelism shards the vocabulary, nor with ``strategy =
    "uniform"``, whose loss is torchtitan's own.
    """

    full_data_tail: float = -1.0
    """
    Share of the steps, at the end of the run, that train on the full data to remove the remaining bias (InfoBatch), in
    [0, 1]. -1 for 0 with ``scores``, which leave out dirt, and for 0.125 without.
    """

    quarantine_after: int = 8
    """
    Consecutive selections of an example in the top 1% of importances that do not lower its loss by 5%, until it is
    quarantined. No selection takes it from then on, and it is listed in <job.dump_folder>/teacher/quarantine.jsonl. 0
    for no quarantine.
    """

    min_effective_sample_size: float = 0.01
    """
    If the effective sample size of the importances is a smaller share of the pool, a few examples would dominate the
    selection: the pass then trains its whole pool and logs that. Negative importances count from the lowest. In [0, 1).
    """

    dry_run: bool = False
    """Decide and log, but train on everything with equal weights: shows the teacher's decisions without any risk."""

    trace: bool = False
    """Append the example ids of every step to <job.dump_folder>/teacher/trace.jsonl (rank 0)."""

    seed: int = 0
    """Seed of the selections."""

    @property
    def weighs_worst_case(self) -> bool:
        """Whether the loss is a q-norm over the inputs of a step; with q = 1 it is torchtitan's own."""
        return self.weighting == WORST_CASE and self.q > 1

    @property
    def scores_forward(self) -> bool:
        """Whether the learner scores candidates by a forward pass."""
        return self.scoring in ("forward", "forward_once")

    @property
    def follows_learner(self) -> bool:
        """Whether importances change as the learner learns."""
        from titan_attent.systems.teaching.importance import reads  # with torch, which a command line needs not

        return self.scoring != "amateur" and "amateur" not in reads(self.importance)

    @property
    def keeps_streaks(self) -> bool:
        """Whether there is a quarantine. If scores never change, they cannot show that an example does not improve."""
        return self.quarantine_after > 0 and self.follows_learner
