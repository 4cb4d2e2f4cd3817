"""A mixture of data sources above the plan of a run: how many rows of each batch a source fills, and with which.

    plan or teacher --(pass: what is selected)--> mixture --(rows of each source per batch)--> passes of the sources

The plan (shuffled.py) or the teacher still decides passes: which examples are selected, and for how many batches. The
mixture decides which of them a batch trains. Of each source it goes through the selected examples in the source's own
keyed order, pass after pass (source.py), and of each batch it gives a source the rows that it lacks to have had exactly
its share of all tokens (:func:`~.proportions.rows_of_batch`). So over any stretch of batches a source has its share of
the tokens, but for a row or two. Within a batch the rows of all sources stand in a keyed order.

A source goes on where it was when a pass of the plan ends. If what is selected of it has changed, it begins a new pass
of its own.

The state is six integers per source, whatever their size, and the same on every rank: tokens that it lacks, tokens
trained, its pass, the row in it, the rows of it, and a hash of its selection. It loads on any number of ranks, and with
other proportions.

Cost: every rank plans ``STRETCH`` batches at a time, some 10 us per batch and source. A rank evaluates the orders of
its own rows only. With packed documents, a pass over a source is packed like one over all data, by all ranks together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.plan.order import Key, Pass, Pool, SelectedSlots
from titan_attent.data.plan.packed import PackedPass, Packer
from titan_attent.data.plan.proportions import CANDIDATES, TRAINED, UNITS, Proportions, rows_of_batch
from titan_attent.data.plan.source import DocumentPass, SourceIds, SourcePass, Span, WindowPass, digest_of
from titan_attent.foundations.counter_rng import derive_key, permute, stream

STRETCH = 256
"""Number of batches that are planned at a time."""
TAG = "mixture"
"""Prefix of the scalars."""


@dataclass
class Progress:
    """The state of a source.

    Attributes:
        deficit: tokens that it lacks to have had exactly its share, times ``UNITS``.
        tokens: tokens trained.
        pass_index: number of its pass, from 0; -1 before the first.
        row: rows of this pass that are trained.
        num_rows: all rows of this pass.
        digest: hash of what is selected in this pass.
    """

    deficit: int = 0
    tokens: int = 0
    pass_index: int = -1
    row: int = 0
    num_rows: int = 0
    digest: int = -1


@dataclass(frozen=True)
class Source:
    """A source of the data.

    Attributes:
        name: its name.
        spans: its examples.
        tokens: tokens of them.
        packer: packs its documents, with a batch of one window; None where a row is one example, or it has none.
    """

    name: str
    spans: tuple[Span, ...]
    tokens: int
    packer: Packer | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a pass over a source: its rows from ``first`` on are row ``row`` and the following of a stretch."""

    row: int
    first: int
    source_pass: SourcePass


