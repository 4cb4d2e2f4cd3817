"""Scores every document in order, on all ranks, and writes the losses: those of a model that reads spans of documents.

The score of a document is the mean loss of its tokens, each read in its span of at most ``seq_len`` tokens. Documents
are scored in chunks of whole blocks (data/plan/forward_rows.py), whose rows are laid out for all ranks together. The
losses of a chunk are gathered at once and folded by document. A document without a label has a score of 0, which is
read by nobody. As in write_losses.py, all ranks check the losses themselves.

Cost: of a chunk's last batches, at most one per length of rows is padded; per chunk one gather of 8 bytes per example,
one host sync, and on every rank 4 bytes read per document. A killed scoring loses its current chunk.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.forward_rows import ForwardRows, Rows
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.folding import ExampleLosses
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.scoring.write_losses import append_all, progress_bar

Score = Callable[[dict[str, Tensor], Tensor], ExampleLosses]
"""({"input": int64 [B, L], ...}, labels int64 [B, L]) -> the losses of the examples of all rows, row after row."""

CHUNK_BATCHES = 64
"""Approximate number of batches per chunk, at least one block: of them a few are not full."""


def write_document_losses(
    writer: ScoresWriter,
    score: Score,
    *,
    start: int,
    dataset: DocumentDataset,
    forward_rows: ForwardRows,
    reader: Reader,
    sharding: ExampleSharding,
    batch_size: int,
    pin_memory: bool = False,
) -> None:
    """Score the documents from number ``start`` on, and finish the folder; end all ranks if they cannot be stored. A
    collective, on all ranks.

    Args:
        writer: entered on rank 0.
        score: computes the losses of a batch.
        start: first document without a loss.
        forward_rows: lays out the examples of ``dataset``.
        batch_size: rows of ``seq_len`` per rank.
    """
    num_documents = dataset.scored.num_examples

    def read(rows: Rows) -> ReadBatch:
        return dataset.read(rows.ids, row_length=rows.length)

    def chunks() -> Iterator[tuple[int, Tensor, bool]]:
        size = chunk_size(forward_rows, batch_size=batch_size, block_size=forward_rows.block_size)
        for first, stop in ranges(start, num_documents, size=size):
            examples = np.arange(dataset.first_example_of(first), dataset.first_example_of(stop))
            documents = dataset.documents_of(examples)
            borders = [last for _, last in ranges(first, stop, size=forward_rows.block_size)]
            blocks = np.split(examples, np.searchsorted(documents, borders[:-1]))
            layout = list(forward_rows.batches_of(iter(blocks), batch_size=batch_size))
            local = [rows.of_rank(sharding.rank, sharding.size) for rows in layout]
            results = [score(*batch) for batch in reader.read(read, local, pin_memory=pin_memory)]
            (losses, counts), written = _gathered(results, writer, sharding)
            ranks = range(sharding.size)
            by_rank = [rows.of_rank(rank, sharding.size).ids.flatten() for rank in ranks for rows in layout]
            ids = torch.cat([torch.zeros(0, dtype=torch.int64), *by_rank]).numpy()
            is_example = ids < len(dataset)
            owners = documents[ids[is_example] - examples[:1]] - first
            yield first, _means(owners, losses[is_example], counts[is_example], num=stop - first), written
            bar.update(stop - first)

    bar: tqdm = progress_bar(num_documents, start=start, unit=" documents")
    append_all(writer, chunks(), bar)


def chunk_size(forward_rows: ForwardRows, *, batch_size: int, block_size: int) -> int:
    """Documents or examples of a chunk: whole blocks, so that rows do not depend on the number of ranks."""
    examples = forward_rows.examples
    tokens_per_batch = batch_size * forward_rows.num_ranks * examples.seq_len
    wanted = CHUNK_BATCHES * tokens_per_batch * len(examples) // examples.num_pairs
    return block_size * max(1, wanted // block_size)


def ranges(start: int, stop: int, *, size: int) -> Iterator[tuple[int, int]]:
    """The numbers [first, last) of every chunk from ``start`` on; all others begin at a multiple of ``size``."""
    while start < stop:
        last = min((start // size + 1) * size, stop)
        yield start, last
        start = last


def _gathered(results: list[ExampleLosses], writer: ScoresWriter, sharding: ExampleSharding) -> tuple[np.ndarray, bool]:
    """(losses and counts of a chunk's examples, float64 [2, n], rank after rank; whether rank 0 could write so far)."""
    # The same gather says whether the writer failed: all ranks end together, and none waits for a dead one.
    device = (
        results[0].losses.device if results else torch.device(sharding.mesh.device_type if sharding.mesh else "cpu")
    )
    failed = torch.full((2, 1), float(writer.failed), device=device)
    columns = [torch.stack((result.losses, result.counts)) for result in results]
    gathered = sharding.gather(torch.cat([*columns, failed], dim=1))[0].cpu()
    return gathered[:, :, :-1].transpose(0, 1).flatten(1).double().numpy(), not gathered[:, 0, -1].any()


def _means(documents: np.ndarray, losses: np.ndarray, counts: np.ndarray, *, num: int) -> Tensor:
    """fp32 [num], the mean loss of the tokens of documents 0 to ``num`` - 1; 0 for one without tokens.

    Args:
        documents: int64 [n], the document of each example.
        losses, counts: float64 [n], its mean loss and its number of tokens.
    """
    sums = np.bincount(documents, weights=losses * counts, minlength=num)
    return torch.from_numpy(sums / np.maximum(np.bincount(documents, weights=counts, minlength=num), 1)).float()
