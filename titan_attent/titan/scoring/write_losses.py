"""Scores every example in order, on all ranks, and writes the losses; for a large model and for a table of counts.

The examples are scored in batches of equal size on every rank, so that all ranks run the same forward passes. The
losses of a chunk of batches are gathered at once. Rank 0 passes them to the thread that writes (scores/writer.py). All
ranks check the losses themselves, so that none waits for another rank's files.

Cost: less than one batch of all ranks of padding; per chunk one gather of its losses (4 bytes per example) and one host
sync; one broadcast of a number at the start.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.foundations.sharding import ExampleSharding, is_first_rank
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.user_errors import fail, on_first_rank


class Rows(Protocol):
    """What is scored: rows by their ids."""

    def __len__(self) -> int: ...

    def read(self, ids: Tensor) -> ReadBatch: ...


Score = Callable[[dict[str, Tensor], Tensor], Tensor]
"""({"input": int64 [B, L]}, labels int64 [B, L]) -> mean nats per token, fp32 [B]."""

CHUNK_EXAMPLES = 2**16
"""Approximate number of examples gathered and written at once; at least one batch of all ranks."""
CHUNK_BATCHES = 256
"""Largest number of batches per chunk: a killed scoring loses its current chunk, and few ranks take long for many
examples.
"""


@dataclass(frozen=True, kw_only=True)
class ScoringChunks:
    """How the examples [start, num_examples) are cut into chunks, and the chunks into batches of all ranks."""

    start: int
    num_examples: int
    batch_size: int
    """Rows per rank."""
    num_ranks: int

    @property
    def rows(self) -> int:
        """Rows of a batch of all ranks."""
        return self.batch_size * self.num_ranks

    @property
    def size(self) -> int:
        """Examples of a chunk; only the last has fewer."""
        return self.rows * min(max(CHUNK_EXAMPLES // self.rows, 1), CHUNK_BATCHES)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ids [start, stop) of every chunk, in order."""
        for start in range(self.start, self.num_examples, self.size):
            yield start, min(start + self.size, self.num_examples)

    def ids(self, rank: int) -> Iterator[Tensor]:
        """int64 [batch_size] for every batch of ``rank``; the last batch is padded with the last id of the data."""
        rows_of_rank = rank * self.batch_size + torch.arange(self.batch_size)
        for start, stop in self.ranges():
            for first in range(start, stop, self.rows):
                yield (first + rows_of_rank).clamp(max=self.num_examples - 1)


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
) -> None:
    """Score the examples from id ``start`` on, and finish the folder; end all ranks if the losses cannot be stored. A
    collective, on all ranks.

    Args:
        writer: entered on rank 0.
        score: computes the losses of a batch.
        start: first example without a loss.
        batch_size: rows per rank.
    """
    chunks = ScoringChunks(start=start, num_examples=len(dataset), batch_size=batch_size, num_ranks=sharding.size)
    batches = reader.read(dataset.read, chunks.ids(sharding.rank), pin_memory=pin_memory)
    bar = progress_bar(len(dataset), start=start, unit=" examples")
    append_all(writer, _scored(chunks, batches, score, sharding, writer, bar), bar)


def progress_bar(total: int, *, start: int, unit: str) -> tqdm:
    """The bar of rank 0."""
    return tqdm(
        total=total,
        initial=start,
        unit=unit,
        mininterval=0.2 if sys.stderr.isatty() else 60,  # five lines per second would flood a log file
        disable=not is_first_rank(),
    )


def append_all(writer: ScoresWriter, chunks: Iterable[tuple[int, Tensor, bool]], bar: tqdm) -> None:
    """Append the losses of every chunk on rank 0, and finish the folder; end all ranks if they cannot be stored.

    Args:
        writer: entered on rank 0.
        chunks: of every chunk its first id, its losses fp32 [n] on the CPU, and whether rank 0 could write so far.
    """
    with bar:
        for first, losses, written in chunks:
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
        local = []
        for done in range(first, stop, chunks.rows):
            local.append(score(*next(batches)))
            bar.update(min(chunks.rows, stop - done))
        # The same gather says whether the writer failed: all ranks end together, and none waits for a dead one.
        failed = local[0].new_full((1,), float(writer.failed))
        gathered = sharding.gather(torch.cat([*local, failed]))[0].cpu()
        by_rank = gathered[:, :-1].unflatten(1, (len(local), chunks.batch_size))  # [ranks, batches, rows]
        yield first, by_rank.transpose(0, 1).flatten()[: stop - first], not gathered[:, -1].any()


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
