"""Importance: how much an example has left to teach, from the loss buffer. Elementwise, except for one median.

AtteNT (Nonparametric Teaching of Attention Learners, ICLR 2026, arXiv 2602.20461, section 4) selects the examples with
the largest functional gradient; for a convex loss its norm grows with the deviation from the target.

To add an importance, write one function here with the decorator and a docstring. Its first paragraph goes into
docs/reference/reference.md, and its name becomes a value of ``[teacher] importance``. Its test, against numpy over all
examples, belongs in tests/distributed/systems/teaching/test_importance.py.

Every score is fp32 [num_local]. +inf: never trained, selected first. -inf: trained, but its loss was never finite;
selected last, so that a broken example is not selected again and again.
"""

import math
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
    score_of_key,
)


@dataclass(frozen=True)
class Evidence:
    """Data that an importance may read in addition to the records of the candidates.

    Attributes:
        expert: fp32 [num_local], an expert's losses of this rank's candidates, for excess_loss and
            cross_entropy_difference.
        amateur: fp32 [num_local], an amateur's losses of them, for cross_entropy_difference.
        chance_loss: the loss of a uniform guess, for attainment: ln V nats per token with V tokens, ln C per image with
            C classes.
    """

    expert: Tensor | None = None
    amateur: Tensor | None = None
    chance_loss: float | None = None


Importance = Callable[[Records, Evidence], Tensor]
"""(records, evidence) -> fp32 [num_local], a new tensor. Its values for examples without a loss are overwritten."""

IMPORTANCES: dict[str, Importance] = {}
"""The importances, by their name in ``[teacher] importance``."""

_READS: dict[str, frozenset[str]] = {}


def _importance(*reads: str) -> Callable[[Importance], Importance]:
    """Register a function as the importance of its name.

    Args:
        reads: the inputs that it needs. "loss": the learner's last loss, or an amateur's while there is none.
            "history": two losses of the learner. "gradient": the functional gradients of ``Records``. "expert",
            "amateur" or "chance_loss": the fields of :class:`Evidence`.
    """

    def add(function: Importance) -> Importance:
        IMPORTANCES[function.__name__], _READS[function.__name__] = function, frozenset(reads)
        return function

    return add


def reads(name: str) -> frozenset[str]:
    """The inputs that the importance ``name`` needs; see :func:`_importance`."""
    return _READS[name]


@_importance("loss")
def loss(records: Records, evidence: Evidence) -> Tensor:
    """The last loss, mean nats per token. It is the deviation from the target, as long as labels are free of noise;
    noise never falls.
    """
    return records.loss.clone()


@_importance("gradient")
def functional_gradient(records: Records, evidence: Evidence) -> Tensor:
    """sqrt(mean over tokens of ||softmax(z) - onehot(y)||^2): AtteNT's own measure, at most sqrt(2).

    It is recorded with the last loss, in the same pass over the logits (losses/cross_entropy.py).
    """
    assert records.gradient is not None
    return records.gradient.clone()


@_importance("loss", "expert")
def excess_loss(records: Records, evidence: Evidence) -> Tensor:
    """loss - an expert's loss, in nats per token: what is left to learn, without the part that no model can predict.

    An estimate of KL(f* || f), as long as the learner has not overtaken the expert; negative where it has.
    """
    assert evidence.expert is not None
    return records.loss - evidence.expert


@_importance("amateur", "expert")
def cross_entropy_difference(records: Records, evidence: Evidence) -> Tensor:
    """amateur's loss - expert's loss, in nats per token: how much more an example looks like trusted text than like the
    data.

    The cross-entropy difference of Moore and Lewis (ACL 2010). Both models are small: the amateur was trained on a
    sample of the data, the expert on trusted text. It reads nothing of the learner, so it holds from the first step on
    and never changes. CoLoR-Filter (NeurIPS 2024) selects pretraining data by the same difference.
    """
    assert evidence.amateur is not None and evidence.expert is not None
    return evidence.amateur - evidence.expert


@_importance("history")
def learnability(records: Records, evidence: Evidence) -> Tensor:
    """loss x how fast it falls, compared with the median: noise never falls, and copies have already fallen. Needs no
    scores on disk.

    loss x clip(d / median d, 0, 1), with d = (first loss - loss) / (log step - log first step): the fall of the loss
    per log-step. The factor is 1 for an example with one loss only. It is 1 for all examples while the median does not
    fall: nothing can be compared then. A collective: the exact median by radix descent.
    """
    fall = torch.empty_like(records.loss)
    for block in blocks(len(fall), device=fall.device):
        last, first = records.step[block], records.first_step[block]
        span = last.clamp(min=1).double().log_().sub_(first.clamp(min=1).double().log_())
        span.masked_fill_(span <= 0, 1.0)
        slope = (records.first_loss[block] - records.loss[block]).div_(span.float())
        fall[block] = slope.masked_fill_((first == NEVER) | (last <= first), float("inf"))  # one loss only
    median = finite_median(lambda block: fall[block], sharding=records.sharding, device=fall.device)
    if median is None or median <= 0:
        return fall.copy_(records.loss)
    for block in blocks(len(fall), device=fall.device):
        fall[block].div_(median).clamp_(0.0, 1.0).mul_(records.loss[block])
    return fall


@_importance("loss", "chance_loss")
def attainment(records: Records, evidence: Evidence) -> Tensor:
    """loss x (how far it has come from a uniform guess, compared with the median)^2. Needs no expert, and one loss per
    example.

    loss x clip((guess - loss) / (guess - median loss), 0, 1)^2. The factor is the progress of the learner on an example
    from a uniform guess, relative to its progress on the median example. A uniform guess costs ln V nats among V
    tokens, ln C among C classes, and 1 for a patch of variance 1.

    An example that the learner predicts no better than by guessing counts 0, however high its loss. An example that it
    has learned has a small loss. While the median example has made no progress, the factor is 1 for all. A collective:
    the exact median by radix descent.
    """
    assert evidence.chance_loss is not None
    guess, losses = evidence.chance_loss, records.loss
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


def importance(records: Records, *, name: str, evidence: Evidence | None = None) -> Tensor:
    """Score this rank's candidates: fp32 [num_local], +inf and -inf as above. A collective, on all ranks.

    Args:
        records: the records of the candidates.
        name: a key of ``IMPORTANCES``.
        evidence: other data that it reads.
    """
    scores = IMPORTANCES[name](records, evidence or Evidence())
    if "amateur" in _READS[name]:
        return scores  # whether the learner has seen an example does not matter
    for block in blocks(len(scores), device=scores.device):
        has_no_loss = records.step[block] < 0
        scores[block].masked_fill_(has_no_loss & (records.visits[block] == 0), math.inf)  # not trained yet: first
        scores[block].masked_fill_(has_no_loss & (records.visits[block] > 0), -math.inf)  # never finite: last
    return scores


def finite_median(values: BlockValues, *, sharding: ExampleSharding, device: torch.device) -> float | None:
    """The exact median of all ranks' finite values, the lower of two; None if no value is finite. A collective.

    Args:
        values: fp32, without NaN.
    """

    def ks_of(num_above: int, num_below: int) -> list[int]:
        n = sharding.num_examples - num_above - num_below
        return [num_above + n - (n - 1) // 2] if n else []

    median = largest_keys(lambda block: ordered_keys(values(block)), ks_of, sharding=sharding, device=device)
    return score_of_key(median[0].key) if median else None
