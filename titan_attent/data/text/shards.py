"""Token shards: one stream of tokens over many files, and the examples in it.

The shards of a data set (format.py), one after the other, are one stream in which every document ends with the eos id.
Example ``i`` is the window of ``seq_len + 1`` tokens at ``i * seq_len``: its inputs are the first ``seq_len`` of them,
its labels the last ``seq_len``. Windows cross documents and shards. The last tokens are left out if they do not fill a
window.

A shard holds one data source (web, code, ...). An example that crosses into another source belongs to the source of its
first token.

Cost: opening takes one stat per shard, which the ranks of a run share, and reads no token. Reading an example takes one
positioned read (files.py), with 2 or 4 bytes per token on disk and 8 in memory. The number of open files is bounded
(files.py). Any number of threads may read at once.
"""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from titan_attent.data.io.files import HASH_BLOCK, OpenFiles
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.text.format import WRITER, Index, ShardEntry, read_index, write_index

__all__ = ["Index", "ShardEntry", "TokenDataset", "TokenShards", "write_index"]


class TokenShards:
    """The token stream of a data set folder.

    Args:
        path: the folder.
        check_sizes: check the size of every shard. If false, the caller has to call :meth:`check_sizes`.

    Raises:
        ValueError: the folder, its index or a shard is missing, malformed, of another format,
            edited or truncated.
    """

    def __init__(self, path: str | os.PathLike[str], *, check_sizes: bool = True):
        self.path = Path(path)
        self.index: Index = read_index(self.path)
        self.num_tokens = self.index.num_tokens
        self.max_token_id = self.index.max_token_id
        self.fingerprint = self.index.fingerprint
        self.tokenizer_info = self.index.tokenizer
        self.dtype = np.dtype(self.index.dtype).newbyteorder("<")
        # Python integers, which cannot overflow.
        self._starts = [0, *accumulate(shard.num_tokens for shard in self.index.shards)]
        self._files = OpenFiles(self.path)
        if check_sizes:
            self.check_sizes()

    @property
    def num_shards(self) -> int:
        return len(self.index.shards)

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """Compare the sizes of ``shards``, numbers (all by default), with the index: one stat per shard.

        Ranks share the work with ``range(rank, num_shards, world_size)``.

        Raises:
            ValueError: a shard is missing, truncated or replaced; the message names the file.
        """
        for number in range(len(self.index.shards)) if shards is None else shards:
            self._check_size(self.index.shards[number])

    def _check_size(self, shard: ShardEntry) -> None:
        path, expected = self.path / shard.file, shard.num_tokens * self.dtype.itemsize
        fix = f"copy the data set again, or write it anew with {WRITER}"
        try:
            actual = path.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{path}: this shard of {INDEX_FILE} is missing; {fix}") from error
        if actual != expected:
            raise ValueError(
                f"{path}: has {actual} bytes but {INDEX_FILE} says {expected}: truncated or replaced; {fix}"
            )

    def shard_of(self, token_index: int) -> tuple[str, int]:
        """The shard file that holds a token, and its offset there, in tokens. IndexError if out of range."""
        if not 0 <= token_index < self.num_tokens:
            raise IndexError(f"{self.path}: token {token_index} is outside [0, {self.num_tokens})")
        shard = bisect_right(self._starts, token_index) - 1
        return self.index.shards[shard].file, token_index - self._starts[shard]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the stream, int64 [T]. IndexError if out of range."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.path}: tokens [{start}, {stop}) are outside [0, {self.num_tokens})")
        return self.read_windows([start], length=stop - start)[0]

    def read_windows(self, starts: Sequence[int], *, length: int) -> np.ndarray:
        """The ``length`` tokens from each of ``starts``, int64 [B, T]. The caller must check the bounds."""
        itemsize, width = self.dtype.itemsize, length * self.dtype.itemsize
        windows = np.empty((len(starts), length), dtype=self.dtype)
        # Viewed as bytes by numpy: memoryview cannot cast an empty array.
        buffer = windows.reshape(-1).view(np.uint8).data
        for row, start in enumerate(starts):
            first, last = row * width, (row + 1) * width
            shard = bisect_right(self._starts, start) - 1
            offset = (start - self._starts[shard]) * itemsize
            while first < last:
                remaining = (self._starts[shard + 1] - self._starts[shard]) * itemsize - offset
                stop = min(last, first + remaining)
                self._files.read_into(buffer[first:stop], name=self.index.shards[shard].file, offset=offset)
                first, shard, offset = stop, shard + 1, 0
        return windows.astype(np.int64)

    def locate(self, token: int) -> tuple[str, int]:
        """As :meth:`shard_of`, without the range check."""
        shard = bisect_right(self._starts, token) - 1
        return self.index.shards[shard].file, token - self._starts[shard]

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """Re-hash ``shards``, numbers (all by default), at about 1 GB/s.

        Ranks share the work with ``range(rank, num_shards, world_size)``.

        Raises:
            ValueError: a shard differs from the index; the message names the file.
        """
        numbers = range(len(self.index.shards)) if shards is None else shards
        entries = [self.index.shards[number] for number in numbers]
        num_bytes = sum(entry.num_tokens for entry in entries) * self.dtype.itemsize
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            for entry in entries:
                sha256 = hashlib.sha256()
                with open(self.path / entry.file, "rb") as file:
                    while block := file.read(HASH_BLOCK):
                        sha256.update(block)
                        bar.update(len(block))
                if sha256.hexdigest() != entry.sha256:
                    raise ValueError(
                        f"{self.path / entry.file}: its sha256 is {sha256.hexdigest()} but "
                        f"{INDEX_FILE} says {entry.sha256}: the shard is damaged; copy the data "
                        f"set again, or write it anew with {WRITER}"
                    )


