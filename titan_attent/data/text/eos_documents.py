"""Finds the documents of a finished shard by its eos ids, for data sets and interrupted runs of earlier versions.

The writer encodes the text of a special token as ordinary text, so every eos id ends a document. A document that
crosses into the next shard cannot be represented: the last token of a shard has to be an eos.

Cost: one read of the tokens, which are hashed at the same time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from titan_attent.data.io.files import HASH_BLOCK
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.document_files import END_DTYPE, MAX_SHARD_TOKENS, HashedFile, documents_file
from titan_attent.data.text.format import WRITER, ShardEntry


def check_last_token(folder: Path, shard: ShardEntry, *, dtype: np.dtype, eos_id: int) -> None:
    """ValueError if ``shard`` has too many tokens for ends of 32 bits, or if its last token is not an eos."""
    path = folder / shard.file
    if shard.num_tokens > MAX_SHARD_TOKENS:
        raise ValueError(
            f"{path}: has {shard.num_tokens} tokens, more than the {MAX_SHARD_TOKENS} of a shard with documents; write "
            f"the data set anew with {WRITER}, which writes smaller shards"
        )
    with open(path, "rb") as file:
        file.seek((shard.num_tokens - 1) * dtype.itemsize)
        last = int(np.frombuffer(file.read(dtype.itemsize), dtype=dtype)[0])
    if last != eos_id:
        raise ValueError(
            f"{path}: its last token is {last}, not the eos id {eos_id}: its last document continues in the next "
            f"shard, or was cut off, and a document must lie in one shard; write the data set anew with {WRITER}"
        )


def find_documents(
    folder: Path, shard: ShardEntry, *, dtype: np.dtype, eos_id: int, read: Callable[[int], object] = lambda size: None
) -> ShardEntry:
    """Write the file of the documents of ``shard``. Returns its entry with documents.

    Args:
        read: called with the number of bytes of every block that was read, for a progress bar.

    Raises:
        ValueError: as for :func:`check_last_token`, or the tokens are not those of the entry.
        OSError: the folder cannot be written.
    """
    check_last_token(folder, shard, dtype=dtype, eos_id=eos_id)
    path, sha256 = folder / shard.file, hashlib.sha256()
    num_tokens = num_documents = 0
    ends_file = HashedFile(folder / documents_file(shard.file))
    try:
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                sha256.update(block)
                tokens = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype=dtype)
                ends = np.flatnonzero(tokens == eos_id) + (num_tokens + 1)
                ends_file.write(ends.astype(END_DTYPE).data)
                num_tokens, num_documents = num_tokens + len(tokens), num_documents + len(ends)
                read(len(block))
        if (actual := sha256.hexdigest()) != shard.sha256:
            raise ValueError(
                f"{path}: its sha256 is {actual} but {INDEX_FILE} says {shard.sha256}: the shard is damaged; copy the "
                f"data set again, or write it anew with {WRITER}"
            )
        return replace(shard, num_documents=num_documents, documents_sha256=ends_file.finish())
    finally:
        ends_file.discard()
