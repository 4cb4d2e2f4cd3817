"""Which span of which document each example is, where documents are the unit that is trained.

A document of n tokens, its eos among them, has n - 1 pairs of an input token and the next token, its label. An example
is a span of at most ``seq_len`` of these pairs; a longer document is several examples, one after the other. No example
crosses documents, so the pair (eos, first token of the next document) is in none. A document that is its eos alone has
no pair and no example. Ids number the examples in the order of the documents. They depend on ``seq_len`` alone.

The documents of a shard are cut into runs of 256. The table holds the first example of each run. To find an example,
its run is looked up there, and the ends of the run's documents are one short read.

Cost: making the table reads 4 bytes per document, shared by the ranks (:func:`count_examples`). The table is 8 bytes
per 256 documents on every rank, 312 MB for 10^10 documents. Locating ids is one read of about 1 KB per run.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from titan_attent.data.text.shards import TokenShards

RUN = 256
"""Documents of a run."""
_AT_ONCE = RUN * 4096
"""Documents whose ends are read at once, 4 MiB."""


class Spans(NamedTuple):
    """Where examples are, int64 [n] each.

    Attributes:
        shards: number of the shard.
        starts: first input token, from the start of the shard.
        lengths: number of (input, label) pairs; the tokens are ``starts`` to ``starts + lengths``, both included.
        documents: number of the document in the data set.
    """

    shards: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray


def spans_per_document(num_tokens: np.ndarray, *, seq_len: int) -> np.ndarray:
    """int64 [n], tokens of each document -> int64 [n], its examples."""
    return -(-(num_tokens - 1) // seq_len)


def count_all_examples(shards: TokenShards, *, seq_len: int) -> int:
    """The number of examples of a data set, from its histogram of lengths; no sidecar is read."""
    lengths, counts = shards.length_histogram()
    return int((spans_per_document(lengths, seq_len=seq_len) * counts).sum())


def length_sample(shards: TokenShards, *, seq_len: int, size: int) -> np.ndarray:
    """int64 [size], lengths of examples at equal distances in the order of all lengths; from the histogram alone."""
    lengths, counts = shards.length_histogram()
    whole, rest = np.divmod(lengths - 1, seq_len)
    values = np.append(rest, seq_len)
    weights = np.append(np.where(rest > 0, counts, 0), (whole * counts).sum())
    order = np.argsort(values, kind="stable")
    values, until = values[order], np.cumsum(weights[order])
    ranks = (2 * np.arange(size, dtype=np.int64) + 1) * int(until[-1]) // (2 * size)
    return values[np.searchsorted(until, ranks, side="right")]


def num_runs(shards: TokenShards) -> np.ndarray:
    """int64 [num_shards], the runs of each shard."""
    return np.array([-(-shards.num_documents_of(shard) // RUN) for shard in range(shards.num_shards)], dtype=np.int64)


def count_examples(shards: TokenShards, *, seq_len: int, numbers: Iterable[int]) -> np.ndarray:
    """int64 [runs of all shards], the examples of each run of the shards ``numbers``; 0 elsewhere.

    Ranks share the work with ``range(rank, num_shards, num_ranks)``, and add the results up.
    """
    runs = num_runs(shards)
    firsts = np.concatenate(([0], np.cumsum(runs)))
    counts = np.zeros(firsts[-1], dtype=np.int64)
    for shard in numbers:
        end = 0
        num_documents = shards.num_documents_of(shard)
        for first in range(0, num_documents, _AT_ONCE):
            ends = shards.document_ends(shard, first, min(first + _AT_ONCE, num_documents))
            examples = spans_per_document(np.diff(ends, prepend=end), seq_len=seq_len)
            end = int(ends[-1])
            per_run = np.add.reduceat(examples, np.arange(0, len(examples), RUN))
            start = firsts[shard] + first // RUN
            counts[start : start + len(per_run)] = per_run
    return counts


class SpanTable:
    """Finds examples by their ids.

    Args:
        shards: with documents.
        seq_len: pairs of an example, at most.
        counts: int64 [runs of all shards], the examples of each run (:func:`count_examples` of all shards).
    """

    def __init__(self, shards: TokenShards, *, seq_len: int, counts: np.ndarray):
        self.shards, self.seq_len = shards, seq_len
        self._first_run = np.concatenate(([0], np.cumsum(num_runs(shards))))
        self._first_document = np.concatenate(
            ([0], np.cumsum([shards.num_documents_of(shard) for shard in range(shards.num_shards)]))
        ).astype(np.int64)
        self._firsts = np.concatenate(([0], np.cumsum(counts)))
        self.num_examples = int(self._firsts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return self._firsts.nbytes + self._first_run.nbytes + self._first_document.nbytes

    def first_example_of_shard(self, shard: int) -> int:
        """The id of the first example whose document is in ``shard`` or a later one."""
        return int(self._firsts[self._first_run[shard]])

    def locate(self, ids: np.ndarray) -> Spans:
        """int64 [n], each in [0, num_examples) -> where they are; one short read per run."""
        runs, inverse = np.unique(np.searchsorted(self._firsts, ids, side="right") - 1, return_inverse=True)
        columns = np.empty((4, len(ids)), dtype=np.int64)
        order = np.argsort(inverse, kind="stable")
        bounds = np.searchsorted(inverse[order], np.arange(len(runs) + 1))
        for number, run in enumerate(runs.tolist()):
            members = order[bounds[number] : bounds[number + 1]]
            columns[:, members] = self._in_run(run, ids[members])
        return Spans(*columns)

    def _in_run(self, run: int, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        shard = int(np.searchsorted(self._first_run, run, side="right")) - 1
        first = (run - int(self._first_run[shard])) * RUN
        stop = min(first + RUN, self.shards.num_documents_of(shard))
        ends = self.shards.document_ends(shard, max(first - 1, 0), stop)  # with the end before the run's first document
        starts = ends[:-1] if first else np.concatenate(([0], ends[:-1]))
        ends = ends[1:] if first else ends
        num_pairs = ends - starts - 1
        examples = np.concatenate(([0], np.cumsum(-(-num_pairs // self.seq_len))))
        offsets = ids - self._firsts[run]
        documents = np.searchsorted(examples, offsets, side="right") - 1
        skipped = (offsets - examples[documents]) * self.seq_len
        return (
            np.full(len(ids), shard),
            starts[documents] + skipped,
            np.minimum(self.seq_len, num_pairs[documents] - skipped),
            self._first_document[shard] + first + documents,
        )
