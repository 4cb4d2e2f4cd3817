"""Token shards: one stream of tokens over many files, and the examples in it.

The shards of a data set (format.py), one after the other, are one stream in which every document ends with the eos id.
Example ``i`` is the window of ``seq_len + 1`` tokens at ``i * seq_len``: its inputs are the first ``seq_len`` of them,
its labels the last ``seq_len``. Windows cross documents and shards. The last tokens are left out if they do not fill a
window.

A shard holds one data source (web, code, ...). An example that crosses into another source belongs to the source of its
first token.

A data set of version 3 knows its documents: where each ends in its shard, and how many have each length. It may have a
mask, which says which tokens count as labels (document_files.py).

Cost: opening takes one stat per file of a shard, which the ranks of a run share, and reads no token. Reading an example
takes one positioned read (files.py), with 2 or 4 bytes per token on disk and 8 in memory. The number of open files is
limited (files.py). Any number of threads may read at once. Shards of an adopted data set are views of files of other
tools (file_view.py, segments.py), and are read the same way.
"""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from titan_attent.data.examples import ScoredData, spans_of_sources
from titan_attent.data.io.files import OpenFiles, hash_file
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.text.document_files import (
    END_DTYPE,
    LENGTHS_FILE,
    check_ends,
    decode_lengths,
    documents_file,
    mask_bytes,
    mask_file,
    max_lengths_bytes,
)
from titan_attent.data.text.format import (
    UPGRADE,
    WRITER,
    Index,
    ShardEntry,
    documents_fingerprint,
    read_index,
    write_index,
)
from titan_attent.data.text.segments import SegmentReader

__all__ = ["Index", "ShardEntry", "TokenDataset", "TokenShards", "write_index"]


