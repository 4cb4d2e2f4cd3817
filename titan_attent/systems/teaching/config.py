"""The TOML section ``[teacher]``, which is also the configuration of a :class:`Teacher` in a loop of one's own.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.systems.teaching.importance import reads

DECIDED_BY_SCORES = ("adaptive", "calibrated")
RATIO_SCHEDULES = ("constant", "incremental", "cosine", *DECIDED_BY_SCORES)


_SCORES = (
    "the key is scores now: the folder that `torchrun -m titan_attent.score pair` wrote, which holds both scorers, or "
    "the folder of one scorer"
)
FORMER_KEYS = {
    "reference_path": _SCORES,
    "amateur_path": _SCORES,
    "anneal_fraction": "the key is full_data_tail now",
    "shadow": "the key is dry_run now",
}
"""Key of an earlier version -> the message of the error in which it ends."""


@dataclass
class TeacherConfig:
    strategy: str = "uniform"
    """
    Which examples a round trains on.
    - "uniform": all of them, always, with torchtitan's own loss, bit for bit.
    - "difference": the recommended rule, by scores on disk. It stands for "hard" with ``importance =
      "cross_entropy_difference"``, ``ratio_schedule = "calibrated"``, ``interval_schedule = "fixed"`` and
      ``full_data_tail = 0``, and needs ``scores``.
    - a function of systems/teaching/strategies.py, with the keys below.
    A rule that leaves examples out can do harm (docs/guide/choosing.md), so it is chosen by name.
    """

    importance: str = "attainment"
    """
    What makes an example worth teaching: a function of importance.py. The loss itself suits clean or
    redundant data only: noise has the highest loss for ever.
    """

    scores: str = ""
    """
    Folder of scores: small models' losses on every example, computed once before the run. Either the folder that
    ``torchrun -m titan_attent.score pair`` writes, with an expert (trained on trusted text) and an amateur (trained on
    a sample of the data), or the folder of one of the two. "excess_loss" reads the expert, "cross_entropy_difference"
    both. With an amateur the teacher selects from step 1 on, without a warm-up pass: the amateur's loss counts where
    the learner has none yet.
    """

    scoring: str = "train"
    """
    Where the scores come from.
    - "train": the losses seen in training; free, but as old as an example's last visit.
    - "forward": a forward pass over the pool before each round; about a third of a training pass over it.
    - "forward_once": that before the first selected round only.
    - "amateur": the amateur's losses in ``scores``, always; nothing of the learner is read.
    """

    pool_size: int = 0
    """
    Candidates of a round: 0 for the whole data set, or the next so many examples of its shuffled order, from one global
    batch on. For training that sees its data about once, with ``scoring = "forward"`` and ``warmup_passes = 0``; global
    batch / ratio is a selection every step; a multiple of it chooses better, from scores a few steps old.
    """

    scoring_batch_size: int = 0
    """Examples of a rank's batch in a scoring pass; 0 for ``training.local_batch_size``."""

    warmup_passes: int = -1
    """
    Full passes before the first selection; the losses seen in them are the first scores. -1 for as many as it takes:
    none where ``scores`` holds an amateur, else one.
    """

    ratio_schedule: str = "adaptive"
    """
    How the selected share moves from ``initial_ratio`` to ``final_ratio``: "constant", "incremental", "cosine";
    "adaptive": from the effective sample size of the round's importances, between the two; or "calibrated", which reads
    neither: it leaves out the examples whose cross-entropy difference is so low that trusted held-out text has it less
    than half as often, and nothing where that would save less than a tenth. Both keep what ``max_repeats`` asks for.
    """

    max_repeats: float = 0.0
    """
    How often a run may train an example because the scores choose it again and again, at least 1: the adaptive and the
    calibrated schedule keep at least training steps x global batch / (max_repeats x examples), and train a selection
    from a pool in no more passes. 0 for 1 where the run takes no more than one pass over the data, and for 4 where it
    takes more: beyond 4 passes nothing is left out then, unless this is raised. A tail on the full data comes on top.
    """

    initial_ratio: float = 0.5
    """
    Share of the data set selected at the start, in (0, 1]; the least share of the adaptive schedule, unless
    ``max_repeats`` asks for more.
    """

    final_ratio: float = 1.0
    """
    Share selected at the end, in (0, 1]; the largest of the adaptive schedule, unless ``max_repeats`` asks for more;
    not read by the constant one.
    """

    interval_schedule: str = "fixed"
    """How the passes over one selection move from ``initial_interval`` to ``max_interval``: "fixed", "incremental"."""

    initial_interval: int = 1
    """Passes over a selection at the start."""

    max_interval: int = 2
    """Passes over a selection at the end; not read by the fixed schedule."""

    temperature: float = 1.0
    """
    Divides the log-probabilities of the soft draw before the noise: small is nearly hard, large nearly random. Also the
    temperature of ``weighting = "loss"``.
    """

    normalization: str = "softmax"
    """Losses to log-probabilities of the soft draw: "softmax" or "sigmoid" (flatter for large losses)."""

    min_inclusion_probability: float = 0.05
    """Floor on the probability with which the soft draw takes an example, in [0, 1); 0 for none."""

    weighting: str = "inverse_probability"
    """
    Weights of the selected examples in the loss.
    - "none": all equal.
    - "inverse_probability": 1/q of the soft draw, clipped to ``max_weight``, mean 1. Other strategies have equal
      weights: random by symmetry, hard because examples dropped with certainty cannot be corrected for.
    - "loss": by the example's loss in the very step, small losses less, all above the middle alike, sharper with a
      smaller ``temperature`` (Sow et al. 2025, losses/window.py). With ``strategy = "random"``, ratios of 1 and
      ``warmup_passes = 0`` it is all that the teacher does.
    """

    max_weight: float = 4.0
    """Largest inverse-probability weight, at least 1."""

    loss_chunks: int = 1
    """
    Cut the tokens of a microbatch into so many chunks for the loss: fp32 logits of one chunk at a time, and the
    gradient in the logits' own memory, at equal results (losses/chunked.py). 1 for one pass. Chunks of a thousand
    tokens cost least. Not where tensor parallelism cuts the vocabulary, nor with ``strategy = "uniform"``.
    """

    full_data_tail: float = -1.0
    """
    The share of the steps, at the end of the run, that trains on the full data to remove the remaining bias
    (InfoBatch), in [0, 1]. -1 for 0 where ``scores`` are read, which leave out dirt, and for 0.125 elsewhere.
    """

    quarantine_after: int = 8
    """
    Selections in a row that may take an example of the top 1% importances without bringing its loss down by 5%; then no
    selection takes it again, and it is listed in <job.dump_folder>/teacher/quarantine.jsonl. 0 for no such guard.
    """

    min_effective_sample_size: float = 0.01
    """
    A pass trains its whole pool, and says so, when the effective sample size of the importances is a smaller share of
    the pool than this: a handful of examples would rule it. Negative ones count from the lowest. In [0, 1).
    """

    dry_run: bool = False
    """Decide and log, but train on everything with equal weights: shows what the teacher would do, at no risk."""

    trace: bool = False
    """Append the example ids of every step to <job.dump_folder>/teacher/trace.jsonl (rank 0)."""

    seed: int = 0
    """Seed of the selections."""

    @property
    def scores_forward(self) -> bool:
        """Whether the learner scores candidates by a forward pass."""
        return self.scoring in ("forward", "forward_once")

    @property
    def follows_learner(self) -> bool:
        """Whether importances change as the learner learns."""
        return self.scoring != "amateur" and "amateur" not in reads(self.importance)

    @property
    def keeps_streaks(self) -> bool:
        """Whether there is a quarantine: scores that never change show no example that does not improve."""
        return self.quarantine_after > 0 and self.follows_learner
