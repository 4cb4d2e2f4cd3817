"""A bigram model: the smallest scorer. It counts pairs of tokens where others train weights.

    p(w | h) = (c(h, w) + S p(w)) / (c(h) + S)        p(w) = (c(w) + 1/2) / (N + V/2)

c counts what the model was made of: N labels w, each with the token h before it. S = ``SMOOTHING`` imagined occurrences
of every h stand for what was never seen. Where V^2 is more than ``NUM_BUCKETS`` pairs are hashed, and those of one
bucket share its count.

Counts are integers, summed over all ranks, and a row's loss depends on nothing but the row and the counts: the same
for every number of ranks.

Cost: 64 MiB for the pairs and 8 bytes an id; one addition to memory for a token that is counted, three reads and one
logarithm for one that is scored.

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
SMOOTHING = 100.0
MAX_IDS = 2**24
"""Of a vocabulary: the tables of single ids take 24 bytes each."""


def check_vocabulary(vocab_size: int) -> None:
    """ValueError for a vocabulary whose tables nobody wants in memory; what a file declares costs nothing yet."""
    if not 1 <= vocab_size <= MAX_IDS:
        raise ValueError(
            f"the data's tokenizer declares a vocabulary of {vocab_size} ids, and a bigram model has tables of at most "
            f"{MAX_IDS}: write the data with a smaller tokenizer, or give --flavor scorer_xs"
        )


class BigramModel:
    """Counts of pairs, on the CPU.

    Args:
        vocab_size: V; ValueError above ``MAX_IDS``.
    """

    def __init__(self, vocab_size: int):
        check_vocabulary(vocab_size)
        self.vocab_size = vocab_size
        self.is_exact = vocab_size**2 <= NUM_BUCKETS
        self.pairs = torch.zeros(vocab_size**2 if self.is_exact else NUM_BUCKETS, dtype=torch.int32)
        self.inputs = torch.zeros(vocab_size, dtype=torch.int32)
        self.labels = torch.zeros(vocab_size, dtype=torch.int32)

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """Count each label after its input; int64, of one shape. Ignored labels do not count.

        All counting comes before the first loss.
        """
        valid = labels != IGNORE_INDEX
        inputs, labels = inputs[valid], labels[valid]
        one = torch.ones(1, dtype=torch.int32).expand(len(labels))
        self.pairs.scatter_add_(0, self._places(inputs, labels), one)
        self.inputs.scatter_add_(0, inputs, one)
        self.labels.scatter_add_(0, labels, one)

    def share(self, sharding: ExampleSharding) -> None:
        """Add up what the ranks of ``sharding`` counted. A collective, in place."""
        for counts in (self.pairs, self.inputs, self.labels):
            sharding.sum(counts)

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] each -> fp32 [B], mean nats a label; NaN for a row of ignored labels alone."""
        prior, log_seen = self._tables
        valid = labels != IGNORE_INDEX
        labels = labels.where(valid, 0)
        nats = log_seen[inputs] - self.pairs[self._places(inputs, labels)].double().add_(prior[labels]).log_()
        return (nats.where(valid, 0.0).sum(dim=1) / valid.sum(dim=1)).float()

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """fp64 [V] each: S p(w) and ln(c(h) + S), of the counts as they are when it is first asked for."""
        alone = (self.labels.double() + 0.5) / (float(self.labels.sum()) + 0.5 * self.vocab_size)
        return SMOOTHING * alone, torch.log(self.inputs.double() + SMOOTHING)

    def _places(self, inputs: Tensor, labels: Tensor) -> Tensor:
        pairs = inputs * self.vocab_size + labels
        return pairs if self.is_exact else hash_ids(pairs, 0).bitwise_and_(NUM_BUCKETS - 1)
