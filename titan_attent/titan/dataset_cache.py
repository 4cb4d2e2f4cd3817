"""The data sets of a run and its reference losses, each opened once a rank, and the reader threads that they share.

Cost: one file per data set and rank, its index. No shard is looked at: sizes are compared once over all ranks
(preflight.check_files), and a shard is opened when an example of it is read.
"""

from pathlib import Path
from typing import Any

from titan_attent.data.images import ImageDataset
from titan_attent.data.io.reader import Reader
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.scores.reference import ReferenceLosses


class DataSets:
    """Opens each folder when it is first asked for."""

    def __init__(self) -> None:
        self._shards: dict[Path, TokenShards] = {}
        self._images: dict[tuple[Any, ...], ImageDataset] = {}
        self._references: dict[Path, ReferenceLosses] = {}
        self._readers: dict[int, Reader] = {}

    def shards(self, path: str | Path) -> TokenShards:
        """The token stream in the folder ``path``; ValueError as :class:`TokenShards`, except that no shard is
        looked at."""
        key = Path(path)
        if key not in self._shards:
            self._shards[key] = TokenShards(key, check_sizes=False)
        return self._shards[key]

    def dataset(self, path: str | Path, *, seq_len: int) -> TokenDataset:
        """Its examples of ``seq_len`` tokens; ValueError if there is none."""
        return TokenDataset(self.shards(path), seq_len=seq_len)

    def images(self, path: str | Path, **how: Any) -> ImageDataset:
        """The images in the folder ``path``, seen as the arguments of :class:`ImageDataset` say; ValueError as it."""
        key = (Path(path), *sorted(how.items()))
        if key not in self._images:
            self._images[key] = ImageDataset(path, **how)
        return self._images[key]

    def reference(self, path: str | Path) -> ReferenceLosses:
        """The reference losses in the folder ``path``; ValueError as :class:`ReferenceLosses`."""
        key = Path(path)
        if key not in self._references:
            self._references[key] = ReferenceLosses(key)
        return self._references[key]

    def check_references(self, *, rank: int, num_ranks: int) -> None:
        """Read those that were opened, this rank its part; ValueError as :meth:`ReferenceLosses.check_finite`."""
        for reference in self._references.values():
            start, stop = (reference.num_examples * i // num_ranks for i in (rank, rank + 1))
            reference.check_finite(start, stop)

    def verify_references(self) -> None:
        """Re-hash those that were opened; ValueError as :meth:`ReferenceLosses.verify_checksum`."""
        for reference in self._references.values():
            reference.verify_checksum()

    def reader(self, num_workers: int) -> Reader:
        """The reader of so many threads; all who ask share it."""
        return self._readers.setdefault(num_workers, Reader(num_workers))
