"""Splits a data set into two new ones: examples for training and held-out examples.

The held-out examples are a few long spans, spread evenly over the data. So they represent the data in any order (for
instance with sources one after the other), and few documents are in both data sets. Such documents would bias the
held-out loss: a model trained on the first half of a document knows its names. The training examples are taken in
blocks, also spread evenly. Where a span ends in a new data set, its last label is the first token of the next span: one
wrong label per span.

Cost: one pass over the copied tokens, in one process.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.format import Index, ShardWriter, token_dtype, write_index
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import Tokenizer

BLOCK_EXAMPLES = 16
"""Number of consecutive examples in a block, the unit of the split."""
NUM_SPANS = 8
"""Maximum number of held-out spans."""
MAX_HELD_OUT = 0.25
"""Maximum share of a data set that is held out."""
MIN_EXAMPLES = 128
"""Minimum number of examples of a data set."""


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

    write_tokens(folder, tokens_of_blocks(), tokenizer=Tokenizer.from_info(shards.tokenizer_info, shards.path))


def write_tokens(folder: Path, blocks: Iterable[np.ndarray], *, tokenizer: Tokenizer) -> Index:
    """Write ``blocks`` of token ids, integers [T] each, as a data set of one shard."""
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
