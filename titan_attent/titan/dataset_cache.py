"""The data sets and scores of a run, each opened once per rank, and the reader threads that they share.

Cost: one file (the index) per data set and rank. No shard is opened here: preflight.check_files compares their sizes
once over all ranks, and a shard is opened when one of its examples is read.
"""

from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from titan_attent.data.images import ImageDataset
from titan_attent.data.io.reader import Reader
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.scores.stored import StoredScores


class DataSets:
    """Opens each folder at its first use and keeps it open."""

    def __init__(self) -> None:
        self._shards: dict[Path, TokenShards] = {}
        self._documents: dict[tuple[Path, int], DocumentDataset] = {}
        self._images: dict[tuple[Any, ...], ImageDataset] = {}
        self._scores: dict[Path, StoredScores] = {}
        self._readers: dict[int, Reader] = {}
        self._warnings: set[str] = set()

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

    def documents(self, path: str | Path, *, seq_len: int) -> DocumentDataset:
        """Its documents, in spans of at most ``seq_len`` tokens; ValueError if it does not know them.

        One object per folder and length, so that its table of spans is made once.
        """
        key = (Path(path), seq_len)
        if key not in self._documents:
            self._documents[key] = DocumentDataset(self.shards(path), seq_len=seq_len)
        return self._documents[key]

    def images(self, path: str | Path, **options: Any) -> ImageDataset:
        """The images in the folder ``path``, with the options of :class:`ImageDataset`, whose ValueErrors it raises."""
        key = (Path(path), *sorted(options.items()))
        if key not in self._images:
            self._images[key] = ImageDataset(path, **options)
        return self._images[key]

    def scores(self, path: str | Path) -> StoredScores:
        """The scores in the folder ``path``; ValueError as :class:`StoredScores`."""
        key = Path(path)
        if key not in self._scores:
            self._scores[key] = StoredScores(key)
        return self._scores[key]

    def check_scores(self, *, rank: int, num_ranks: int) -> None:
        """Check this rank's share of all opened scores; ValueError as :meth:`StoredScores.check_finite`."""
        for scores in self._scores.values():
            start, stop = (scores.num_examples * i // num_ranks for i in (rank, rank + 1))
            scores.check_finite(start, stop)

    def verify_scores(self) -> None:
        """Hash all opened scores again; ValueError as :meth:`StoredScores.verify_checksum`."""
        for scores in self._scores.values():
            scores.verify_checksum()

    def warn_once(self, message: str) -> None:
        """Log a warning about a data set, which may be opened several times."""
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning(message)

    def reader(self, num_workers: int) -> Reader:
        """The reader with ``num_workers`` threads; all callers share it."""
        return self._readers.setdefault(num_workers, Reader(num_workers))
