"""Writes the result as a DCP checkpoint: files of archives, and ``.metadata``, as torch.distributed.checkpoint does.

The cut into files depends on the weights alone, and each file is written by one process, in order. So the bytes of all
files, ``.metadata`` included, are the same from any number of processes. Each file is written past the page cache
(uncached.py), fsynced, read back from the disk and compared by its hash, XXH3: a SHA-256 would take as long as all of
the rest. Four things go on at the same time, in threads: a box is written, the next one is computed, those after it are
read (read_ahead.py), and the file before is read back.

torch's own writer is not used: it keeps every tensor of a file in memory until the file is complete.

Cost: the bytes of the result, written, and read once; about 1 KB per box; 16 MB per process beside the boxes, of which
one more is held than is computed, and two of each operand and :data:`BOXES_AHEAD` more.
"""

import io
import math
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_attent.data.io.files import HASH_BLOCK
from titan_attent.edit.boxes import Box, boxes, offsets, sizes
from titan_attent.edit.checkpoint import Weight
from titan_attent.edit.combine import Combination
from titan_attent.edit.read_ahead import ReadAhead
from titan_attent.edit.storage import Folder, sync
from titan_attent.edit.uncached import forget

MIN_FILE_BYTES = 2**27
"""Bytes of a file, at least, before the next tensor begins another one."""
BOXES_AHEAD = 12
"""Boxes that are read ahead, of all operands together, beside the next one that is computed."""
MAX_FILES = 128
"""Approximate number of files of a large checkpoint, and so of processes that can share it."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of the result.

    Attributes:
        places: of every box in it: the name, the box, the archive's first byte and its length.
        num_bytes: of the file.
        xxh3: the XXH3-128 of the file.
    """

    name: str
    places: tuple[tuple[str, Box, int, int], ...]
    num_bytes: int
    xxh3: str


def files_of(weights: Mapping[str, Weight]) -> list[tuple[str, list[str]]]:
    """The files of a checkpoint, each with the names of its weights in order."""
    file_bytes = max(MIN_FILE_BYTES, sum(map(num_bytes, weights.values())) // MAX_FILES)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, weight in weights.items():
        if filled >= file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes(weight)
    return [(f"__{number}_0{DEFAULT_SUFFIX}", names) for number, names in enumerate(groups)]


def num_bytes(weight: Weight) -> int:
    """The bytes of a weight."""
    return math.prod(weight.shape) * weight.dtype.itemsize


def write_files(
    combination: Combination, folder: Folder, *, processes: int, progress: Callable[[int], object]
) -> list[WrittenFile]:
    """Compute and write all files of the result but ``.metadata``, in order.

    Args:
        processes: number of processes; 1 for this one.
        progress: called with the number of bytes of each finished file.

    Raises:
        ValueError: an operand is damaged, a number is not finite, a file differs when it is read back, or a process
            was killed.
    """
    files = files_of(combination.weights)
    if min(processes, len(files)) == 1:
        return _write_here(combination, folder, files, progress)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(processes, len(files)), context, initializer=_start, initargs=(combination, folder))
    with pool:
        pending = [pool.submit(_write_in_process, *file) for file in files]
        try:
            for done in as_completed(pending):
                progress(done.result().num_bytes)
        except BrokenProcessPool:
            raise ValueError("a process that wrote was killed; is there too little memory? Start it again") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [one.result() for one in pending]


def _write_here(
    combination: Combination,
    folder: Folder,
    files: Sequence[tuple[str, list[str]]],
    progress: Callable[[int], object],
) -> list[WrittenFile]:
    written: list[WrittenFile] = []
    with ThreadPoolExecutor(1) as verifier:
        verified: Future[None] | None = None
        for file in files:
            written.append(_write_file(combination, folder, *file))
            if verified is not None:
                verified.result()
                progress(written[-2].num_bytes)
            verified = verifier.submit(_verify, folder, written[-1])
        if verified is not None:
            verified.result()
            progress(written[-1].num_bytes)
    return written


_work: tuple[Combination, Folder] | None = None


def _start(combination: Combination, folder: Folder) -> None:
    global _work
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = combination, folder


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_in_process(name: str, weights: Sequence[str]) -> WrittenFile:
    assert _work is not None
    written = _write_file(*_work, name, weights)
    _verify(_work[1], written)
    return written


