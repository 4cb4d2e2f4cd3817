"""The examples of one data source: their ids, and passes over those that are selected, row by row.

    row of the pass --(keyed order of the pass)--> index among the source's selected examples --> example id

A pass over a source is the pass over all data (order.py, packed.py), restricted to the source: the same keyed
permutation, of the source's examples alone. A row is one window, or several packed documents of this source.

Cost: as order.py and packed.py. Per pass and span of the source a look-up in the selection's directory.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.plan.order import Key, SelectedSlots
from titan_attent.data.plan.packed import RUN, Lengths, PackedPass, Packer
from titan_attent.foundations.counter_rng import derive_key, permute, stream

EVERYTHING = 0
"""The digest of a selection of all examples."""
_SAMPLED_RUNS = 64
"""Runs of neighbouring examples whose lengths are the sample of a source."""


class Span(NamedTuple):
    """The example ids [start, stop)."""

    start: int
    stop: int


def spans_by_name(sources: Sequence[tuple[str, int]], *, num_examples: int) -> dict[str, tuple[Span, ...]]:
    """The spans of each source, ascending.

    Args:
        sources: (name, first example id) of each span, as ``Examples.sources``.
        num_examples: N.
    """
    firsts = [first for _, first in sources] + [num_examples]
    spans: dict[str, tuple[Span, ...]] = {}
    for (name, first), stop in zip(sources, firsts[1:], strict=True):
        spans[name] = (*spans.get(name, ()), Span(first, stop))
    return spans


class SourceIds:
    """The selected examples of a source, numbered from 0 in the order of their ids.

    Args:
        spans: the spans of the source, ascending.
        selected: the selected ids of all data.
    """

    def __init__(self, spans: Sequence[Span], selected: SelectedSlots):
        self.selected = selected
        self._before = np.array([selected.num_below(span.start) for span in spans], dtype=np.int64)
        ends = np.array([selected.num_below(span.stop) for span in spans], dtype=np.int64)
        self._firsts = np.concatenate(([0], np.cumsum(ends - self._before))).astype(np.int64)
        self.size = int(self._firsts[-1])

    def ids(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n], each in [0, size) -> example ids, int64 [n]."""
        span = np.searchsorted(self._firsts, indices, side="right") - 1
        return self.selected.select(self._before[span] + indices - self._firsts[span])


def digest_of(spans: Sequence[Span], selected: SelectedSlots) -> int:
    """A 63-bit hash of the selected examples of a source; ``EVERYTHING`` without a bitmask. Reads its bits once."""
    if selected.bitmask is None:
        return EVERYTHING
    digest = hashlib.blake2b(digest_size=8)
    for start, stop in spans:
        content = selected.bitmask[start >> 3 : (stop + 7) >> 3].copy()
        if len(content):
            content[0] &= 0xFF << (start & 7) & 0xFF
            if stop & 7:
                content[-1] &= (1 << (stop & 7)) - 1
        digest.update(content.tobytes())
    return max(1, int.from_bytes(digest.digest(), "little") >> 1)


class SourcePass(Protocol):
    """A pass over the selected examples of a source."""

    num_rows: int

    def tokens_before(self, row: int) -> int:
        """The tokens of the rows before ``row``, 0 to ``num_rows``."""

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """int64 [n] -> example ids, int64 [n] or [n, M]; and how many tokens of each row's first example are left out,
        int64 [n], None if none are."""


class WindowPass:
    """A pass over windows of ``seq_len`` tokens; each is a row."""

    def __init__(self, source: SourceIds, key: Key, *, seq_len: int):
        self.source, self.num_rows, self.seq_len = source, source.size, seq_len
        self._key = derive_key(stream("order"), *key)

    def tokens_before(self, row: int) -> int:
        return row * self.seq_len

    def read(self, rows: np.ndarray) -> tuple[Tensor, None]:
        indices = permute(torch.from_numpy(rows), self.num_rows, self._key).numpy()
        return torch.from_numpy(self.source.ids(indices)), None


class SourceExamples:
    """The examples of a source as a data set of its own, for a :class:`Packer`; ids count from 0.

    Args:
        examples: all examples.
        spans: the spans of the source.
        num_tokens: the sum of the lengths of its examples.
    """

    def __init__(self, examples: Lengths, spans: Sequence[Span], *, num_tokens: int):
        self.examples, self.seq_len, self.num_pairs = examples, examples.seq_len, num_tokens
        self._ids = SourceIds(spans, SelectedSlots(len(examples)))

    @property
    def num_rows(self) -> int:
        return -(-self.num_pairs // self.seq_len)

    def __len__(self) -> int:
        return self._ids.size

    def global_ids(self, ids: np.ndarray) -> np.ndarray:
        """Ids of this source, int64 [n] -> ids of all data."""
        return self._ids.ids(ids)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        return self.examples.lengths(self.global_ids(ids))

    def length_sample(self, size: int) -> np.ndarray:
        """The lengths of at most ``size`` examples, in runs of neighbours at equal distances."""
        num = len(self)
        runs = min(_SAMPLED_RUNS, -(-num // RUN), max(1, size // RUN))
        starts = np.arange(runs, dtype=np.int64) * num // runs
        ids = np.unique((starts[:, None] + np.arange(RUN)).reshape(-1))
        return np.concatenate([self.lengths(part) for part in np.array_split(ids[ids < num], runs)])


class _LocalSelection:
    """The selected examples of all data, asked by the ids of a source."""

    def __init__(self, examples: SourceExamples, selected: SelectedSlots):
        self.examples, self.selected = examples, selected

    def contains(self, ids: np.ndarray) -> np.ndarray:
        return self.selected.contains(self.examples.global_ids(ids))


class DocumentPass:
    """A pass over windows of packed documents of a source. Making one is a collective.

    Args:
        packer: of a :class:`SourceExamples`, with a batch of one window.
        num_examples: N, the id that pads a row.
    """

    def __init__(self, packer: Packer, selected: SelectedSlots, key: Key, *, num_examples: int):
        assert isinstance(packer.examples, SourceExamples)
        self.examples, self.num_examples, self.cuts_examples = packer.examples, num_examples, packer.cuts_examples
        local: object = _LocalSelection(packer.examples, selected)
        self._packed: PackedPass = packer.pack(local, key, count_tokens=True)  # type: ignore[arg-type]
        self.num_rows = self._packed.num_windows

    def tokens_before(self, row: int) -> int:
        return self._packed.tokens_before(row)

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        local, skipped = self._packed.windows(rows)
        ids = np.full(local.shape, self.num_examples, dtype=np.int64)
        exists = local.numpy() < len(self.examples)
        ids[exists] = self.examples.global_ids(local.numpy()[exists])
        return torch.from_numpy(ids), skipped if self.cuts_examples else None
