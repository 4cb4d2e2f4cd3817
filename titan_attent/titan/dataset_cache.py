"""The data sets and reference losses of a run, each opened once per rank, and the reader threads that they share.

Cost: one file (the index) per data set and rank. No shard is opened here: preflight.check_files compares their sizes
once over all ranks, and a shard is opened when one of its examples is read.
"""

from pathlib import Path
from typing import Any

from titan_attent.data.images import ImageDataset
from titan_attent.data.io.reader import Reader
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.scores.reference import ReferenceLosses


class DataSets:
    """Opens each folder at its first use and keeps it open."""

    def __init__(self) -> None:
        self._shards: dict[Path, TokenShards] = {}
        self._images: dict[tuple[Any, ...], ImageDataset] = {}
        self._references: dict[Path, ReferenceLosses] = {}
        self._readers: dict[int, Reader] = {}

    def shards(self, path: str | Path) -> TokenShards:
        """The token stream in the folder ``path``; ValueError as :class:`TokenShards`, but shard sizes are not
        checked."""
        key = Path(path)
        if key not in self._shards:
            self._shards[key] = TokenShards(key, check_sizes=False)
        return self._shards[key]

    def dataset(self, path: str | Path, *, seq_len: int) -> TokenDataset:
        """The examples of ``seq_len`` tokens in the folder ``path``; ValueError if there is none."""
        return TokenDataset(self.shards(path), seq_len=seq_len)

    def images(self, path: str | Path, **options: Any) -> ImageDataset:
        """The images in the folder ``path``, with the options of :class:`ImageDataset`, whose ValueErrors it raises."""
        key = (Path(path), *sorted(options.items()))
        if key not in self._images:
            self._images[key] = ImageDataset(path, **options)
        return self._images[key]

    def reference(self, path: str | Path) -> ReferenceLosses:
        """The reference losses in the folder ``path``; ValueError as :class:`ReferenceLosses`."""
        key = Path(path)
        if key not in self._references:
            self._references[key] = ReferenceLosses(key)
        return self._references[key]

    def check_references(self, *, rank: int, num_ranks: int) -> None:
        """Check this rank's share of every opened reference; ValueError as :meth:`ReferenceLosses.check_finite`."""
        for reference in self._references.values():
            start, stop = (reference.num_examples * i // num_ranks for i in (rank, rank + 1))
            reference.check_finite(start, stop)

    def verify_references(self) -> None:
        """Hash every opened reference again; ValueError as :meth:`ReferenceLosses.verify_checksum`."""
        for reference in self._references.values():
            reference.verify_checksum()

    def reader(self, num_workers: int) -> Reader:
        """The reader with ``num_workers`` threads; all callers share it."""
        return self._readers.setdefault(num_workers, Reader(num_workers))
