"""The table of a bigram scorer on disk, so that a run can score single tokens (systems/teaching/span_masks.py).

    DIR/table.bin     int32 little-endian: counts of pairs [min(V^2, 2^24)], of inputs [V], of labels [V] (bigram.py)
    DIR/table.json    the vocabulary V, the smoothing, the model, and the sha256 of table.bin; written last, and a
                      folder without it has no table

DIR is the folder of the scorer's losses (stored.py). Its reference.json names the same model.

Cost: at most 64 MiB + 8 V bytes on disk, and in the memory of every rank that loads it. A table is hashed when it is
written and when it is loaded.
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from titan_attent.data.io.atomic import write_atomically
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned
from titan_attent.scores.bigram import SMOOTHING, BigramModel, check_vocabulary, num_pairs

FORMAT = "titan_attent.bigram"
VERSION = 1
TABLE_FILE, TABLE_INFO_FILE = "table.bin", "table.json"
DTYPE = np.dtype("<i4")
AGAIN = (
    "run the `torchrun -m titan_attent.score pair` command of these scores again, which adds the tables; or write new "
    "scores with it"
)
FIX = f"copy the folder again, or delete {TABLE_INFO_FILE} in it and {AGAIN}"


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """The fields of table.json, beside format and version."""

    vocab_size: int
    smoothing: float
    checkpoint_sha256: str
    """Identity of the model, as in the scorer's reference.json: which examples it counted."""
    sha256: str
    """Hash of table.bin."""


def write_table(folder: Path, model: BigramModel, *, checkpoint_sha256: str) -> None:
    """Write the counts of ``model``, which are complete. OSError if they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [each.numpy().astype(DTYPE) for each in (model.pairs, model.inputs, model.labels)]
    data = np.concatenate(counts).tobytes()
    info = TableInfo(
        vocab_size=model.vocab_size,
        smoothing=SMOOTHING,
        checkpoint_sha256=checkpoint_sha256,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    write_atomically(folder / TABLE_FILE, data)
    write_atomically(folder / TABLE_INFO_FILE, encode_versioned(asdict(info), format=FORMAT, version=VERSION))


def has_table(folder: Path) -> bool:
    """Whether a folder of scores has a finished table."""
    return (folder / TABLE_INFO_FILE).is_file()


class StoredTable:
    """The finished table of one scorer. Opening it reads table.json alone.

    Attributes:
        info: the fields of table.json.

    Raises:
        ValueError: there is no table, or a file is malformed, of another format, or truncated.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        file, self._data = self.folder / TABLE_INFO_FILE, self.folder / TABLE_FILE
        if not has_table(self.folder):
            raise ValueError(f"{self.folder}: holds losses, but no table of the scorer ({TABLE_INFO_FILE}): {AGAIN}")
        content = read_versioned(file, format=FORMAT, versions=(VERSION,), fix=FIX)
        try:
            self.info = typed(TableInfo, content)
            check_vocabulary(self.info.vocab_size)
        except ValueError as error:
            raise ValueError(f"{file}: malformed ({error}); {FIX}") from error
        if self.info.smoothing != SMOOTHING:
            raise ValueError(
                f"{file}: its smoothing is {self.info.smoothing:g}, and this version of the package has {SMOOTHING:g}; "
                "write new scores with this version"
            )
        if not self._data.is_file():
            raise ValueError(f"{self._data}: this file is missing; {FIX}")
        actual, expected = self._data.stat().st_size, self._num_counts * DTYPE.itemsize
        if actual != expected:
            raise ValueError(f"{self._data}: has {actual} bytes instead of {expected}: truncated or replaced; {FIX}")

    @property
    def _num_counts(self) -> int:
        return num_pairs(self.info.vocab_size) + 2 * self.info.vocab_size

    def load(self) -> BigramModel:
        """The model, from table.bin.

        Raises:
            ValueError: the file is damaged, or its numbers are not the counts of one set of pairs.
        """
        counts = np.fromfile(self._data, dtype=DTYPE, count=self._num_counts)
        if (sha256 := hashlib.sha256(counts.data).hexdigest()) != self.info.sha256:
            raise ValueError(
                f"{self._data}: its sha256 is {sha256}, but {TABLE_INFO_FILE} says {self.info.sha256}: the file is "
                f"damaged; {FIX}"
            )
        model, size = BigramModel(self.info.vocab_size), self.info.vocab_size
        model.pairs, model.inputs, model.labels = torch.from_numpy(counts.astype(np.int32)).split(
            [len(model.pairs), size, size]
        )
        num_counted = {int(each.sum()) for each in (model.pairs, model.inputs, model.labels)}
        if counts.min() < 0 or len(num_counted) > 1:
            raise ValueError(
                f"{self._data}: holds negative counts, or sums of counts that differ: it was not written by this "
                f"package; {FIX}"
            )
        return model
