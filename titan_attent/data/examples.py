"""The interface of a data set of any modality: numbered examples, read by their ids.

Implemented for text by windows of tokens (text/shards.py) and by spans of documents (text/document_examples.py), and
for images with their labels by models/vision/examples.py.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from titan_attent.data.io.reader import ReadBatch


class Stored(Protocol):
    """The shards of a data set on disk."""

    fingerprint: str
    """Hash of all that determines the content of the examples."""

    @property
    def num_shards(self) -> int: ...

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """Compare the sizes of ``shards``, numbers, with the index. ValueError names a file that differs."""

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """Re-hash ``shards``, numbers. ValueError names a file that differs from the index."""


class ScoredData(NamedTuple):
    """The facts that must be equal for a folder of scores and the examples of a run.

    Attributes:
        data_fingerprint: fingerprint of the data set.
        seq_len: tokens of an example, the side of an image; 0 where whole documents are scored, for any length.
        num_examples: the number of scores.
    """

    data_fingerprint: str
    seq_len: int
    num_examples: int


class Examples(Protocol):
    """Example id -> the inputs of the model and the labels of its loss. Picklable.

    Attributes:
        seq_len: the size of an example: tokens per window, or pixels per image side.
        columns: names of the tensors of a training batch that the model does not read. Mixed images have
            ``other_label`` and ``share``, which their loss reads, and ``other_id``, the id of the second image, whose
            loss is recorded, too.
    """

    seq_len: int
    columns: tuple[str, ...]

    @property
    def stored(self) -> Stored: ...

    @property
    def tokens_per_example(self) -> int:
        """Number of tokens that an example counts as in throughput."""

    @property
    def num_rows(self) -> int:
        """Number of rows that all examples fill: one per example, or fewer if several are packed into a row."""

    @property
    def scored(self) -> ScoredData:
        """The facts of the data that scores on disk record."""

    @property
    def chance_loss(self) -> float:
        """The loss of a blind guess: ln V per token, ln C per image of C classes, or the variance of the pixels."""

    @property
    def sources(self) -> list[tuple[str, int]]:
        """(source name, first example id) of each span of examples of one data source, ascending from 0."""

    def __len__(self) -> int: ...

    def location(self, i: int) -> dict[str, Any]:
        """The shard file of example i and its position in the file, for messages and reports."""

    def read(self, ids: Tensor, visit_key: tuple[int, ...] | None = None) -> ReadBatch:
        """A batch of the examples of ``ids``, int64 [B]. Callable from any thread. IndexError outside [0, N).

        Args:
            visit_key: integers that identify one visit of the examples in training; augmentation depends on them. None
                for the fixed view of validation and scoring.
        """


def spans_of_sources(shards: Iterable[tuple[str, int]], *, num_examples: int) -> list[tuple[str, int]]:
    """The ``sources`` of examples in shards; cost O(shards).

    Args:
        shards: (source name, first example id that begins in or after the shard) of each shard, ascending.
        num_examples: N. A source in which no example begins is left out, and adjacent spans of one source are joined.
    """
    spans: list[tuple[str, int]] = []
    for source, first in shards:
        if first >= num_examples:
            break
        if spans and spans[-1][1] == first:
            spans.pop()
        if not spans or spans[-1][0] != source:
            spans.append((source, first))
    return spans
