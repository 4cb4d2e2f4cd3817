"""Importance: how much an example has left to teach, from the loss buffer. Elementwise but for one median.

AtteNT (Nonparametric Teaching of Attention Learners, ICLR 2026, arXiv 2602.20461, section 4) teaches the examples whose
functional gradient is largest; for a convex loss its norm grows with the deviation from the target.

    loss                 the last loss: the deviation, as long as labels are free of noise
    functional_gradient  sqrt(mean ||softmax(z) - onehot(y)||^2) over the tokens: the norm itself, bounded by sqrt(2)
    excess_loss          loss - reference loss: without the part that no learner can remove, an estimate of KL(f* || f)
    learnability         loss x how fast it falls: noise never falls, copies have fallen; needs no reference
    attainment           loss x how far it has come from a blind guess: noise never comes far; needs one reading only

Every score is fp32 [num_local]. +inf: never trained, comes first. -inf: trained, but its loss was never finite, comes
last, so that a broken example is not taught again and again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_attent.loss_records import NEVER, Records
from titan_attent.sharding import ExampleSharding
from titan_attent.teacher.selection import kth_largest_key, ordered_keys, score_of_key


@dataclass(frozen=True)
class Known:
    """What an importance may read beside the records of the candidates.

    Attributes:
        reference: fp32 [num_local] reference losses of this rank's candidates, for excess_loss.
        vocab_size: V, for attainment: a blind guess costs ln V nats a token.
    """

    reference: Tensor | None = None
    vocab_size: int | None = None


Importance = Callable[[Records, Known], Tensor]


def loss(records: Records, known: Known) -> Tensor:
    """The last loss, mean nats a token."""
    return records.loss


def functional_gradient(records: Records, known: Known) -> Tensor:
    """The norm of the functional gradient, recorded with the last loss (loss.py)."""
    assert records.gradient is not None
    return records.gradient


def excess_loss(records: Records, known: Known) -> Tensor:
    """The last loss above the reference's, in nats a token; may be negative."""
    assert known.reference is not None
    return records.loss - known.reference


