"""Reads tokens that are in segments of files of other tools, with other bytes between them (file_view.py).

Cost: one positioned read per span of tokens where the bytes between its segments are few, as the heads of MDS samples
are: these bytes are read, too, and dropped. The tables of the shards used last are kept in memory, ``MAX_TABLE_BYTES``
at most, so a span takes one more read, of a table, if its shard was not used lately.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from titan_attent.data.io.files import OpenFile, OpenFiles
from titan_attent.data.text.file_view import FIX, SEGMENT_DTYPE, segments_file
from titan_attent.data.text.format import ShardEntry

MAX_TABLE_BYTES = 2**28
"""Bytes of the tables that are kept in memory, beyond the last one."""
MAX_GAP = 4096
"""Bytes between segments that are read and dropped: a read of its own costs as much as several thousand bytes."""
MAX_BUFFERS = 512
"""Buffers of one call; the system takes 1,024."""
_RECENT = 16
"""Shards that one thread keeps at hand until it has read its spans."""


_Opened = tuple[str, OpenFile, Sequence[int], Sequence[int]]
"""A shard's file and its name, the first token of each segment and the number of tokens, the byte of each segment."""


class SegmentReader:
    """Reads spans of the shards of a data set. Any number of threads may read at once. Picklable.

    Args:
        files: the files of the data set's folder, with the tables.
        token_files: the files with the tokens.
        shards: of the data set.
        itemsize: bytes per token.
    """

    def __init__(self, files: OpenFiles, token_files: OpenFiles, shards: Sequence[ShardEntry], *, itemsize: int):
        self.files, self.token_files, self.shards, self.itemsize = files, token_files, shards, itemsize
        self._tables: OrderedDict[int, tuple[memoryview, memoryview]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _new_reader, (self.files, self.token_files, self.shards, self.itemsize)

    def read(self, flat: np.ndarray, spans: Iterable[tuple[int, int, int, int]]) -> list[int]:
        """Fill ``flat[slot : slot + length]`` for each span (shard, start, length, slot), one after the other.

        Args:
            flat: unsigned tokens, contiguous.
            spans: within their shards, and of at least one token.

        Returns:
            The last token of each span, as read, since a later span may overwrite it.

        Raises:
            ValueError: a table is damaged, or a file ends too early.
            OSError: a file is missing or cannot be read.
        """
        size, values, last = self.itemsize, flat.data, list[int]()
        buffer = flat.view(np.uint8).data
        dropped, read_scattered = memoryview(bytearray(MAX_GAP)), self.token_files.read_scattered
        opened: dict[int, _Opened] = {}
        for shard, start, length, slot in spans:
            known = opened.get(shard)
            if known is None:
                if len(opened) == _RECENT:
                    opened.clear()
                known = opened[shard] = self._open(shard)
            name, file, firsts, offsets = known
            number, stop, first = bisect_right(firsts, start) - 1, start + length, slot * size
            offset, end = offsets[number] + (start - firsts[number]) * size, firsts[number + 1]
            if stop <= end:
                read_scattered(file, name, (buffer[first : first + length * size],), offset, length * size)
                last.append(values[slot + length - 1])
                continue
            at, buffers = offset, list[memoryview]()
            while end < stop:
                behind = first + (end - start) * size
                buffers.append(buffer[first:behind])
                at += behind - first
                first, start, number = behind, end, number + 1
                place, end = offsets[number], firsts[number + 1]
                if place != at:
                    if at < place <= at + MAX_GAP and len(buffers) < MAX_BUFFERS:
                        buffers.append(dropped[: place - at])
                    else:
                        read_scattered(file, name, buffers, offset, at - offset)
                        offset, buffers = place, []
                    at = place
            behind = first + (stop - start) * size
            buffers.append(buffer[first:behind])
            read_scattered(file, name, buffers, offset, at + behind - first - offset)
            last.append(values[slot + length - 1])
        return last

    def _open(self, shard: int) -> _Opened:
        entry = self.shards[shard]
        file = self.token_files.open(entry.location)
        if entry.view is None or not entry.view.num_segments:
            offset = 0 if entry.view is None else entry.view.offset
            return entry.location, file, (0, entry.num_tokens), (offset,)
        return entry.location, file, *self._table(shard)

    def _table(self, shard: int) -> tuple[memoryview, memoryview]:
        """(first tokens and the end, bytes) of the segments; views of memory, whose items are Python integers."""
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        entry = self.shards[shard]
        view, name = entry.view, segments_file(entry.file)
        assert view is not None
        table = np.empty((view.num_segments, 2), dtype=SEGMENT_DTYPE)
        self.files.read_into(table.reshape(-1).view(np.uint8).data, name=name, offset=0)
        firsts, offsets = np.append(table[:, 0], np.uint64(entry.num_tokens)), np.ascontiguousarray(table[:, 1])
        rises = firsts[0] == 0 and np.all(firsts[1:] > firsts[:-1])
        last = view.file_bytes - np.diff(firsts) * np.uint64(self.itemsize) if rises else firsts[1:]
        if not rises or np.any(offsets > last):
            raise ValueError(f"{self.files.folder / name}: its segments do not lie in {view.path}: damaged; {FIX}")
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = firsts.data, offsets.data
                self._num_bytes += firsts.nbytes + offsets.nbytes
            while self._num_bytes > MAX_TABLE_BYTES and len(self._tables) > 1:
                _, unused = self._tables.popitem(last=False)
                self._num_bytes -= sum(part.nbytes for part in unused)
        return firsts.data, offsets.data


def _new_reader(files: OpenFiles, token_files: OpenFiles, shards: Sequence[ShardEntry], itemsize: int) -> SegmentReader:
    return SegmentReader(files, token_files, shards, itemsize=itemsize)
