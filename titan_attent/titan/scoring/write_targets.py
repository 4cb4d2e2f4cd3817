"""The batches in which a source reads every example once, on all ranks, and where the targets of their tokens belong.

Windows are read in batches of equal size (write_losses.py), documents in rows that others share or in short ones, block
after block (write_documents.py). Both in chunks: when all ranks have written a chunk, its examples are durable. Which
documents share a row does not depend on the number of ranks.

Cost: of a chunk's last batches of documents, at most one per length of rows is padded. Per chunk of documents the
collectives of data/plan/forward_rows.py. A killed command loses its current chunk.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.forward_rows import ForwardRows, Rows
from titan_attent.data.text.document_examples import DocumentDataset, PairPlaces
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.scores.targets import window_places
from titan_attent.titan.scoring.write_documents import chunk_size, ranges
from titan_attent.titan.scoring.write_losses import ScoringChunks

BLOCKS = 16
"""A block of documents that are packed together is this part of one that is scored: its targets wait in memory."""


class Part(NamedTuple):
    """A batch of this rank.

    Attributes:
        num_examples: examples in the batches of all ranks.
        places: the pairs that get targets.
        batch: inputs and labels.
    """

    num_examples: int
    places: PairPlaces
    batch: ReadBatch


class Chunk(NamedTuple):
    """Examples that become durable together.

    Attributes:
        stop: the example behind the last.
        num_records: pairs of all examples before ``stop``.
        parts: to be used up before the next chunk.
    """

    stop: int
    num_records: int
    parts: Iterator[Part]


def window_chunks(
    dataset: TokenDataset,
    *,
    start: int,
    reader: Reader,
    sharding: ExampleSharding,
    batch_size: int,
    pin_memory: bool = False,
) -> Iterator[Chunk]:
    """The chunks of windows from id ``start`` on.

    Args:
        batch_size: rows per rank.
    """
    chunks = ScoringChunks(start=start, num_examples=len(dataset), batch_size=batch_size, num_ranks=sharding.size)
    ids = list(chunks.ids(sharding.rank))
    batches = reader.read(dataset.read, ids, pin_memory=pin_memory)
    # One after the other over all chunks, so that the reader is ahead of a chunk's end.
    parts = (
        Part(
            min(chunks.rows, stop - at),
            # The rows that pad the last batch repeat the last window.
            window_places(own[: max(0, stop - at - sharding.rank * batch_size)], seq_len=dataset.seq_len),
            batch,
        )
        for (stop, at), own, batch in zip(_batches(chunks), ids, batches, strict=True)
    )
    for first, stop in chunks.ranges():
        yield Chunk(stop, stop * dataset.seq_len, islice(parts, -(-(stop - first) // chunks.rows)))


def _batches(chunks: ScoringChunks) -> Iterator[tuple[int, int]]:
    """(end of its chunk, first example) of every batch of all ranks."""
    return ((stop, at) for first, stop in chunks.ranges() for at in range(first, stop, chunks.rows))


def document_chunks(
    dataset: DocumentDataset,
    forward_rows: ForwardRows,
    *,
    start: int,
    reader: Reader,
    sharding: ExampleSharding,
    batch_size: int,
    pin_memory: bool = False,
) -> Iterator[Chunk]:
    """The chunks of examples of documents from id ``start`` on. A collective per chunk.

    Args:
        forward_rows: lays out the examples of ``dataset``.
        batch_size: rows of ``seq_len`` per rank.
    """

    def read(rows: Rows) -> ReadBatch:
        return dataset.read(rows.ids, row_length=rows.length)

    block = max(1, forward_rows.block_size // BLOCKS)
    size = chunk_size(forward_rows, batch_size=batch_size, block_size=block)
    for first, stop in ranges(start, len(dataset), size=size):
        blocks = (np.arange(*ids) for ids in ranges(first, stop, size=block))
        layout = list(forward_rows.batches_of(blocks, batch_size=batch_size))
        own = [rows.of_rank(sharding.rank, sharding.size) for rows in layout]
        batches = zip(layout, own, reader.read(read, own, pin_memory=pin_memory), strict=True)
        parts = (
            Part(int((rows.ids < len(dataset)).sum()), dataset.pair_places(part.ids), batch)
            for rows, part, batch in batches
        )
        last = dataset.pair_places(torch.tensor([stop - 1]))
        yield Chunk(stop, int(last.firsts[0] + last.lengths[0]), parts)