_FIX = f"copy the data set again, or write it anew with {WRITER}"


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
        self.dtype = self.index.token_dtype
        # Python integers, which cannot overflow.
        self._starts = [0, *accumulate(shard.num_tokens for shard in self.index.shards)]
        self._files = OpenFiles(self.path)
        # Of an adopted data set, the tokens are elsewhere.
        self.root = self.path if self.index.root is None else self.path / self.index.root
        self._token_files = self._files if self.index.root is None else OpenFiles(self.root)
        views = [shard.view for shard in self.index.shards]
        self._locations = [shard.location for shard in self.index.shards]
        self._offsets = [view.offset if view is not None else 0 for view in views]
        self._segments: SegmentReader | None = None
        if any(view is not None and view.num_segments for view in views):
            shards, itemsize = self.index.shards, self.dtype.itemsize
            self._segments = SegmentReader(self._files, self._token_files, shards, itemsize=itemsize)
        if check_sizes:
            self.check_sizes()

    @property
    def num_shards(self) -> int:
        return len(self.index.shards)

    @property
    def has_documents(self) -> bool:
        """Whether the data set knows its documents: format version 3."""
        return self.index.has_documents

    @property
    def has_mask(self) -> bool:
        """Whether some tokens do not count as labels."""
        return self.index.has_mask

    @property
    def documents_fingerprint(self) -> str:
        """sha256 (hex) of the token stream, its documents and their mask. ValueError without documents.

        ``fingerprint`` covers the token stream alone, so it does not change when documents are added to a data set.
        """
        self._require_documents()
        return documents_fingerprint(self.index)

    def _require_documents(self) -> None:
        if not self.has_documents:
            raise ValueError(
                f"{self.path}: this data set was written without its documents, by an earlier version or by hand; add "
                f"them with `{UPGRADE} {self.path}`"
            )

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """Compare file sizes with the index, for the shards with these numbers (all by default): one stat per file.

        Ranks share the work with ``range(rank, num_shards, world_size)``. The lengths are checked with shard 0.

        Raises:
            ValueError: a file is missing, truncated or replaced; the message names it.
        """
        for number in range(len(self.index.shards)) if shards is None else shards:
            if (view := self.index.shards[number].view) is not None:
                view.check_unchanged(self.root)
            for name, num_bytes, _ in self.index.shards[number].files(self.dtype.itemsize):
                if (actual := self._size(name)) != num_bytes:
                    raise ValueError(
                        f"{self.path / name}: has {actual} bytes but {INDEX_FILE} says {num_bytes}: truncated or "
                        f"replaced; {_FIX}"
                    )
            if number == 0 and self.index.lengths is not None:
                self._check_lengths_size(self.index.lengths.file)

    def _size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{self.path / name}: this file of {INDEX_FILE} is missing; {_FIX}") from error

    def _check_lengths_size(self, name: str) -> None:
        max_bytes = max_lengths_bytes(self.num_tokens)
        if not 0 < (actual := self._size(name)) <= max_bytes:
            raise ValueError(
                f"{self.path / name}: has {actual} bytes, but the lengths of documents with {self.num_tokens} tokens "
                f"take 1 to {max_bytes} bytes: truncated or replaced; {_FIX}"
            )

    def shard_of(self, token_index: int) -> tuple[str, int]:
        """The shard file that holds a token, and its offset there, in tokens. IndexError if out of range."""
        if not 0 <= token_index < self.num_tokens:
            raise IndexError(f"{self.path}: token {token_index} is outside [0, {self.num_tokens})")
        return self.locate(token_index)

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
        if self._segments is not None:
            spans = self._spans_of_windows(starts, length)
            self._segments.read(windows.reshape(-1).view(f"<u{itemsize}"), spans)
            return windows.astype(np.int64)
        for row, start in enumerate(starts):
            first, last = row * width, (row + 1) * width
            shard = bisect_right(self._starts, start) - 1
            offset = (start - self._starts[shard]) * itemsize
            while first < last:
                remaining = (self._starts[shard + 1] - self._starts[shard]) * itemsize - offset
                stop = min(last, first + remaining)
                at = self._offsets[shard] + offset
                self._token_files.read_into(buffer[first:stop], name=self._locations[shard], offset=at)
                first, shard, offset = stop, shard + 1, 0
        return windows.astype(np.int64)

    def _spans_of_windows(self, starts: Sequence[int], length: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, first token, number of tokens, slot) of the spans of windows of ``length`` tokens, row after row."""
        ends, slot = self._starts, 0
        for start in starts:
            stop, shard = start + length, bisect_right(ends, start) - 1
            while stop > ends[shard + 1]:
                num_tokens = ends[shard + 1] - start
                if num_tokens:
                    yield shard, start - ends[shard], num_tokens, slot
                start, slot, shard = start + num_tokens, slot + num_tokens, shard + 1
            if start < stop:
                yield shard, start - ends[shard], stop - start, slot
            slot += stop - start

    def locate(self, token: int) -> tuple[str, int]:
        """The same as :meth:`shard_of`, without the range check."""
        shard = bisect_right(self._starts, token) - 1
        return self.location(shard, token - self._starts[shard])

    def location(self, shard: int, token: int) -> tuple[str, int]:
        """The file of a token of a shard, and the token's place in the file, in tokens."""
        view = self.index.shards[shard].view
        return self._locations[shard], token + (0 if view is None else view.first_token)

    def read_span(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of a shard, given by its number, int64 [T]: one positioned read.

        IndexError if out of range.
        """
        entry = self.index.shards[shard]
        self._check_range(entry, "tokens", start, stop, entry.num_tokens)
        return self.read_windows([self._starts[shard] + start], length=stop - start)[0]

    def read_spans(
        self, shards: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, slots: np.ndarray
    ) -> np.ndarray:
        """Read spans of shards into ``tokens``, one positioned read each. The caller must check the bounds.

        Args:
            shards, starts, lengths: int64 [n], numbers of the shards, and first tokens and lengths of the spans.
            tokens: the tokens, contiguous, of the dtype on disk.
            slots: int64 [n], where each span begins in the flat ``tokens``. A span overwrites earlier ones.

        Returns:
            The last token of each span, [n].
        """
        flat = tokens.reshape(-1)
        numbers = shards.tolist()
        columns = starts * self.dtype.itemsize, slots, slots + lengths
        names = [self._locations[number] for number in numbers]
        unsigned = f"<u{self.dtype.itemsize}"
        if self._segments is not None:
            spans = zip(numbers, *(column.tolist() for column in (starts, lengths, slots)), strict=True)
            return np.array(self._segments.read(flat.view(unsigned), spans), dtype=unsigned).view(self.dtype)
        offsets, *places = (column.tolist() for column in columns)
        if self.index.root is not None:
            offsets = [offset + self._offsets[number] for offset, number in zip(offsets, numbers, strict=True)]
        parts = zip(names, offsets, *places, strict=True)
        return np.array(self._token_files.read_parts(flat.view(unsigned), parts), dtype=unsigned).view(self.dtype)

    def read_mask(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Whether the tokens [start, stop) of a shard count as labels, bool [T]; all do if there is no mask.

        IndexError if out of range.
        """
        entry = self.index.shards[shard]
        self._check_range(entry, "tokens", start, stop, entry.num_tokens)
        if not entry.mask_sha256:
            return np.ones(stop - start, dtype=bool)
        first = start // 8
        data = self._read(mask_file(entry.file), first, mask_bytes(stop), np.dtype(np.uint8))
        return np.unpackbits(data, bitorder="little")[start - 8 * first : stop - 8 * first].astype(bool)

    def num_documents_of(self, shard: int) -> int:
        """Number of documents of a shard, given by its number. ValueError without documents."""
        self._require_documents()
        return self.index.shards[shard].num_documents

    def document_ends(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The ends of the documents [start, stop) of a shard, int64 [N]: one positioned read.

        An end is exclusive, and counts tokens from the start of the shard. So document ``i`` of the shard is the tokens
        [end of ``i - 1``, or 0; end of ``i``), and its last token is the eos id.

        Raises:
            IndexError: ``start`` or ``stop`` is out of range.
            ValueError: the data set does not know its documents, or the ends do not rise.
        """
        entry, num_documents = self.index.shards[shard], self.num_documents_of(shard)
        self._check_range(entry, "documents", start, stop, num_documents)
        name = documents_file(entry.file)
        ends = self._read(name, start, stop, END_DTYPE).astype(np.int64)
        counts = {"num_documents": num_documents, "num_tokens": entry.num_tokens}
        check_ends(ends, path=self.path / name, start=start, **counts)
        return ends

    def length_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct lengths of documents, in tokens with the eos, and the number of documents of each length.

        Both are int64 [n]; the lengths rise. Reads all of ``lengths.bin``, 16 bytes per length.

        Raises:
            ValueError: the data set does not know its documents, or the file is missing or damaged.
        """
        self._require_documents()
        assert self.index.lengths is not None
        path = self.path / self.index.lengths.file
        self._check_lengths_size(path.name)
        content = path.read_bytes()
        _check_sha256(path, hashlib.sha256(content).hexdigest(), self.index.lengths.sha256)
        counts = {"num_tokens": self.num_tokens, "num_documents": self.index.num_documents}
        return decode_lengths(content, path=path, **counts)

    def _check_range(self, entry: ShardEntry, unit: str, start: int, stop: int, size: int) -> None:
        if not 0 <= start <= stop <= size:
            raise IndexError(f"{self.root / entry.location}: {unit} [{start}, {stop}) are outside [0, {size})")

    def _read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """The numbers [start, stop) of a file of numbers of ``dtype``."""
        numbers = np.empty(stop - start, dtype=dtype)
        self._files.read_into(numbers.view(np.uint8).data, name=name, offset=start * dtype.itemsize)
        return numbers

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """Re-hash the files of the shards with these numbers (all by default), at about 1 GB/s.

        Ranks share the work with ``range(rank, num_shards, world_size)``. The lengths are hashed with shard 0.

        Raises:
            ValueError: a file differs from the index; the message names it.
        """
        numbers = list(range(len(self.index.shards)) if shards is None else shards)
        entries = [self.index.shards[number] for number in numbers]
        itemsize = self.dtype.itemsize
        # Path, first byte, bytes (None: all of the file, also what the index does not know) and sha256.
        files: list[tuple[Path, int, int | None, str]] = [
            (self.path / name, 0, None, sha256) for entry in entries for name, _, sha256 in entry.files(itemsize)
        ]
        views = [(entry.view, entry.sha256) for entry in entries if entry.view is not None]
        files += [(self.root / view.path, view.offset, view.num_bytes, sha256) for view, sha256 in views]
        num_bytes = sum(size for entry in entries for _, size, _ in entry.files(itemsize))
        num_bytes += sum(view.num_bytes for view, _ in views)
        if 0 in numbers and (lengths := self.index.lengths) is not None:
            files.append((self.path / lengths.file, 0, None, lengths.sha256))
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            for path, offset, size, expected in files:
                _check_sha256(path, hash_file(path, offset=offset, num_bytes=size, read=bar.update), expected)


def _check_sha256(path: Path, actual: str, expected: str) -> None:
    if actual != expected:
        damaged = "file" if path.name == LENGTHS_FILE else "shard"
        raise ValueError(
            f"{path}: its sha256 is {actual} but {INDEX_FILE} says {expected}: the {damaged} is damaged; {_FIX}"
        )


class TokenDataset(Dataset):
    """Example id -> tokens: the :class:`~titan_attent.data.examples.Examples` of text. Picklable.

    Args:
        path_or_shards: a data set folder, or its open :class:`TokenShards`.
        seq_len: tokens per example, at least 1.

    Raises:
        ValueError: a reason of :class:`TokenShards`, or the data are too short for one example of ``seq_len``.
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
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def scored(self) -> ScoredData:
        return ScoredData(self.shards.fingerprint, self.seq_len, self.num_examples)

    @property
    def chance_loss(self) -> float:
        """ln V, for a vocabulary of V tokens."""
        return math.log(self.shards.tokenizer_info["vocab_size"])

    @property
    def sources(self) -> list[tuple[str, int]]:
        """(source name, first example id) of each span of examples of one data source, ascending from 0.

        A source may have several spans, but adjacent spans have different sources. A source in which no example begins
        is left out. Computed from the index in O(shards). The sources of ids, int64 [B], are::

            names, firsts = zip(*dataset.sources)
            spans = torch.searchsorted(torch.tensor(firsts), ids, right=True) - 1  # [B], indices into names
        """
        shards = self.shards.index.shards
        starts = accumulate((shard.num_tokens for shard in shards), initial=0)  # and the end
        firsts = [(shard.source, -(-start // self.seq_len)) for shard, start in zip(shards, starts, strict=False)]
        return spans_of_sources(firsts, num_examples=self.num_examples)

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
