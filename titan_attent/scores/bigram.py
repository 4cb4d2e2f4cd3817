"""A bigram model: the smallest scorer. It counts pairs of tokens; it has no trained weights.

    p(w | h) = (c(h, w) + S p(w)) / (c(h) + S)        p(w) = (c(w) + 1/2) / (N + V/2)

c counts the data that the model was built from: N labels w, each with the token h before it. S = ``SMOOTHING`` is a
number of pseudo-occurrences of every h, for pairs that were never seen. If V^2 is more than ``NUM_BUCKETS``, pairs are
hashed, and pairs in one bucket share its count.

The loss of a row that was counted leaves the row itself out: its own occurrences are subtracted from all counts, N too.
Otherwise a model finds the rows that it counted easier than others like them; the fewer it counts, the more so.

Counts are integers, summed over all ranks, and the loss of a row depends only on the row and the counts. So it is the
same for every number of ranks.

Cost: 64 MiB for the pairs and 8 bytes per id; one addition in memory per counted token, three reads and one logarithm
per scored token. A row that is left out is sorted three times besides.

Source: MacKay and Peto 1995 (smoothing by a Dirichlet prior); Moore and Lewis, ACL 2010 (data selection by the
difference of two n-gram models); DSIR, NeurIPS 2023 (hashed n-grams, for pretraining data).
"""

from functools import cached_property

import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import hash_ids
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.cross_entropy import IGNORE_INDEX

NUM_BUCKETS = 2**24
"""Maximum number of pair counts in a model; if there are more possible pairs, they are hashed."""
SMOOTHING = 100.0
MAX_IDS = 2**24
"""Largest vocabulary: the tables of single ids take 24 bytes per id."""


def check_vocabulary(vocab_size: int) -> None:
    """ValueError for a vocabulary whose tables would be too large, before anything is allocated."""
    if not 1 <= vocab_size <= MAX_IDS:
        raise ValueError(
            f"the data's tokenizer declares a vocabulary of {vocab_size} ids, and a bigram model has tables of at most "
            f"{MAX_IDS}: write the data with a smaller tokenizer, or give --flavor scorer_xs"
        )


def num_pairs(vocab_size: int) -> int:
    """Number of counts of pairs that a model holds: one per pair of ids, at most ``NUM_BUCKETS``."""
    return min(vocab_size**2, NUM_BUCKETS)


class BigramModel:
    """Counts of pairs of tokens, on the CPU.

    Args:
        vocab_size: V; ValueError above ``MAX_IDS``.
    """

    def __init__(self, vocab_size: int):
        check_vocabulary(vocab_size)
        self.vocab_size = vocab_size
        self.is_exact = vocab_size**2 <= NUM_BUCKETS
        self.pairs = torch.zeros(num_pairs(vocab_size), dtype=torch.int32)
        self.inputs = torch.zeros(vocab_size, dtype=torch.int32)
        self.labels = torch.zeros(vocab_size, dtype=torch.int32)

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """Count each label after its input; both int64, of the same shape. Ignored labels do not count.

        All calls must come before the first call of :meth:`losses`.
        """
        valid = labels != IGNORE_INDEX
        inputs, labels = inputs[valid], labels[valid]
        one = torch.ones(1, dtype=torch.int32).expand(len(labels))
        self.pairs.scatter_add_(0, self._pair_index(inputs, labels), one)
        self.inputs.scatter_add_(0, inputs, one)
        self.labels.scatter_add_(0, labels, one)

    def share(self, sharding: ExampleSharding) -> None:
        """Sum the counts over the ranks of ``sharding``. A collective, in place."""
        for counts in (self.pairs, self.inputs, self.labels):
            sharding.sum(counts)

    def losses(self, inputs: Tensor, labels: Tensor, *, is_counted: Tensor | None = None) -> Tensor:
        """int64 [B, L] each -> fp32 [B], mean nats per label; NaN for a row with only ignored labels.

        Args:
            is_counted: bool [B], rows that :meth:`add` has counted, which are left out of their own losses.
        """
        nats = self.token_losses(inputs, labels)
        if is_counted is not None and is_counted.any():
            nats[is_counted] = self._left_out_losses(inputs[is_counted], labels[is_counted])
        return (nats.sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1)).float()

    def token_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] each -> fp64 [B, L], nats of each label; 0 for an ignored label."""
        prior, log_seen = self._tables
        valid = labels != IGNORE_INDEX
        labels = labels.where(valid, 0)
        nats = log_seen[inputs] - self.pairs[self._pair_index(inputs, labels)].double().add_(prior[labels]).log_()
        return nats.where(valid, 0.0)

    def _left_out_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The same fp64 [B, L] by the counts without those of the row itself."""
        valid = labels != IGNORE_INDEX
        index = self._pair_index(inputs, labels.where(valid, 0))
        pairs, before, alone = (
            counts[ids].double() - _own_counts(ids, valid)
            for counts, ids in (
                (self.pairs, index),
                (self.inputs, inputs),
                (self.labels, labels.where(valid, 0)),
            )
        )
        others = float(self.labels.sum()) - valid.sum(dim=1, keepdim=True)
        unigram = (alone + 0.5) / (others + 0.5 * self.vocab_size)
        nats = torch.log(before + SMOOTHING) - torch.log(pairs + SMOOTHING * unigram)
        return nats.where(valid, 0.0)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """fp64 [V] each: S p(w) and ln(c(h) + S), from the counts at the first call."""
        unigram = (self.labels.double() + 0.5) / (float(self.labels.sum()) + 0.5 * self.vocab_size)
        return SMOOTHING * unigram, torch.log(self.inputs.double() + SMOOTHING)

    def _pair_index(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The index of the count of each pair."""
        pairs = inputs * self.vocab_size + labels
        return pairs if self.is_exact else hash_ids(pairs, 0).bitwise_and_(NUM_BUCKETS - 1)


def _own_counts(ids: Tensor, valid: Tensor) -> Tensor:
    """int64 [B, L] ids below 2^24 -> int64 [B, L], how often each occurs among the valid places of its row."""
    rows = torch.arange(len(ids))[:, None] << 24
    _, inverse, counts = torch.unique((rows + ids)[valid], return_inverse=True, return_counts=True)
    return torch.zeros_like(ids).masked_scatter_(valid, counts[inverse])
