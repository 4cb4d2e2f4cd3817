"""Documents as the unit that is trained: the :class:`~titan_attent.data.examples.Examples` of spans of documents.

    ids [B]       one example per row, then padding                    validation, scoring (data/plan/forward_rows.py)
    ids [B, M]    up to M examples per row, one after the other        training: packed windows (data/plan/packed.py)

The pairs of an input token and its label are numbered over the data set, example after example. Files with a record per
pair are addressed by these numbers (:meth:`DocumentDataset.pair_places`).

A row has exactly ``seq_len`` inputs and labels, or fewer where the caller asks for shorter rows. Labels of padding are
``IGNORE_INDEX``, and with a mask of the data set those whose loss does not count. ``example_index`` says which example
of its row each token belongs to; padding counts to the last one.

Cost: per example one positioned read of 2 or 4 bytes per token, and one of a bit per token where there is a mask; per
run of 256 documents one read of 1 KB (spans.py).
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titan_attent.data.examples import ScoredData, spans_of_sources
from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.spans import (
    Spans,
    SpanTable,
    count_all_examples,
    count_examples,
    length_counts,
    length_sample,
)
from titan_attent.losses.cross_entropy import IGNORE_INDEX

_AT_ONCE = 4096
"""Ids of a sample that are located at once: their runs of documents take about 40 MB."""
DOCUMENT = "document"
"""The value of ``[data] unit`` with which these are the examples of a run."""


class DocumentShards:
    """The shards of a data set, under the fingerprint of its documents: the ``Stored`` of :class:`DocumentDataset`."""

    def __init__(self, shards: TokenShards):
        self.shards, self.fingerprint = shards, shards.documents_fingerprint
        self.path = shards.path

    @property
    def num_shards(self) -> int:
        return self.shards.num_shards

    def check_sizes(self, shards: Any = None) -> None:
        self.shards.check_sizes(shards)

    def verify_checksums(self, shards: Any = None, *, progress: bool = False) -> None:
        self.shards.verify_checksums(shards, progress=progress)


class PairPlaces(NamedTuple):
    """Spans of neighbouring (input, label) pairs in the rows of a batch, int64 [n] each.

    Attributes:
        rows: the row of each span.
        columns: its first column.
        firsts: the number of its first pair among all pairs of the data set, example after example.
        lengths: its number of pairs.
    """

    rows: np.ndarray
    columns: np.ndarray
    firsts: np.ndarray
    lengths: np.ndarray

    def slots(self, width: int) -> np.ndarray:
        """int64 [sum of lengths], where all pairs are in a flattened batch of rows of ``width``, span after span."""
        return self._spread(self.rows * width + self.columns)

    def numbers(self) -> np.ndarray:
        """int64 [sum of lengths], the numbers of all pairs, span after span."""
        return self._spread(self.firsts)

    def _spread(self, starts: np.ndarray) -> np.ndarray:
        before = np.cumsum(self.lengths) - self.lengths
        return np.repeat(starts - before, self.lengths) + np.arange(self.lengths.sum())


class DocumentDataset(Dataset):
    """Example id -> a span of one document. Picklable.

    Args:
        path_or_shards: the folder of a data set of version 3, or its open shards.
        seq_len: tokens of a row, and the most that an example has.

    Raises:
        ValueError: as :class:`TokenShards`; the data set does not know its documents, or none has two tokens.
    """

    columns: tuple[str, ...] = ("example_index",)

    def __init__(self, path_or_shards: str | os.PathLike[str] | TokenShards, *, seq_len: int):
        if not isinstance(path_or_shards, TokenShards):
            path_or_shards = TokenShards(path_or_shards)
        self.shards, self.seq_len = path_or_shards, seq_len
        self.stored = DocumentShards(path_or_shards)
        if seq_len < 1:
            raise ValueError(f"{self.shards.path}: seq_len is {seq_len}; set it to 1 or more")
        self.num_examples = count_all_examples(self.shards, seq_len=seq_len)
        if self.num_examples == 0:
            raise ValueError(f"{self.shards.path}: no document has a token beside its eos; write more data")
        lengths, counts = self.shards.length_histogram()
        self.num_pairs = int(((lengths - 1) * counts).sum())
        self._table: SpanTable | None = None

    # -- where the examples are -----------------------------------------------------------------------------------

    def share_table(self, add_up: Callable[[Tensor], Tensor], *, rank: int, num_ranks: int) -> None:
        """Make the table of spans, each rank its part of the shards. A collective.

        Args:
            add_up: an all-reduce SUM of int64 [runs] over ``num_ranks`` ranks.
        """
        numbers = range(rank, self.shards.num_shards, num_ranks)
        counts = torch.from_numpy(count_examples(self.shards, seq_len=self.seq_len, numbers=numbers))
        self._set_table(add_up(counts).numpy())

    @property
    def table(self) -> SpanTable:
        """The table of spans, made by this process alone if :meth:`share_table` was not called."""
        if self._table is None:
            everything = range(self.shards.num_shards)
            self._set_table(count_examples(self.shards, seq_len=self.seq_len, numbers=everything))
        assert self._table is not None
        return self._table

    def _set_table(self, counts: np.ndarray) -> None:
        table = SpanTable(self.shards, seq_len=self.seq_len, counts=counts)
        if table.num_examples != self.num_examples:
            raise ValueError(
                f"{self.shards.path}: its documents make {table.num_examples} examples of seq_len {self.seq_len}, "
                f"and its histogram of lengths says {self.num_examples}: a file was replaced. Copy the data set again"
            )
        self._table = table

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n], ids -> int64 [n], tokens that an example takes in a window."""
        return self.table.lengths(ids)

    def length_sample(self, size: int) -> np.ndarray:
        """int64 [size], lengths of examples at equal distances in the order of all lengths."""
        return length_sample(self.shards, seq_len=self.seq_len, size=size)

    def length_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(lengths of examples, number of examples of each), int64 [n] each."""
        return length_counts(self.shards, seq_len=self.seq_len)

    def row_lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """As :meth:`lengths`; of ids that need not be neighbours, and without keeping their documents in memory."""
        parts = [self.table.locate(ids[i : i + _AT_ONCE]).lengths for i in range(0, len(ids), _AT_ONCE)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def documents_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n], ids -> int64 [n], the number of each example's document in the data set."""
        return self.table.locate(ids).documents

    def first_example_of(self, document: int) -> int:
        """The first example of the documents from number ``document`` on; N if there is none."""
        return bisect_left(range(self.num_examples), document, key=lambda i: int(self.documents_of(np.array([i]))[0]))

    # -- the protocol ---------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Windows that all examples fill, at least; packing leaves about a hundredth empty."""
        return -(-self.num_pairs // self.seq_len)

    @property
    def scored(self) -> ScoredData:
        """Scores are of whole documents: they serve every ``seq_len``."""
        return ScoredData(self.stored.fingerprint, 0, self.shards.index.num_documents)

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a row, which is what a step trains."""
        return self.seq_len

    @property
    def chance_loss(self) -> float:
        """ln V."""
        return math.log(self.shards.tokenizer_info["vocab_size"])

    @property
    def sources(self) -> list[tuple[str, int]]:
        """The spans of examples of one data source: its name and its first example id, ascending from 0."""
        firsts = [
            (shard.source, self.table.first_example_of_shard(number))
            for number, shard in enumerate(self.shards.index.shards)
        ]
        return spans_of_sources(firsts, num_examples=self.num_examples)

    def __len__(self) -> int:
        return self.num_examples

    def location(self, i: int) -> dict[str, Any]:
        """Where example i is: its shard file, its first token in it, its number of tokens, and its document."""
        (shard,), (start,), (length,), (document,) = (column.tolist() for column in self.table.locate(np.array([i])))
        file, first = self.shards.location(shard, start)
        return {"shard": file, "first_token": first, "num_tokens": length + 1, "document": document}

    def read(
        self,
        ids: Tensor,
        visit_key: tuple[int, ...] | None = None,
        *,
        skipped: Tensor | None = None,
        row_length: int | None = None,
    ) -> ReadBatch:
        """Rows of examples; an id of N or above is no example.

        Args:
            ids: int64 [B], one example per row, or [B, M], the examples of each row in their order.
            visit_key: not read: text looks the same at every visit.
            skipped: int64 [B], tokens of each row's first example that are left out. The last example of a row is then
                cut where the row is full. None: every example is whole.
            row_length: L; ``seq_len`` by default.

        Returns:
            ({"input": int64 [B, L]}, labels int64 [B, L]), with ids [B, M] also "example_index", int64 [B, L].

        Raises:
            IndexError: an id is negative, or the examples of a row are longer than the row.
        """
        row_length = self.seq_len if row_length is None else row_length
        row_of, number, spans = self._spans_of_rows(ids, skipped)
        firsts = _first_tokens(row_of, spans)
        stops = firsts + spans.lengths
        if len(firsts) and stops.max() > row_length:
            raise IndexError(f"{self.shards.path}: the examples of a row are longer than {row_length} tokens")
        # A row and the last label. The next example overwrites the last label of the one before.
        width = row_length + 1
        tokens = np.empty((len(ids), width), dtype=self.shards.dtype)
        last = self.shards.read_spans(spans.shards, spans.starts, spans.lengths + 1, tokens, row_of * width + firsts)
        inputs, labels = np.empty((2, len(ids), row_length), dtype=np.int64)
        inputs[:], labels[:] = tokens[:, :-1], tokens[:, 1:]
        labels[row_of, stops - 1] = last
        if self.shards.has_mask:
            self._mask(labels, row_of, firsts, spans)
        ends = np.zeros(len(ids), dtype=np.int64)
        ends[row_of] = stops  # of a row's examples, the last assignment stays
        eos_id = self.shards.tokenizer_info["eos_id"]
        for row, end in enumerate(ends.tolist()):
            inputs[row, end:], labels[row, end:] = eos_id, IGNORE_INDEX
        batch = {"input": torch.from_numpy(inputs)}
        if ids.ndim == 2:
            batch["example_index"] = torch.from_numpy(_example_index(row_of, number, spans.lengths, ends, row_length))
        return batch, torch.from_numpy(labels)

    def pair_places(self, ids: Tensor, *, skipped: Tensor | None = None) -> PairPlaces:
        """Where the pairs of rows of examples are, in their rows and among all pairs; a span per example.

        A document of n tokens has n - 1 pairs, so a pair's number is that of its input token in the token stream less
        the documents before it. It does not depend on ``seq_len``. No file of tokens is read.

        Args:
            ids, skipped: as in :meth:`read`, and the same errors.
        """
        rows, _, spans = self._spans_of_rows(ids, skipped)
        return PairPlaces(rows, _first_tokens(rows, spans), self.table.first_pairs(spans), spans.lengths)

    def _spans_of_rows(self, ids: Tensor, skipped: Tensor | None) -> tuple[np.ndarray, np.ndarray, Spans]:
        """The row of each example, its number in the row, int64 [n] each, and where it is."""
        rows = ids.view(len(ids), -1).numpy()
        if rows.size and rows.min() < 0:
            raise IndexError(f"{self.shards.path}: example id {rows.min()} is negative")
        row_of, number = np.nonzero(rows < self.num_examples)
        spans = self.table.locate(rows[row_of, number])
        if skipped is not None:
            spans = _cut(spans, row_of, skipped.numpy(), seq_len=self.seq_len)
        return row_of, number, spans

    def _mask(self, labels: np.ndarray, row_of: np.ndarray, firsts: np.ndarray, spans: Spans) -> None:
        """Set the labels that do not count to ``IGNORE_INDEX``."""
        for row, first, shard, start, length in zip(
            *(column.tolist() for column in (row_of, firsts, *spans[:3])), strict=True
        ):
            counts = self.shards.read_mask(shard, start + 1, start + length + 1)
            labels[row, first : first + length][~counts] = IGNORE_INDEX


MAX_SCORED_TOKENS = 2**16
"""Tokens of a document that a scorer reads; of a longer one, its first."""


class WholeDocuments(Dataset):
    """Document number -> its tokens, of any length: what scores of documents are of.

    Args:
        path_or_shards: the folder of a data set of version 3, or its open shards.
    """

    columns: tuple[str, ...] = ()
    seq_len = 0

    def __init__(self, path_or_shards: str | os.PathLike[str] | TokenShards):
        if not isinstance(path_or_shards, TokenShards):
            path_or_shards = TokenShards(path_or_shards)
        self.shards, self.stored = path_or_shards, DocumentShards(path_or_shards)
        counts = [self.shards.num_documents_of(shard) for shard in range(self.shards.num_shards)]
        self._firsts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self.num_examples = int(self._firsts[-1])

    @property
    def tokens_per_example(self) -> int:
        """The mean number of tokens of a document, rounded up."""
        return -(-self.shards.num_tokens // self.num_examples)

    @property
    def scored(self) -> ScoredData:
        return ScoredData(self.stored.fingerprint, 0, self.num_examples)

    def __len__(self) -> int:
        return self.num_examples

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        """Documents as rows of the longest one's length.

        Returns:
            ({"input": int64 [B, L]}, labels int64 [B, L]); labels are ``IGNORE_INDEX`` behind a document's end, and
            where the data set's mask says so. A document that is its eos alone has no label.
        """
        rows = [self._document(i) for i in ids.tolist()]
        width = max([1, *(len(tokens) - 1 for tokens, _ in rows)])
        inputs = np.full((len(rows), width), self.shards.tokenizer_info["eos_id"], dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
        for row, (tokens, counts) in enumerate(rows):
            length = len(tokens) - 1
            inputs[row, :length] = tokens[:-1]
            labels[row, :length] = np.where(counts[1:], tokens[1:], IGNORE_INDEX)
        return {"input": torch.from_numpy(inputs)}, torch.from_numpy(labels)

    def _document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether the loss of each counts) of a document, at most ``MAX_SCORED_TOKENS``."""
        if not 0 <= number < self.num_examples:
            raise IndexError(f"{self.shards.path}: document {number} is outside [0, {self.num_examples})")
        shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
        place = number - int(self._firsts[shard])
        ends = self.shards.document_ends(shard, max(place - 1, 0), place + 1)
        start = int(ends[0]) if place else 0
        stop = min(int(ends[-1]), start + MAX_SCORED_TOKENS)
        return self.shards.read_span(shard, start, stop), self.shards.read_mask(shard, start, stop)


def _cut(spans: Spans, rows: np.ndarray, skipped: np.ndarray, *, seq_len: int) -> Spans:
    """The spans without the first ``skipped`` tokens of each row, and without what is behind its end."""
    is_first = np.concatenate(([True], rows[1:] != rows[:-1]))[: len(rows)]
    left_out = np.where(is_first, skipped[rows], 0)
    spans = spans._replace(starts=spans.starts + left_out, lengths=spans.lengths - left_out)
    room = seq_len - _first_tokens(rows, spans)
    if len(rows) and min(int(spans.lengths.min()), int(room.min())) < 1:
        raise IndexError("a row leaves out all tokens of an example, or has examples behind its end")
    return spans._replace(lengths=np.minimum(spans.lengths, room))


def _first_tokens(rows: np.ndarray, spans: Spans) -> np.ndarray:
    """int64 [n], where each example begins in its row: behind those of the row that come before it."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    before = np.cumsum(spans.lengths) - spans.lengths
    is_first = np.concatenate(([True], rows[1:] != rows[:-1]))
    return before - np.repeat(before[is_first], np.diff(np.append(np.flatnonzero(is_first), len(rows))))


def _example_index(
    rows: np.ndarray, numbers: np.ndarray, lengths: np.ndarray, ends: np.ndarray, seq_len: int
) -> np.ndarray:
    """int64 [B, L], the number within its row of each token's example; padding has that of the last one, or 0."""
    counts = np.append(lengths, seq_len - ends)
    values = np.append(numbers, np.zeros(len(ends), dtype=np.int64))
    owners = np.append(rows, np.arange(len(ends)))
    values[len(rows) + rows] = numbers  # the padding of a row: the last assignment stays
    order = np.argsort(owners, kind="stable")
    return np.repeat(values[order], counts[order]).reshape(len(ends), seq_len)