class MixedPass:
    """Consecutive batches of a pass of the plan, with the rows of each source.

    Args:
        base: the pass of the plan. Batches keep their numbers in it.
        first: the first batch.
        rows: int64 [batches, S], the rows of each source per batch.
        segments: of each source, the parts of its passes that these rows are.
        step: training steps before batch ``first``.
        seed: seed of the order of the rows within a batch.
        num_examples: N, the id that pads a row.
    """

    def __init__(
        self,
        base: Pass | PackedPass,
        *,
        first: int,
        rows: np.ndarray,
        segments: Sequence[Sequence[Segment]],
        step: int,
        seed: int,
        num_examples: int,
        row_shape: tuple[int, ...],
    ):
        self.base, self.first, self.step, self.seed = base, first, step, seed
        self.batch_size, self.round = base.batch_size, base.round
        self.weighted, self.strategy, self.row_shape = base.weighted, base.strategy, row_shape
        self.num_examples, self.num_batches = num_examples, first + len(rows)
        self.pool = Pool.whole(num_examples)
        self._ends = np.cumsum(rows, axis=1)  # within a batch, before its rows are shuffled
        self._begins = np.cumsum(rows, axis=0) - rows  # rows of each source before a batch
        self._segments = segments

    @property
    def visit_key(self) -> tuple[int, ...]:
        """Integers that identify the pass of the plan."""
        return self.base.visit_key

    def visit_key_of(self, batch: int) -> tuple[int, ...]:
        """The key of the visits in global batch ``batch``: a small source is visited often in a pass of the plan."""
        return (*self.visit_key, self.step + batch - self.first)

    def ids(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """The examples of ``rows`` of each of the batches [start, stop): int64 [n], or [n, M] padded with N."""
        return self._read(start, stop, rows)[0]

    def skipped(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor | None:
        """int64 [n], how many tokens of the first example of each of these rows are in the row before; None if none."""
        return self._read(start, stop, rows)[1]

    def slots(self, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """int64 [n] or [n x M], the slots in the pool of all examples: the ids; 0 for padding."""
        ids = self.ids(start, stop, rows).flatten()
        return torch.where(ids < self.num_examples, ids, 0)

    def sources(self, start: int, stop: int, rows: slice = slice(None)) -> np.ndarray:
        """int64 [n], the number of the source of each of these rows."""
        return np.concatenate([self._places(batch, rows)[0] for batch in range(start, stop)])

    def _places(self, batch: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, row of the source in this stretch), int64 [n] each, of rows of a batch."""
        number, own = batch - self.first, range(self.batch_size)[rows]
        key = derive_key(stream("mixture/rows"), self.seed, self.step + number)
        places = permute(torch.arange(own.start, own.stop, own.step), self.batch_size, key).numpy()
        sources = np.searchsorted(self._ends[number], places, side="right")
        firsts = np.concatenate(([0], self._ends[number][:-1]))
        return sources, places - firsts[sources] + self._begins[number][sources]

    def _read(self, start: int, stop: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        places = [self._places(batch, rows) for batch in range(start, stop)]
        sources, numbers = (np.concatenate(parts) for parts in zip(*places, strict=True))
        ids = torch.full((len(sources), *self.row_shape), self.num_examples, dtype=torch.int64)
        skipped, cuts = torch.zeros(len(sources), dtype=torch.int64), False
        for source in np.unique(sources).tolist():
            of_source = np.flatnonzero(sources == source)
            segments = self._segments[source]
            parts = np.searchsorted([segment.row for segment in segments], numbers[of_source], side="right") - 1
            for part in np.unique(parts).tolist():
                at, segment = of_source[parts == part], segments[part]
                ids[at], left_out = segment.source_pass.read(numbers[at] - segment.row + segment.first)
                if left_out is not None:
                    skipped[at], cuts = left_out, True
        return ids, skipped if cuts else None


class _Walk:
    """A source while batches are planned: it goes through its passes row by row, and keeps what it went through."""

    def __init__(self, progress: Progress, make_pass: Callable[[int], SourcePass]):
        self.progress, self.make_pass = replace(progress), make_pass
        self.current: SourcePass | None = None
        self.segments: list[Segment] = []
        self.num_rows = 0

    def open(self) -> SourcePass:
        """The pass that the next row is of. A collective where passes are packed."""
        progress = self.progress
        if self.current is None or progress.row >= self.current.num_rows:
            if self.current is not None:
                progress.pass_index, progress.row = progress.pass_index + 1, 0
            self.current = self.make_pass(progress.pass_index)
            progress.num_rows = self.current.num_rows
            if not self.current.num_rows:
                return self.current
            if progress.row >= self.current.num_rows:  # a checkpoint at the end of a pass
                return self.open()
            self.segments.append(Segment(self.num_rows, progress.row, self.current))
        return self.current

    @property
    def price(self) -> int:
        """Mean number of tokens of a row, at least 1."""
        current = self.open()
        return max(1, round(current.tokens_before(current.num_rows) / max(1, current.num_rows)))

    def take(self, rows: int) -> int:
        """Go on by ``rows``; their tokens."""
        tokens = 0
        while rows:
            current, progress = self.open(), self.progress
            taken = min(rows, current.num_rows - progress.row)
            tokens += current.tokens_before(progress.row + taken) - current.tokens_before(progress.row)
            progress.row += taken
            self.num_rows += taken
            rows -= taken
        self.progress.tokens += tokens
        return tokens


class Mixture:
    """The mixture of a run.

    Args:
        sources: all sources of the data, in the order of ``proportions.names``.
        num_examples: N.
        batch_size: G, rows of a global batch.
        seq_len: tokens of a row.
        seed: seed of the orders.
        of: ``TRAINED`` if the proportions are of the tokens that are trained; ``CANDIDATES`` if they are of the tokens
            that a teacher selects from, so that a source of which it leaves out more is trained less.

    Attributes:
        progress: the state of each source after the batches that were served.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        proportions: Proportions,
        *,
        num_examples: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        of: str = TRAINED,
    ):
        assert tuple(source.name for source in sources) == proportions.names
        self.sources, self.proportions, self.of = sources, proportions, of
        self.num_examples, self.batch_size, self.seq_len, self.seed = num_examples, batch_size, seq_len, seed
        self.progress = [Progress() for _ in sources]
        # A source without an example has no packer.
        packer = next((source.packer for source in sources if source.packer is not None), None)
        self._row_shape = () if packer is None else (packer.max_examples,)
        self._streams = [stream(f"mixture/{source.name}") for source in sources]
        self._step = 0
        self._passes: dict[int, tuple[tuple[int, int], SourcePass]] = {}
        self._stretch: list[list[Progress]] = []  # the states after its batches
        self._selected: SelectedSlots | None = None
        self._digests: list[int] = []

    def stretch(self, base: Pass | PackedPass, *, step: int, consumed: int) -> MixedPass:
        """The next batches of a pass of the plan. A collective where documents are packed.

        Args:
            base: the pass; its pool is all examples.
            step: training steps done.
            consumed: how many of them are of this pass.
        """
        assert base.pool.size == self.num_examples
        selected = base.selected
        if selected.bitmask is None:  # also a full pass, whose slots are in another order than the ids
            selected = SelectedSlots(self.num_examples)
        self._set_selected(selected)
        self._step = step
        walks = [_Walk(progress, self._maker(i)) for i, progress in enumerate(self.progress)]
        rows, self._stretch = [], []
        for number in range(min(STRETCH, base.num_batches - consumed)):
            counts = self._next_batch(walks, step + number + 1)
            rows.append(counts)
            self._stretch.append([replace(walk.progress) for walk in walks])
        return MixedPass(
            base,
            first=consumed,
            rows=np.array(rows, dtype=np.int64).reshape(-1, len(walks)),
            segments=[walk.segments for walk in walks],
            step=step,
            seed=self.seed,
            num_examples=self.num_examples,
            row_shape=self._row_shape,
        )

    def _set_selected(self, selected: SelectedSlots) -> None:
        """Let sources of which something else is selected begin a new pass."""
        if self._selected is None or selected.bitmask is not self._selected.bitmask:
            self._digests = [digest_of(source.spans, selected) for source in self.sources]
        self._selected = selected
        for progress, digest in zip(self.progress, self._digests, strict=True):
            if progress.digest != digest:
                progress.pass_index, progress.row, progress.digest = progress.pass_index + 1, 0, digest

    def _next_batch(self, walks: Sequence[_Walk], step: int) -> list[int]:
        """The rows of each source in the batch of a step; ``walks`` go on by them."""
        shares = self._shares(self.proportions.at(step))
        used = [i for i, walk in enumerate(walks) if shares[i] or (walk.progress.deficit > 0 and walk.open().num_rows)]
        prices = [walks[i].price for i in used]
        deficits = [walks[i].progress.deficit for i in used]
        counts = [0] * len(walks)
        found = rows_of_batch(deficits, [shares[i] for i in used], prices, batch_size=self.batch_size)
        for i, num in zip(used, found, strict=True):
            counts[i] = num
        tokens = [walk.take(num) for walk, num in zip(walks, counts, strict=True)]
        total = sum(tokens)
        for walk, share, taken in zip(walks, shares, tokens, strict=True):
            walk.progress.deficit += share * total - UNITS * taken
        return counts

    def _shares(self, shares: list[int]) -> list[int]:
        """The proportions of what is trained, from those of ``[data.sources]``: a source of which nothing is selected
        has none, and with ``CANDIDATES`` each has the share of its tokens that is selected.
        """
        left = []
        for i, (share, source) in enumerate(zip(shares, self.sources, strict=True)):
            if share:
                current = self._pass_of(i, max(0, self.progress[i].pass_index))
                if self.of == CANDIDATES:
                    share = share * current.tokens_before(current.num_rows) // source.tokens
                elif not current.num_rows:
                    share = 0
            left.append(share)
        if left == shares:
            return shares
        if not (total := sum(left)):
            raise ValueError(
                "the teacher has left out all examples of the sources with a proportion above 0, so there is nothing "
                "to train: give other sources a proportion, or let the teacher leave out less"
            )
        scaled = [share * UNITS // total for share in left]
        scaled[scaled.index(max(scaled))] += UNITS - sum(scaled)
        return scaled

    def _maker(self, number: int) -> Callable[[int], SourcePass]:
        return lambda pass_index: self._pass_of(number, pass_index)

    def _pass_of(self, number: int, pass_index: int) -> SourcePass:
        """A pass over a source; the last one is kept. A collective where documents are packed and it is a new one."""
        source, kept = self.sources[number], self._passes.get(number)
        identity = (pass_index, self._digests[number])
        if kept is not None and kept[0] == identity:
            return kept[1]
        assert self._selected is not None
        key: Key = (self.seed, self._streams[number], pass_index)
        made: SourcePass
        if source.packer is None:
            made = WindowPass(SourceIds(source.spans, self._selected), key, seq_len=self.seq_len)
        else:
            made = DocumentPass(source.packer, self._selected, key, num_examples=self.num_examples)
        self._passes[number] = (identity, made)
        return made

    def batch_served(self) -> None:
        """Count a batch of the stretch as trained."""
        self.progress = self._stretch.pop(0)
        self._step += 1

    # -- logs and checkpoint --------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The ``mixture/*`` scalars: of each source its proportion now, its share of all tokens trained so far, how
        often it was trained, and the share of its pass that is left.
        """
        total = max(1, sum(progress.tokens for progress in self.progress))
        shares = self.proportions.at(max(1, self._step))
        found: dict[str, float] = {}
        for i, (source, progress) in enumerate(zip(self.sources, self.progress, strict=True)):
            found[f"{TAG}/proportion/{source.name}"] = shares[i] / UNITS
            found[f"{TAG}/share/{source.name}"] = progress.tokens / total
            if source.tokens:
                found[f"{TAG}/epochs/{source.name}"] = progress.tokens / source.tokens
                found[f"{TAG}/left/{source.name}"] = 1 - progress.row / max(1, progress.num_rows)
        return found

    def state_dict(self) -> str:
        """The state as JSON, by the names of the sources."""
        named = zip(self.proportions.names, self.progress, strict=True)
        return json.dumps({name: asdict(progress) for name, progress in named})

    def load_state_dict(self, state: str | None) -> None:
        """Load the state; a source that it does not have begins anew, all of them without a state."""
        stored: Mapping[str, Any] = json.loads(state) if state else {}
        self.progress = [Progress(**stored.get(name, {})) for name in self.proportions.names]
        self._stretch = []
