"""Scores every example in order, on all ranks, and writes the losses; for a large model and for a table of counts.

The examples are scored in batches of equal size on every rank, so that all ranks run the same forward passes. An
example longer than a row is scored in several rows, one span of it in each; its loss is the mean over their tokens. The
losses of a chunk of batches are gathered at once. Rank 0 passes them to the thread that writes (scores/writer.py). All
ranks check the losses themselves, so that none waits for another rank's files.

Cost: less than one batch of all ranks of padding; per chunk one gather of its losses (4 bytes per example) and one host
sync; one broadcast of a number at the start. With several rows per example: padding also per chunk, and a gather of 8
bytes per row.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.foundations.sharding import ExampleSharding, is_first_rank
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.user_errors import fail, on_first_rank


class Rows(Protocol):
    """What is scored: rows by their ids."""

    def __len__(self) -> int: ...

    def read(self, ids: Tensor) -> ReadBatch: ...


Score = Callable[[dict[str, Tensor], Tensor], Tensor]
"""({"input": int64 [B, L]}, labels int64 [B, L]) -> mean nats per token, fp32 [B]."""

FirstRows = Callable[[int, int], np.ndarray]
"""Examples start, stop -> int64 [stop - start + 1]: the first row of each example, and the row after the last one's."""

CHUNK_EXAMPLES = 2**16
"""Approximate number of examples gathered and written at once; at least one batch of all ranks."""
CHUNK_BATCHES = 256
"""Largest number of batches per chunk: a killed scoring loses its current chunk, and few ranks take long for many
examples.
"""

MIN_BATCHES = 16
"""Smallest number of batches per chunk, on average, with several rows per example: the last batch of each is padded."""


