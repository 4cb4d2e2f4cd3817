"""Splits a data set into two new ones: examples for training and held-out examples.

The held-out examples are a few long spans, spread evenly over the data. So they represent the data in any order (for
instance with sources one after the other), and few documents are in both data sets. Such documents would bias the
held-out loss: a model trained on the first half of a document knows its names. The training examples are taken in
blocks, also spread evenly. Where a span ends in a new data set, its last label is the first token of the next span: one
wrong label per span.

A data set that knows its documents can be split by whole documents instead (:func:`hold_out_documents`): no document is
in both, and no label is wrong.

Cost: one pass over the copied tokens, in one process. By documents also 24 bytes of memory per document.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.format import Index, ShardEntry, ShardWriter, token_dtype, write_index
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import Tokenizer, open_tokenizer
from titan_attent.foundations.counter_rng import hash_ids

BLOCK_EXAMPLES = 16
"""Number of consecutive examples in a block, the unit of the split."""
NUM_SPANS = 8
"""Maximum number of held-out spans."""
MAX_HELD_OUT = 0.25
"""Maximum share of a data set that is held out."""
MIN_EXAMPLES = 128
"""Minimum number of examples of a data set."""
DOCUMENT_KEY = 0x5C0FE
"""Key of the hash that selects documents. With another key, the folders of earlier runs would hold other documents."""
BLOCK_DOCUMENTS = 16
"""Neighbouring documents that are held out together."""
SHARD_TOKENS = 2**27
"""A shard of a split by documents is finished after the document that reaches this number of tokens."""
READ_DOCUMENTS = 2**20
"""Ends of documents per read."""


def hold_out(dataset: TokenDataset, *, train: Path, held_out: Path, num_train: int, num_held_out: int) -> None:
    """Write about ``num_train`` examples to ``train`` and about ``num_held_out`` other examples to ``held_out``.

    Both are upper limits, rounded to blocks; no more than a quarter of all examples is held out. A folder that already
    has a data set is kept.

    Raises:
        ValueError: there are too few examples.
        OSError: a folder cannot be written.
    """
    if len(dataset) < MIN_EXAMPLES:
        raise ValueError(
            f"{dataset.shards.path}: holds {len(dataset)} examples of {dataset.seq_len} tokens, fewer than the "
            f"{MIN_EXAMPLES} needed to train on one part and hold out another; give a larger data set"
        )
    num_blocks = len(dataset) // BLOCK_EXAMPLES
    blocks = np.arange(num_blocks)
    is_held_out = held_out_mask(num_blocks, int(min(MAX_HELD_OUT * num_blocks, num_held_out / BLOCK_EXAMPLES)))
    remaining = blocks[~is_held_out]
    num_taken = min(len(remaining), max(1, -(-num_train // BLOCK_EXAMPLES)))
    taken = remaining[np.linspace(0, len(remaining) - 1, num_taken).astype(int)]
    for folder, chosen in ((train, taken), (held_out, blocks[is_held_out])):
        if not (folder / INDEX_FILE).is_file():
            _write(dataset, folder, chosen)


def held_out_mask(num_blocks: int, num_held_out: int) -> np.ndarray:
    """bool [num_blocks], with ``num_held_out`` (at least one) True: spans centred in ``NUM_SPANS`` equal ranges."""
    num_held_out = max(1, num_held_out)
    num_spans = min(NUM_SPANS, num_held_out)
    edges, before = (np.linspace(0, total, num_spans + 1).astype(int) for total in (num_blocks, num_held_out))
    mask = np.zeros(num_blocks, bool)
    for first, stop, size in zip(edges, edges[1:], np.diff(before), strict=False):
        start = (first + stop - size) // 2
        mask[start : start + size] = True
    return mask


def _write(dataset: TokenDataset, folder: Path, blocks: np.ndarray) -> None:
    shards, length = dataset.shards, BLOCK_EXAMPLES * dataset.seq_len

    def tokens_of_blocks() -> Iterator[np.ndarray]:
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1  # one more token: the label of the last example
            yield shards.read(int(block) * length, int(block + 1) * length + last)

    write_tokens(folder, tokens_of_blocks(), tokenizer=open_tokenizer(shards.tokenizer_info, shards.path))


def hold_out_documents(
    shards: TokenShards, *, train: Path, held_out: Path, num_held_out: int, min_held_out: int, max_train_tokens: int
) -> None:
    """Write whole documents to ``held_out``, and other documents to ``train``, as data sets of format version 3.

    A keyed hash decides about each block of 16 neighbouring documents: so both are random samples, which do not depend
    on the machine, and the held-out documents do not depend on ``max_train_tokens``. Both keep the order, sources and
    mask of the data set. A folder that already has a data set is kept.

    Args:
        num_held_out, min_held_out: number of held-out documents, and the fewest that are of use. No more than a quarter
            of all documents, and of all tokens, is held out: a document that would exceed it is not.
        max_train_tokens: maximum number of tokens of ``train``, which gets at least one document.

    Raises:
        ValueError: ``shards`` has no documents, or too few to hold out ``min_held_out``; nothing is written.
        OSError: a folder cannot be written.
    """
    starts, lengths = _documents(shards)
    ids = torch.arange(len(lengths))
    # Neighbours together: they often are of one book or one repository, and an expert that is trained on half of it
    # finds the other half easier than any other text.
    order = np.argsort(hash_ids(ids // BLOCK_DOCUMENTS, DOCUMENT_KEY).numpy(), kind="stable")
    limit, max_tokens = int(MAX_HELD_OUT * len(lengths)), int(MAX_HELD_OUT * shards.num_tokens)
    chosen, num_tokens = [], 0
    for number in order[: min(limit, max(1, num_held_out))].tolist():
        if num_tokens + lengths[number] <= max_tokens:
            chosen.append(number)
            num_tokens += int(lengths[number])
    if len(chosen) < min_held_out:
        raise ValueError(
            f"{shards.path}: has {len(lengths)} documents, of which {len(chosen)} can be held out, fewer than the "
            f"{min_held_out} needed: at most a quarter of the documents and tokens is; give a data set of at least "
            f"{round(min_held_out / MAX_HELD_OUT)} documents"
        )
    remaining = order[~np.isin(order, chosen)]
    fits = np.cumsum(lengths[remaining]) <= max_train_tokens
    fits[0] = True
    for folder, numbers in ((train, remaining[fits]), (held_out, np.array(chosen))):
        if not (folder / INDEX_FILE).is_file():
            _write_documents(shards, folder, np.sort(numbers), starts=starts, lengths=lengths)


def _documents(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """The start of every document in the stream, and its length, both int64 [num_documents]."""
    ends, first_token = [], 0
    for number, shard in enumerate(shards.index.shards):
        num_documents = shards.num_documents_of(number)
        for start in range(0, num_documents, READ_DOCUMENTS):
            stop = min(start + READ_DOCUMENTS, num_documents)
            ends.append(shards.document_ends(number, start, stop) + first_token)
        first_token += shard.num_tokens
    stops = np.concatenate(ends)
    lengths = np.diff(stops, prepend=0)
    return stops - lengths, lengths


def _write_documents(
    shards: TokenShards, folder: Path, numbers: np.ndarray, *, starts: np.ndarray, lengths: np.ndarray
) -> None:
    """Write the documents of ``numbers``, which rise. Adjacent documents of one source share shards."""
    tokenizer = open_tokenizer(shards.tokenizer_info, shards.path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    first_tokens = np.cumsum([0, *(shard.num_tokens for shard in shards.index.shards)])
    shard_of = np.searchsorted(first_tokens, starts[numbers], side="right") - 1
    sources = [shards.index.shards[number].source for number in shard_of.tolist()]
    entries: list[ShardEntry] = []
    max_token_id = -1
    # Adopted shards may have a dtype that this package does not write.
    dtype = shards.dtype if shards.index.root is None else token_dtype(shards.tokenizer_info["vocab_size"])
    for first, stop in _shard_borders(lengths[numbers].tolist(), sources):
        path = folder / f"shard-{len(entries):05d}.bin"
        with ShardWriter(path, dtype=dtype, source=sources[first], mask=shards.has_mask) as writer:
            for document, number in zip(numbers[first:stop].tolist(), shard_of[first:stop].tolist(), strict=True):
                start = int(starts[document] - first_tokens[number])
                span = number, start, start + int(lengths[document])
                writer.append_document(shards.read_span(*span), shards.read_mask(*span))
            entries.append(writer.finish())
        max_token_id = max(max_token_id, writer.max_token_id)
    write_index(
        folder,
        dtype=dtype,
        shards=entries,
        num_documents=len(numbers),
        max_token_id=max_token_id,
        tokenizer=tokenizer.info(),
    )


def _shard_borders(lengths: Sequence[int], sources: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the span of documents of each new shard, which ends at ``SHARD_TOKENS`` tokens or at another source."""
    first = num_tokens = 0
    for i, length in enumerate(lengths):
        if i > first and (num_tokens >= SHARD_TOKENS or sources[i] != sources[first]):
            yield first, i
            first, num_tokens = i, 0
        num_tokens += length
    yield first, len(lengths)


def write_tokens(folder: Path, blocks: Iterable[np.ndarray], *, tokenizer: Tokenizer) -> Index:
    """Write ``blocks`` of token ids, integers [T] each, as a data set of one shard, without documents.

    The blocks may cut documents, so that the last token need not be an eos.
    """
    dtype, num_documents = token_dtype(tokenizer.vocab_size), 0
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    with ShardWriter(folder / "shard-00000.bin", dtype=dtype) as writer:
        for tokens in blocks:
            num_documents += int((tokens == tokenizer.eos_id).sum())
            writer.append(tokens)
        entry = writer.finish()
    return write_index(
        folder,
        dtype=dtype,
        shards=[entry],
        num_documents=num_documents,
        max_token_id=writer.max_token_id,
        tokenizer=tokenizer.info(),
    )
