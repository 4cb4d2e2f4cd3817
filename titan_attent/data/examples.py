"""What a data set of any kind is to the rest: numbered examples, read by their ids.

Two kinds: windows of tokens (shards.py), images with what a model is asked about them (models/vision/examples.py).
"""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from titan_attent.data.io.reader import ReadBatch


class Stored(Protocol):
    """The shards of a data set on disk."""

    fingerprint: str
    """Of all that decides what the examples hold."""

    @property
    def num_shards(self) -> int: ...

    def check_sizes(self, shards: Iterable[int] | None = None) -> None:
        """Compare shards' sizes, given by number, with the index; ValueError that names the file."""

    def verify_checksums(self, shards: Iterable[int] | None = None, *, progress: bool = False) -> None:
        """Re-hash shards, given by number; ValueError that names the file."""


class Examples(Protocol):
    """Example id -> what a model takes, and what its answer is compared with. Picklable.

    Attributes:
        seq_len: the size of an example: tokens of a window, pixels of an image's side.
        columns: names of the tensors of a training batch that the model does not read. Of mixtures they are
            ``other_label`` and ``share``, which their loss takes, and ``other_id``, under which it is recorded, too.
    """

    seq_len: int
    columns: tuple[str, ...]

    @property
    def stored(self) -> Stored: ...

    @property
    def tokens_per_example(self) -> int:
        """What an example counts as, where throughput is told in tokens."""

    @property
    def chance_loss(self) -> float:
        """What a blind guess costs: ln V nats per token of V, ln C an image of C classes, the variance of pixels."""

    @property
    def sources(self) -> list[tuple[str, int]]:
        """Stretches of examples of one data source: its name and the first example id, from 0 on and rising."""

    def __len__(self) -> int: ...

    def location(self, i: int) -> dict[str, Any]:
        """For people: where example i stands, its shard file and its place in it."""

    def read(self, ids: Tensor, turn: tuple[int, ...] | None = None) -> ReadBatch:
        """A batch of the examples of ``ids``, int64 [B]; IndexError outside [0, N). From any thread.

        Args:
            turn: what tells two visits of an example apart, where it looks different each time; None for the one view
                of validation and scoring.
        """
