"""Cuts a data set into two, rows for training and rows held out, as data sets of their own.

Held out are a few long pieces that lie evenly over the data: whatever order it stands in (sources one after the other,
say), they are of its kind, and hardly a document is on both sides. A model that has seen the first half of a document
knows its names, and tells nothing of text that it has not seen. What is left for training is taken in stretches, evenly
too. The last label of a piece is the first token of what followed it: one token a piece.

Cost: one pass over what is copied, on one process.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.format import Index, ShardWriter, token_dtype, write_index
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import Tokenizer

STRETCH = 16
"""Examples side by side."""
PIECES = 8
"""Held out."""
MOST = 0.25
"""Share of a data set that is held out, at most."""
LEAST = 128
"""Examples that a data set must have."""


def hold_out(dataset: TokenDataset, *, train: Path, held_out: Path, num_train: int, num_held_out: int) -> None:
    """Write at most about ``num_train`` examples to ``train``, and at most about ``num_held_out`` others, but no more
    than a quarter of all, to ``held_out``. What is there already stays.

    Raises:
        ValueError: there are too few examples.
        OSError: a folder cannot be written.
    """
    if len(dataset) < LEAST:
        raise ValueError(
            f"{dataset.shards.path}: holds {len(dataset)} examples of {dataset.seq_len} tokens, fewer than the "
            f"{LEAST} that it takes to train on one part and hold out another"
        )
    num = len(dataset) // STRETCH
    stretches = np.arange(num)
    is_held_out = pieces(num, int(min(MOST * num, num_held_out / STRETCH)))
    others = stretches[~is_held_out]
    wanted = min(len(others), max(1, -(-num_train // STRETCH)))
    taken = others[np.linspace(0, len(others) - 1, wanted).astype(int)]
    for folder, chosen in ((train, taken), (held_out, stretches[is_held_out])):
        if not (folder / INDEX_FILE).is_file():
            _write(dataset, folder, chosen)


def pieces(num: int, wanted: int) -> np.ndarray:
    """bool [num], ``wanted`` of them and at least one True: the middles of ``PIECES`` equal parts."""
    wanted = max(1, wanted)
    parts = min(PIECES, wanted)
    edges, before = (np.linspace(0, total, parts + 1).astype(int) for total in (num, wanted))
    chosen = np.zeros(num, bool)
    for first, stop, size in zip(edges, edges[1:], np.diff(before), strict=False):
        start = (first + stop - size) // 2
        chosen[start : start + size] = True
    return chosen


def _write(dataset: TokenDataset, folder: Path, stretches: np.ndarray) -> None:
    shards, length = dataset.shards, STRETCH * dataset.seq_len

    def blocks() -> Iterator[np.ndarray]:
        for i, stretch in enumerate(stretches):
            last = i == len(stretches) - 1  # the label of the last example
            yield shards.read(int(stretch) * length, int(stretch + 1) * length + last)

    write_tokens(folder, blocks(), tokenizer=Tokenizer.from_info(shards.tokenizer_info, shards.path))


def write_tokens(folder: Path, blocks: Iterable[np.ndarray], *, tokenizer: Tokenizer) -> Index:
    """Write blocks of ids, integers [T], as a data set of one shard."""
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