class TokenDataset(Dataset):
    """Example id -> tokens: the :class:`~titan_attent.data.examples.Examples` of text. Picklable.

    Args:
        path_or_shards: a data set folder, or its open :class:`TokenShards`.
        seq_len: tokens per example, at least 1.

    Raises:
        ValueError: as for :class:`TokenShards`, or the data are too short for one example of ``seq_len``.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, path_or_shards: str | os.PathLike[str] | TokenShards, *, seq_len: int):
        if not isinstance(path_or_shards, TokenShards):
            path_or_shards = TokenShards(path_or_shards)
        self.shards = self.stored = path_or_shards
        self.seq_len = seq_len
        where = self.shards.path
        if seq_len < 1:
            raise ValueError(f"{where}: seq_len is {seq_len}; set it to 1 or more")
        self.num_examples = (self.shards.num_tokens - 1) // seq_len
        if self.num_examples == 0:
            raise ValueError(
                f"{where}: holds {self.shards.num_tokens} tokens, but one example of seq_len "
                f"{seq_len} needs {seq_len + 1}; lower seq_len, or write more data"
            )

    @property
    def tokens_per_example(self) -> int:
        return self.seq_len

    @property
    def chance_loss(self) -> float:
        """ln V, for a vocabulary of V tokens."""
        return math.log(self.shards.tokenizer_info["vocab_size"])

    @property
    def sources(self) -> list[tuple[str, int]]:
        """Spans of examples of one data source: its name and its first example id, ascending from 0.

        A source may have several spans, but adjacent spans have different sources. A source in which no example begins
        is left out. Computed from the index in O(shards). The sources of ids, int64 [B], are::

            names, firsts = zip(*dataset.sources)
            spans = torch.searchsorted(torch.tensor(firsts), ids, right=True) - 1  # [B], indices into names
        """
        spans: list[tuple[str, int]] = []
        start = 0
        for shard in self.shards.index.shards:
            first = -(-start // self.seq_len)  # the first example that begins in or after this shard
            if first >= self.num_examples:
                break
            if spans and spans[-1][1] == first:
                spans.pop()
            if not spans or spans[-1][0] != shard.source:
                spans.append((shard.source, first))
            start += shard.num_tokens
        return spans

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        """``({"input": [L], "example_id": []}, labels [L])``, int64. IndexError outside [0, N)."""
        ids = torch.tensor([i], dtype=torch.int64)
        inputs, labels = self.batch(ids)
        return {"input": inputs[0], "example_id": ids[0]}, labels[0]

    def location(self, i: int) -> dict[str, Any]:
        """The file of the first token of example i, the offset in it in tokens, and the number of tokens."""
        shard, first = self.shards.locate(i * self.seq_len)
        return {"shard": shard, "first_token": first, "num_tokens": self.seq_len + 1}

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        """:meth:`batch` in the form of the ``Examples`` interface; ``visit_key`` has no effect on text."""
        inputs, labels = self.batch(ids)
        return {"input": inputs}, labels

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The examples of ``ids``, int64 [B]: inputs and labels, both int64 [B, L] and contiguous.

        They share no memory, so that labels may be masked in place. IndexError if an id is outside [0, N).
        """
        numbers = ids.tolist()
        for i in numbers:
            if not 0 <= i < self.num_examples:
                raise IndexError(f"{self.shards.path}: example id {i} is outside [0, {self.num_examples})")
        starts = [i * self.seq_len for i in numbers]
        windows = torch.from_numpy(self.shards.read_windows(starts, length=self.seq_len + 1))
        # clone, not contiguous(): for B = 1, contiguous() would return views that share memory.
        dense = torch.contiguous_format
        return windows[:, :-1].clone(memory_format=dense), windows[:, 1:].clone(memory_format=dense)
