"""Importance: how much an example has left to teach, from the loss buffer. Elementwise, except for one median.

AtteNT (Nonparametric Teaching of Attention Learners, ICLR 2026, arXiv 2602.20461, section 4) teaches the examples whose
functional gradient is largest; for a convex loss its norm grows with the deviation from the target.

A new importance is one function here, with the decorator and a docstring, whose first paragraph goes into
docs/reference/reference.md; its name is then a value of ``[teacher] importance``. Its test, against numpy over all
examples, belongs into tests/distributed/systems/teaching/test_importance.py.

Every score is fp32 [num_local]. +inf: never trained, comes first. -inf: trained, but its loss was never finite, comes
last, so that a broken example is not taught again and again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.records import NEVER, Records
from titan_attent.systems.teaching.radix import (
    BlockValues,
    blocks,
    largest_keys,
    ordered_keys,
    replace_bits,
    score_of_key,
)


@dataclass(frozen=True)
class Evidence:
    """What an importance may read beside the records of the candidates.

    Attributes:
        expert: fp32 [num_local] an expert's losses of this rank's candidates, for excess_loss.
        amateur: fp32 [num_local] an amateur's losses of them, for cross_entropy_difference.
        chance_loss: for attainment, what a blind guess costs: ln V nats per token of V, ln C an image of C classes.
    """

    expert: Tensor | None = None
    amateur: Tensor | None = None
    chance_loss: float | None = None


Importance = Callable[[Records, Evidence], Tensor]
"""-> fp32 [num_local], a tensor of its own; whatever where nothing is known yet."""

IMPORTANCES: dict[str, Importance] = {}
"""By name, as ``[teacher] importance`` has it."""

_READS: dict[str, frozenset[str]] = {}


def _importance(*reads: str) -> Callable[[Importance], Importance]:
    """Make a function an importance of its name.

    Args:
        reads: what it needs: "loss", the learner's last one, which an amateur's can stand for where there is none;
            "history", two readings of it; "gradient", the functional gradients of ``Records``; "expert", "amateur"
            or "chance_loss" of :class:`Evidence`.
    """

    def add(function: Importance) -> Importance:
        IMPORTANCES[function.__name__], _READS[function.__name__] = function, frozenset(reads)
        return function

    return add


def reads(name: str) -> frozenset[str]:
    """What the importance of that name needs, as :func:`_importance` lists it."""
    return _READS[name]


@_importance("loss")
def loss(records: Records, known: Evidence) -> Tensor:
    """The last loss, mean nats per token: the deviation, as long as labels are free of noise, which never falls."""
    return records.loss.clone()


@_importance("gradient")
def functional_gradient(records: Records, known: Evidence) -> Tensor:
    """sqrt(mean over tokens of ||softmax(z) - onehot(y)||^2): AtteNT's own measure, at most sqrt(2).

    It is recorded with the last loss, in the loss's own pass (losses/cross_entropy.py).
    """
    assert records.gradient is not None
    return records.gradient.clone()


@_importance("loss", "expert")
def excess_loss(records: Records, known: Evidence) -> Tensor:
    """loss - an expert's loss, in nats per token: what is left to learn, without the part that nobody can.

    An estimate of KL(f* || f), as long as the learner has not overtaken the expert; negative where it has.
    """
    assert known.expert is not None
    return records.loss - known.expert


@_importance("amateur", "expert")
def cross_entropy_difference(records: Records, known: Evidence) -> Tensor:
    """amateur's loss - expert's loss, in nats per token: how much more a row looks like trusted text than the data.

    The cross-entropy difference of Moore and Lewis (ACL 2010). Both models are small: the amateur has seen a sample of
    the data, the expert trusted text. Nothing of the learner is read, so that it holds from the first step on and never
    changes. CoLoR-Filter (NeurIPS 2024) selects pretraining data by the same difference.
    """
    assert known.amateur is not None and known.expert is not None
    return known.amateur - known.expert


@_importance("history")
def learnability(records: Records, known: Evidence) -> Tensor:
    """loss x how fast it falls, against the median: noise never falls, copies have fallen. Needs no scores.

    loss x clip(d / median d, 0, 1), with d = (first loss - loss) / (log step - log first step). d is the fall of the
    loss per log-step. The gate is 1 where an example has one reading only, and for all when the median does not fall:
    then nothing is known. A collective: the exact median by radix descent.
    """
    fall = torch.empty_like(records.loss)
    for block in blocks(len(fall), device=fall.device):
        last, first = records.step[block], records.first_step[block]
        span = last.clamp(min=1).double().log_().sub_(first.clamp(min=1).double().log_())
        span.masked_fill_(span <= 0, 1.0)
        part = (records.first_loss[block] - records.loss[block]).div_(span.float())
        fall[block] = part.masked_fill_((first == NEVER) | (last <= first), float("inf"))  # one reading
    median = finite_median(lambda block: fall[block], sharding=records.sharding, device=fall.device)
    if median is None or median <= 0:
        return fall.copy_(records.loss)
    for block in blocks(len(fall), device=fall.device):
        fall[block].div_(median).clamp_(0.0, 1.0).mul_(records.loss[block])
    return fall


@_importance("loss", "chance_loss")
def attainment(records: Records, known: Evidence) -> Tensor:
    """loss x (how far it has come from a blind guess, against the median)^2. Needs no expert, and one reading.

    loss x clip((blind - loss) / (blind - median loss), 0, 1)^2. The gate is how far the learner has come with an
    example, from a blind guess (ln V nats among V tokens, ln C among C classes, 1 for a patch of variance 1), measured
    by how far it has come with the median one. What it cannot predict
    better than by guessing counts nothing however high its loss; what it has learned has a small loss. Nothing is
    known, and the gate is 1 for all, before the median example has come any way. A collective: the exact median by
    radix descent.
    """
    assert known.chance_loss is not None
    guess, losses = known.chance_loss, records.loss
    median = finite_median(
        lambda block: losses[block].masked_fill(records.step[block] == NEVER, float("inf")),
        sharding=records.sharding,
        device=losses.device,
    )
    if median is None or median >= guess:
        return losses.clone()
    scores = torch.empty_like(losses)
    for block in blocks(len(losses), device=losses.device):
        gate = (guess - losses[block]).div_(guess - median).clamp_(0.0, 1.0).square_()
        scores[block] = gate.mul_(losses[block])
    return scores


def importance(records: Records, *, name: str, known: Evidence | None = None) -> Tensor:
    """Score this rank's candidates: fp32 [num_local], +inf and -inf as above. A collective, on all ranks.

    Args:
        records: of the candidates.
        name: a key of ``IMPORTANCES``.
        known: what it reads beside them.
    """
    scores = IMPORTANCES[name](records, known or Evidence())
    if "amateur" in _READS[name]:
        return scores  # whether the learner has seen an example does not matter
    for block in blocks(len(scores), device=scores.device):
        # In bits: the sign of the step tells whether nothing is known, that of -visits which infinity it is.
        infinities = (-records.visits[block]).bitwise_and_(-(1 << 31)).bitwise_or_(0x7F800000)
        replace_bits(scores[block].view(torch.int32), infinities, where=records.step[block] >> 31)
    return scores


def finite_median(values: BlockValues, *, sharding: ExampleSharding, device: torch.device) -> float | None:
    """The exact median of all ranks' finite values, the lower of two; None when none is finite. A collective.

    Args:
        values: fp32, without NaN.
    """

    def place(num_above: int, num_below: int) -> list[int]:
        n = sharding.num_examples - num_above - num_below
        return [num_above + n - (n - 1) // 2] if n else []

    found = largest_keys(lambda block: ordered_keys(values(block)), place, sharding=sharding, device=device)
    return score_of_key(found[0].key) if found else None