@dataclass(frozen=True, kw_only=True)
class ScoringChunks:
    """How the examples [start, num_examples) are cut into chunks, and the chunks into batches of all ranks."""

    start: int
    num_examples: int
    batch_size: int
    """Rows per rank."""
    num_ranks: int
    num_rows: int | None = None
    first_rows: FirstRows | None = None
    """With ``num_rows``, the rows of all examples; both are None if each example is one row."""

    @property
    def rows(self) -> int:
        """Rows of a batch of all ranks."""
        return self.batch_size * self.num_ranks

    @property
    def size(self) -> int:
        """Examples of a chunk; only the last has fewer. With several rows per example, the number in that many rows on
        average.
        """
        num_batches = max(CHUNK_EXAMPLES // self.rows, MIN_BATCHES if self.num_rows else 1)
        size = self.rows * min(num_batches, CHUNK_BATCHES)
        return max(1, size * self.num_examples // self.num_rows) if self.num_rows else size

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ids [start, stop) of every chunk, in order."""
        for start in range(self.start, self.num_examples, self.size):
            yield start, min(start + self.size, self.num_examples)

    def bounds(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start + 1]: :data:`FirstRows` of a chunk."""
        return np.arange(start, stop + 1) if self.first_rows is None else self.first_rows(start, stop)

    def first_rows_of_batches(self, bounds: np.ndarray) -> range:
        """The first row of every batch of all ranks of a chunk; one batch for a chunk without rows."""
        first, stop = int(bounds[0]), int(bounds[-1])
        return range(first, max(stop, first + 1), self.rows)

    def ids(self, rank: int) -> Iterator[Tensor]:
        """int64 [batch_size], the rows of every batch of ``rank``; padded with the last row of the data at most, and
        at the end of a chunk with rows of the next one.
        """
        rows_of_rank = rank * self.batch_size + torch.arange(self.batch_size)
        for start, stop in self.ranges():
            for first in self.first_rows_of_batches(self.bounds(start, stop)):
                yield (first + rows_of_rank).clamp(max=(self.num_rows or self.num_examples) - 1)


@contextmanager
def open_on_rank_zero(writer: ScoresWriter) -> Iterator[int]:
    """Enter ``writer`` on rank 0, and yield the first example without a loss on all ranks. A collective of one number.

    An error there ends all ranks.
    """
    with ExitStack() as stack:
        with fail_on_mistake():
            start = on_first_rank(lambda: stack.enter_context(writer).num_scored)
        yield start


def write_losses(
    writer: ScoresWriter,
    score: Score,
    *,
    start: int,
    dataset: Rows,
    reader: Reader,
    sharding: ExampleSharding,
    batch_size: int,
    pin_memory: bool = False,
    first_rows: FirstRows | None = None,
) -> None:
    """Score the examples from id ``start`` on, and finish the folder; end all ranks if the losses cannot be stored. A
    collective, on all ranks.

    Args:
        writer: entered on rank 0; it says how many examples there are.
        score: computes the losses of a batch.
        start: first example without a loss.
        batch_size: rows per rank.
        first_rows: the rows of ``dataset`` that each example is; None if each row is one example.
    """
    num_examples = writer.scoring.num_examples
    chunks = ScoringChunks(
        start=start,
        num_examples=num_examples,
        batch_size=batch_size,
        num_ranks=sharding.size,
        num_rows=None if first_rows is None else len(dataset),
        first_rows=first_rows,
    )
    batches = reader.read(dataset.read, chunks.ids(sharding.rank), pin_memory=pin_memory)
    bar = tqdm(
        total=num_examples,
        initial=start,
        unit=" examples",
        mininterval=0.2 if sys.stderr.isatty() else 60,  # five lines per second would flood a log file
        disable=not is_first_rank(),
    )
    with bar:
        for first, losses, written in _scored(chunks, batches, score, sharding, writer, bar):
            with fail_on_mistake(bar):
                if not written:
                    writer.wait()
                    raise ValueError(f"{writer.path}: rank 0 could not write the losses; its message says why")
                writer.check_finite(first, losses)
                if is_first_rank():
                    writer.append(losses)
    if is_first_rank():
        with fail_on_mistake():
            writer.finish()


def _scored(
    chunks: ScoringChunks,
    batches: Iterator[ReadBatch],
    score: Score,
    sharding: ExampleSharding,
    writer: ScoresWriter,
    bar: tqdm,
) -> Iterator[tuple[int, Tensor, bool]]:
    """For every chunk, on every rank: first id, losses fp32 [n] on the CPU, and whether rank 0 could write so far."""
    for first, stop in chunks.ranges():
        bounds, done = chunks.bounds(first, stop), 0
        local, counts = list[Tensor](), list[Tensor]()
        for row in chunks.first_rows_of_batches(bounds):
            input_dict, labels = next(batches)
            local.append(score(input_dict, labels))
            if chunks.first_rows is not None:
                counts.append((labels != IGNORE_INDEX).sum(dim=1).to(local[-1]))
            before, done = done, int(np.searchsorted(bounds, min(row + chunks.rows, bounds[-1]), side="right")) - 1
            bar.update(done - before)
        # The same gather says whether the writer failed: all ranks end together, and none waits for a dead one.
        failed = local[0].new_full((1,), float(writer.failed))
        gathered = sharding.gather(torch.cat([*local, *counts, failed]))[0].cpu()
        by_rank = gathered[:, :-1].unflatten(1, (-1, len(local), chunks.batch_size))  # [ranks, values, batches, rows]
        values = by_rank.permute(1, 2, 0, 3).flatten(1)[:, : bounds[-1] - bounds[0]]
        losses = values[0] if chunks.first_rows is None else _means(*values.double().numpy(), bounds=bounds)
        yield first, losses, not gathered[:, -1].any()


def _means(losses: np.ndarray, counts: np.ndarray, *, bounds: np.ndarray) -> Tensor:
    """The mean loss per token of each example, fp32 [n]; 0 for an example without a label.

    Args:
        losses: float64 [rows], mean over the labels of each row.
        counts: float64 [rows], number of labels.
        bounds: int64 [n + 1], :data:`FirstRows`.
    """
    num = len(bounds) - 1
    example = np.repeat(np.arange(num), np.diff(bounds))
    sums, totals = (np.bincount(example, weights=weights, minlength=num) for weights in (losses * counts, counts))
    return torch.from_numpy(sums / np.maximum(totals, 1)).float()


@contextmanager
def fail_on_mistake(bar: tqdm | None = None) -> Iterator[None]:
    """End this process on a ValueError. Use it inside the writer's context: the message is then printed before the wait
    for losses that are still being written.
    """
    try:
        yield
    except ValueError as error:
        if bar is not None:
            bar.close()  # so that the message is on its own line
        fail(error)