def learnability(records: Records, known: Known) -> Tensor:
    """loss x clip(d / median d, 0, 1), with d = (first loss - loss) / (log step - log first step).

    d is the fall of the loss per log-step. The gate is 1 where an example has one reading only, and for all when the
    median does not fall: then nothing is known. A collective: the exact median by radix descent.
    """
    two_readings = (records.first_step != NEVER) & (records.step > records.first_step)
    span = torch.log(records.step.clamp(min=1).double()) - torch.log(records.first_step.clamp(min=1).double())
    fall = (records.first_loss - records.loss) / torch.where(two_readings & (span > 0), span, 1.0).float()
    median = kth_largest(fall, lambda n: n - (n - 1) // 2, where=two_readings, sharding=records.sharding)
    if median is None or median <= 0:
        return records.loss
    return records.loss * torch.where(two_readings, (fall / median).clamp(0.0, 1.0), 1.0)


def attainment(records: Records, known: Known) -> Tensor:
    """loss x clip((ln V - loss) / (ln V - median loss), 0, 1)^2.

    The gate is how far the learner has come with an example, from a blind guess among V tokens, measured by how far it
    has come with the median one. What it cannot predict better than by guessing counts nothing however high its loss;
    what it has learned has a small loss. Nothing is known, and the gate is 1 for all, before the median example has
    come any way. A collective: the exact median by radix descent.
    """
    assert known.vocab_size is not None
    guess, read = math.log(known.vocab_size), records.step != NEVER
    median = kth_largest(records.loss, lambda n: n - (n - 1) // 2, where=read, sharding=records.sharding)
    if median is None or median >= guess:
        return records.loss
    return records.loss * ((guess - records.loss) / (guess - median)).clamp(0.0, 1.0).square()


IMPORTANCES: dict[str, Importance] = {
    "loss": loss,
    "functional_gradient": functional_gradient,
    "excess_loss": excess_loss,
    "learnability": learnability,
    "attainment": attainment,
}


def importance(records: Records, *, name: str, known: Known | None = None) -> Tensor:
    """Score this rank's candidates: fp32 [num_local], +inf and -inf as above. A collective, on all ranks.

    Args:
        records: of the candidates.
        name: a key of ``IMPORTANCES``.
        known: what it reads beside them.
    """
    scored = IMPORTANCES[name](records, known or Known())
    unscored: dict[str, Any] = {"dtype": torch.float32, "device": scored.device}
    never = torch.tensor(float("inf"), **unscored)
    broken = torch.tensor(float("-inf"), **unscored)
    return torch.where(records.step != NEVER, scored, torch.where(records.visits == 0, never, broken))


def kth_largest(values: Tensor, k: Callable[[int], int], *, where: Tensor, sharding: ExampleSharding) -> float | None:
    """The exact k-th largest of all ranks' values that count; None when none does. A collective.

    Args:
        values: fp32 [num_local], finite where ``where`` is set.
        k: from the number of values that count to the place from the top, 1 to that number.
        where: bool [num_local], the values that count.
    """
    count = int(sharding.sum(where.sum()))
    if count == 0:
        return None
    keys = torch.where(where, ordered_keys(torch.where(where, values, 0.0)), 0)  # 0: below every finite value's key
    return score_of_key(kth_largest_key(keys, k=k(count), sharding=sharding)[0])


def clip_outliers(scores: Tensor, *, sharding: ExampleSharding) -> Tensor:
    """Clip 1% of the finite scores of all ranks at each end, so that one outlier does not set the scale.

    Fewer than 100 scores stay as they are, and infinities keep their meaning. A collective.
    """
    finite = torch.isfinite(scores)
    high = kth_largest(scores, lambda n: 1 + n // 100, where=finite, sharding=sharding)
    low = kth_largest(scores, lambda n: n - n // 100, where=finite, sharding=sharding)
    if high is None or low is None:
        return scores
    return torch.where(finite, scores.clamp(low, high), scores)


def above_lowest(scores: Tensor, *, sharding: ExampleSharding) -> Tensor:
    """The scores counted from the lowest finite one of all ranks, where that is negative. A collective.

    An excess loss below 0 says that the learner has overtaken the reference there, not that the example counts for
    nothing: where most are, what is left above 0 is no measure of how many examples would rule a selection.
    """
    finite = torch.isfinite(scores)
    depth = torch.where(finite, -scores, 0.0).clamp(min=0.0)
    deepest = depth.max() if depth.numel() else depth.new_zeros(())
    return torch.where(finite, scores + sharding.max(deepest), scores)


def fixed_point_sums(values: Tensor, where: Tensor, *, sharding: ExampleSharding) -> tuple[float, float, int]:
    """Sum, sum of squares and number of the values that count, equal for every number of ranks. A collective.

    Sums of floats depend on their order, hence on the number of ranks; these are of integers, the values in 2^-15 of
    the largest absolute one. Exact enough for a mean or a share, and free of overflow below 10^9 values.

    Args:
        values: fp32 [num_local], finite.
        where: bool [num_local].
    """
    values = torch.where(where, values, 0.0).double()
    largest = values.abs().max() if values.numel() else values.new_zeros(())
    scale = float(sharding.max(largest.clone())) / (1 << 15)
    if scale == 0.0:
        return 0.0, 0.0, int(sharding.sum(where.sum()))
    units = (values / scale).round().long()
    totals = sharding.sum(torch.stack((units.sum(), units.square().sum(), where.sum()))).tolist()
    return totals[0] * scale, totals[1] * scale * scale, totals[2]


def effective_share(scores: Tensor, *, sharding: ExampleSharding) -> float:
    """(sum s)^2 / (N sum s^2) over the N finite scores, negative ones as 0: the effective sample size as a share of N.

    1 when all are equal (and when none is known), m / N when m are equal and the others 0. A collective.
    """
    finite = torch.isfinite(scores)
    total, squares, count = fixed_point_sums(scores.clamp(min=0.0).nan_to_num(posinf=0.0), finite, sharding=sharding)
    return total * total / (count * squares) if squares > 0 else 1.0
