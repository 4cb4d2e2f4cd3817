"""Which span of which document each example is, where documents are the unit that is trained.

A document of n tokens, its eos among them, has n - 1 pairs of an input token and the next token, its label. An example
is a span of at most ``seq_len`` of these pairs; a longer document is several examples, one after the other. No example
crosses documents, so the pair (eos, first token of the next document) is in none. A document that is its eos alone has
no pair and no example. Ids number the examples in the order of the documents. They depend on ``seq_len`` alone.

The documents of a shard are cut into runs of 256. The table holds the first example of each run. To find an example,
its run is looked up there, and the ends of the run's documents are one short read.

Cost: making the table reads 4 bytes per document, shared by the ranks (:func:`count_examples`). The table is 8 bytes
per 256 documents on every rank, 312 MB for 10^10 documents. Locating ids is one read of about 1 KB per run, and none
for those of a block that was packed shortly before.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from titan_attent.data.text.document_files import END_DTYPE
from titan_attent.data.text.shards import TokenShards

RUN = 256
"""Documents of a run."""
_AT_ONCE = RUN * 4096
"""Documents whose ends are read at once, 4 MiB."""
_KEPT = 3
"""Calls of :meth:`SpanTable.lengths` whose documents stay in memory: as many as packed blocks (plan/packed.py)."""


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


def length_counts(shards: TokenShards, *, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of examples, number of examples of each), int64 [n] each, in no order; from the histogram alone."""
    lengths, counts = shards.length_histogram()
    whole, rest = np.divmod(lengths - 1, seq_len)
    return np.append(rest, seq_len), np.append(np.where(rest > 0, counts, 0), (whole * counts).sum())


def length_sample(shards: TokenShards, *, seq_len: int, size: int) -> np.ndarray:
    """int64 [size], lengths of examples at equal distances in the order of all lengths; from the histogram alone."""
    values, weights = length_counts(shards, seq_len=seq_len)
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
        self._first_tokens = shards.first_tokens
        self._firsts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=self._firsts[1:])
        self.num_examples = int(self._firsts[-1])
        self._kept: tuple[_Documents, ...] = ()
        self._num_kept = _KEPT

    def keep_blocks_of(self, num_sources: int) -> None:
        """Keep the documents of the packed blocks of several sources, which are read in turn (plan/mixture.py)."""
        self._num_kept = _KEPT * max(1, num_sources)

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        tables = (self._firsts, self._first_run, self._first_document, self._first_tokens)
        return sum(table.nbytes for table in tables)

    def first_example_of_shard(self, shard: int) -> int:
        """The id of the first example whose document is in ``shard`` or a later one."""
        return int(self._firsts[self._first_run[shard]])

    def first_pairs(self, spans: Spans) -> np.ndarray:
        """int64 [n], the number of each span's first pair among all pairs of the data set, example after example."""
        return self._first_tokens[spans.shards] + spans.starts - spans.documents

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n], ids -> int64 [n], the lengths of :meth:`locate`.

        The documents of these runs stay in memory, 16 bytes per document, until ``_KEPT`` more calls per source. So the
        examples of a block, whose lengths are needed to pack it, are located without another read.
        """
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        documents = self._read(ids)
        spans, is_found = documents.locate(ids, seq_len=self.seq_len)
        self._check(is_found)
        # A new tuple: other threads may iterate over the old one.
        self._kept = (*self._kept, documents)[-self._num_kept :]
        return spans.lengths

    def locate(self, ids: np.ndarray) -> Spans:
        """int64 [n], each in [0, num_examples) -> where they are; one short read per run that is not in memory."""
        kept = self._kept
        for documents in reversed(kept):
            spans, is_found = documents.locate(ids, seq_len=self.seq_len)
            if is_found.all():
                return spans
            if is_found.any():
                break
        if not len(ids):
            return Spans(*np.empty((4, 0), dtype=np.int64))
        if not kept or not is_found.any():
            spans, is_found = self._read(ids).locate(ids, seq_len=self.seq_len)
            self._check(is_found)
            return spans
        # Some are in memory, where one block ends and the next begins.
        rest = self.locate(ids[~is_found])
        for column, others in zip(spans, rest, strict=True):
            column[~is_found] = others
        return spans

    def _check(self, is_found: np.ndarray) -> None:
        if not is_found.all():
            raise ValueError(
                f"{self.shards.path}: the ends of its documents are not those of the start of this run: a file was "
                "replaced. Copy the data set again"
            )

    def _read(self, ids: np.ndarray) -> "_Documents":
        """The documents of all runs of ``ids``, int64 [n > 0]. One read per series of neighbouring runs in a shard."""
        runs = np.unique(np.searchsorted(self._firsts, ids, side="right") - 1)
        shards = np.searchsorted(self._first_run, runs, side="right") - 1
        is_first = np.ones(len(runs), dtype=bool)
        is_first[1:] = (np.diff(runs) != 1) | (np.diff(shards) != 0)
        slots = np.flatnonzero(is_first)
        runs, shards, num_runs = runs[slots], shards[slots], np.diff(np.append(slots, len(runs)))
        firsts = (runs - self._first_run[shards]) * RUN
        starts, ends = list[np.ndarray](), list[np.ndarray]()
        for shard, first, num in zip(shards.tolist(), firsts.tolist(), num_runs.tolist(), strict=True):
            stop = min(first + num * RUN, self.shards.num_documents_of(shard))
            bounds = self.shards.document_ends(shard, max(first - 1, 0), stop)
            if first == 0:  # otherwise the first number is the end before the series
                bounds = np.concatenate(([0], bounds))
            starts.append(bounds[:-1])
            ends.append(bounds[1:])
        sizes = np.array([len(one) for one in ends])
        series, start = np.cumsum(sizes) - sizes, np.concatenate(starts)
        lengths = np.concatenate(ends) - start - 1
        counts = -(-lengths // self.seq_len)
        before = np.cumsum(counts) - counts
        return _Documents(
            examples=before + np.repeat(self._firsts[runs] - before[series], sizes),
            starts=start.astype(END_DTYPE),
            lengths=lengths.astype(END_DTYPE),
            series=series,
            shards=shards,
            documents=self._first_document[shards] + firsts - series,
        )


class _Documents(NamedTuple):
    """The documents of some runs, D in all, in S series of neighbouring runs.

    Attributes:
        examples: int64 [D], the first example of each document; rises, but not strictly.
        starts: uint32 [D], the first token, from the start of the shard.
        lengths: uint32 [D], pairs of each document.
        series: int64 [S], the slot of the first document of each series.
        shards: int64 [S], the shard of each series.
        documents: int64 [S], the number in the data set of a document of the series, less its slot.
    """

    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    series: np.ndarray
    shards: np.ndarray
    documents: np.ndarray

    def locate(self, ids: np.ndarray, *, seq_len: int) -> tuple[Spans, np.ndarray]:
        """int64 [n], ids -> where they are, and bool [n], whether they are in these documents; where not, any span."""
        slots = np.maximum(np.searchsorted(self.examples, ids, side="right") - 1, 0)
        offsets, lengths = (ids - self.examples[slots]) * seq_len, self.lengths[slots]
        series = np.searchsorted(self.series, slots, side="right") - 1
        spans = Spans(
            self.shards[series],
            self.starts[slots] + offsets,
            np.minimum(seq_len, lengths - offsets),
            self.documents[series] + slots,
        )
        return spans, (offsets >= 0) & (offsets < lengths)