def _write_file(combination: Combination, folder: Folder, file: str, weights: Sequence[str]) -> WrittenFile:
    places = []
    with folder.create(file) as raw:
        stream = _Hashing(raw)
        for name, box, values in _computed(combination, weights):
            start = stream.tell()
            _save(values, stream)
            places.append((name, box, start, stream.tell() - start))
    return WrittenFile(file, tuple(places), stream.tell(), stream.digest.hexdigest())


def _save(values: torch.Tensor, stream: io.RawIOBase) -> None:
    """``torch.save``; of what ends it, an error of the stream or Ctrl-C, it would raise a consequence."""
    try:
        torch.save(values, cast(Any, stream))
    except RuntimeError as error:
        raise error.__context__ or error from None


def _computed(combination: Combination, weights: Sequence[str]) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """The boxes of some weights in order, each computed while the one before it is used."""
    places = [(name, box) for name in weights for box in boxes(combination.weights[name].shape)]
    with ExitStack() as stack:
        # The readers end first: after an error, what is being computed ends at its next read.
        computer = stack.enter_context(ThreadPoolExecutor(1))
        readers = {path: stack.enter_context(ReadAhead(one)) for path, one in combination.operands.items()}
        combination = replace(combination, operands=readers)
        ahead = BOXES_AHEAD // len(readers)
        before: tuple[str, Box, Future[torch.Tensor]] | None = None
        for number, (name, box) in enumerate(places):
            for following in places[number + ahead if number else 0 : number + ahead + 1]:
                for path in combination.needed(following[0]):
                    readers[path].announce(*following)
            computed = computer.submit(combination.read, name, box)
            if before is not None:
                yield *before[:2], before[2].result()
                if before[0] != name:
                    computer.submit(combination.forget)
            before = name, box, computed
        if before is not None:
            yield *before[:2], before[2].result()
        computer.submit(combination.forget).result()  # after all that was submitted


def _verify(folder: Folder, written: WrittenFile) -> None:
    """Wait until a file is on the disk, and read it back; ValueError if it is not what was written."""
    if _hash(folder, written.name) != written.xxh3:
        raise ValueError(f"{folder.join(written.name)} is not what was written when it is read back: check the disk")


class _Hashing(io.RawIOBase):
    """Writes to a stream, and hashes what is written."""

    def __init__(self, stream: io.IOBase):
        self._stream, self._at, self.digest = stream, 0, xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        self._stream.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at


def _hash(folder: Folder, file: str) -> str:
    """The XXH3-128 of a file, read from the disk where the system lets us drop it from its cache."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(HASH_BLOCK))
    with folder.open(file) as stream:
        sync(stream)
        forget(stream)
        while count := stream.readinto(block):  # type: ignore[attr-defined]
            digest.update(block[:count])
        forget(stream)
    return digest.hexdigest()


def metadata_of(weights: Mapping[str, Weight], files: Sequence[WrittenFile]) -> bytes:
    """The content of ``.metadata``; the id of the save is a hash of the files, so that equal results are equal."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in weights}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    own = {name: name for name in weights}  # pickle writes one object once: names must not be copies of processes
    for file, name, box, start, length in _places(files):
        name = own[name]
        index = MetadataIndex(name, offsets(box), len(chunks[name]))
        chunks[name].append(ChunkStorageMetadata(torch.Size(offsets(box)), torch.Size(sizes(box))))
        storage[index] = _StorageInfo(file, start, length)
    entries: dict[str, Any] = {
        name: TensorStorageMetadata(TensorProperties(dtype=weight.dtype), torch.Size(weight.shape), chunks[name])
        for name, weight in weights.items()
    }
    identity = xxhash.xxh3_128("".join(file.xxh3 for file in files).encode()).hexdigest()
    metadata = Metadata(
        state_dict_metadata=entries,
        planner_data={name: (name,) for name in weights},
        storage_data=storage,
        storage_meta=StorageMeta(save_id=identity),
        version=CURRENT_DCP_VERSION,
    )
    return pickle.dumps(metadata)


def _places(files: Sequence[WrittenFile]) -> Iterator[tuple[str, str, Box, int, int]]:
    for file in files:
        for name, box, start, length in file.places:
            yield file.name, name, box, start, length
