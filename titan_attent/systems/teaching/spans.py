"""Masks the labels of bad spans of a window, by two bigram tables; and finds the cut below which a span is bad. Pure.

    tokens -> amateur's - expert's loss of each label -> its mean over the span -> mean < cut: the loss is masked

A span is the labels of one document in the window. The first label of a document is its first token, whose input is the
eos id of the document before. In data without an eos id inside their windows, a span is ``BLOCK`` labels.

Differences are rounded to 2^-20 nats and added as integers. So a mean depends on the tokens of its span alone, and not
on the batch in which they are read.

Cost: per label, that of two bigram losses (scores/bigram.py), and 40 bytes of memory while a batch is marked. No
forward pass.

Source: Rho-1 (https://arxiv.org/abs/2404.07965), which selects tokens by the excess loss of the learner itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.scores.bigram import BigramModel
from titan_attent.systems.teaching import schedule

BLOCK = 64
"""Labels of a span in data without documents."""
UNITS_PER_NAT = 2**20
"""Differences are whole numbers of 2^-20 nats."""
MAX_CUTS = 2**16
"""Number of trusted labels, at equal distances in the order of their means, whose means are tried as the cut."""


def has_boundaries(inputs: Tensor, *, eos_id: int) -> bool:
    """int64 [B, L] -> whether a document begins inside a window, behind its first label."""
    return bool((inputs[:, 1:] == eos_id).any())


class SpanMasker:
    """Judges the spans of windows. Callable from any thread.

    Args:
        amateur, expert: the two tables.
        eos_id: the id that ends every document; None for spans of ``BLOCK`` labels.
        cut: in nats; labels of spans whose mean difference is lower are masked. None masks nothing.
    """

    def __init__(self, amateur: BigramModel, expert: BigramModel, *, eos_id: int | None, cut: float | None = None):
        self.amateur, self.expert, self.eos_id, self.cut = amateur, expert, eos_id, cut

    def differences(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] each -> int64 [B, L], amateur's - expert's loss of each label in 2^-20 nats; 0 if ignored."""
        nats = self.amateur.token_losses(inputs, labels) - self.expert.token_losses(inputs, labels)
        return nats.mul_(UNITS_PER_NAT).round_().long()

    def means(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] each -> fp64 [B, L], the mean difference of each label's span in nats; NaN if ignored."""
        return self._means(self.differences(inputs, labels), inputs, labels)

    def _means(self, differences: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        valid = labels != IGNORE_INDEX
        if self.eos_id is None:
            span = (torch.arange(inputs.shape[1]) // BLOCK).expand_as(inputs)
        else:
            span = (inputs[:, 1:] == self.eos_id).cumsum(dim=1)
            span = torch.nn.functional.pad(span, (1, 0))
        sums, counts = (
            torch.zeros_like(inputs).scatter_add_(1, span, each).gather(1, span) for each in (differences, valid.long())
        )
        return (sums.double() / (counts.double() * UNITS_PER_NAT)).where(valid, torch.nan)

    def mark(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] each -> int64 [B, L]: the labels, ``IGNORE_INDEX`` in spans below the cut.

        A window that would lose all of its labels keeps the one of the highest difference: a batch without a label
        has no mean loss.
        """
        if self.cut is None:
            return labels
        differences = self.differences(inputs, labels)
        marked = labels.where(~(self._means(differences, inputs, labels) < self.cut), IGNORE_INDEX)
        valid, kept = labels != IGNORE_INDEX, marked != IGNORE_INDEX
        empty = (valid.any(dim=1) & ~kept.any(dim=1)).nonzero().flatten()
        lowest = torch.iinfo(torch.int64).min
        best = differences[empty].where(valid[empty], lowest).argmax(dim=1)
        marked[empty, best] = labels[empty, best]
        return marked


class Decision(NamedTuple):
    """The cut of a run.

    Attributes:
        cut: in nats; None if nothing is to be masked.
        requested: the share of the labels that the calibrated schedule keeps; 1 for all.
        likeness: how much these labels are like trusted text: the probability of :class:`schedule.Likeness`.
    """

    cut: float | None
    requested: float
    likeness: float

    @property
    def is_foreign(self) -> bool:
        """Whether nothing is masked because the trusted text is of another kind than the data."""
        return self.cut is None and self.requested < 1


MIN_KEPT = 0.5
"""Smallest share of labels that keep their loss. With 9% of them a run of benchmarks/long_windows ended 2 nats above
uniform; Rho-1 keeps 60 to 70%."""


def decide_cut(data: Tensor, trusted: Tensor, *, min_kept: float = MIN_KEPT) -> Decision:
    """Find the cut by the rule of the calibrated schedule (schedule.py), where every label has its span's mean.

    So a span counts by its number of labels. The cut is lowered until at least ``min_kept`` of the labels are kept.

    Args:
        data: fp64 [n], the means of labels of the data, none of them NaN.
        trusted: fp64 [m], those of trusted held-out text.
        min_kept: in [0, 1].
    """
    data, trusted = data.sort().values, trusted.sort().values
    num_cuts = min(MAX_CUTS, len(trusted))
    trusted = trusted[torch.arange(num_cuts) * len(trusted) // num_cuts]
    below: Sequence[int] = torch.searchsorted(data, trusted).tolist()
    requested = schedule.calibrated_ratio(below, num_examples=len(data))
    # All labels of a span have one value.
    likeness = schedule.likeness(below, num_examples=len(data), cluster_size=num_cuts / len(trusted.unique()))
    index = schedule.calibrated_cut(below, num_examples=len(data))
    if index is None or not schedule.holds_trusted_kind(requested=requested, likeness=likeness, min_ratio=1.0):
        return Decision(None, requested, likeness.probability)
    highest = data[min(int((1.0 - min_kept) * len(data)), len(data) - 1)]
    return Decision(min(float(trusted[index]), float(highest)), requested, likeness.probability)
