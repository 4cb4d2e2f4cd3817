"""Cuts a data set into two, rows for training and rows held out, as data sets of their own.

Both are taken in stretches of ``STRETCH`` examples that lie evenly over the data, so that whatever order it stands in
(sources one after the other, say) both are of its kind. The last label of a stretch is the first token of the next one:
one token in ``STRETCH`` examples.

Cost: one pass over what is copied, on one process.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.format import INDEX_FILE, Index, ShardWriter, token_dtype, write_index
from titan_attent.data.shards import TokenDataset
from titan_attent.data.tokenizer import Tokenizer

STRETCH = 16
"""Examples side by side."""
LEAST = 8
"""Stretches that a data set must have."""


def hold_out(dataset: TokenDataset, *, train: Path, held_out: Path, num_train: int, num_held_out: int) -> None:
    """Write at most ``num_train`` examples to ``train``, and at most ``num_held_out`` others, but no more than a tenth
    of all, to ``held_out``. What is there already stays.

    Raises:
        ValueError: there are too few examples.
        OSError: a folder cannot be written.
    """
    num = len(dataset) // STRETCH
    if num < LEAST:
        raise ValueError(
            f"{dataset.shards.path}: holds {len(dataset)} examples of {dataset.seq_len} tokens, fewer than the "
            f"{LEAST * STRETCH} that it takes to train on one part and hold out another"
        )
    apart = max(10, num * STRETCH // num_held_out)  # every so many stretches one is held out
    others = np.flatnonzero(np.arange(num) % apart)
    wanted = max(1, -(-num_train // STRETCH))
    taken = others[np.linspace(0, len(others) - 1, min(wanted, len(others))).astype(int)]
    for folder, stretches in ((train, taken), (held_out, np.arange(0, num, apart))):
        if not (folder / INDEX_FILE).is_file():
            _write(dataset, folder, stretches)


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
