"""Windows of tokens in which the labels that the gate has seen do not count (gate.py)."""

import os

from torch import Tensor

from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.losses.cross_entropy import IGNORE_INDEX


class RoutedWindows(TokenDataset):
    """A :class:`TokenDataset` whose first ``prefix`` - 1 labels of every window are ``IGNORE_INDEX``.

    Args:
        path_or_shards, seq_len: those of :class:`TokenDataset`.
        prefix: the number of tokens that decide the route, 1 to ``seq_len``.

    Raises:
        ValueError: a reason of :class:`TokenDataset`, or the prefix leaves no label.
    """

    def __init__(self, path_or_shards: str | os.PathLike[str] | TokenShards, *, seq_len: int, prefix: int):
        super().__init__(path_or_shards, seq_len=seq_len)
        if prefix > seq_len:
            raise ValueError(
                f"[mot] prefix = {prefix} is more than the {seq_len} tokens of a window: the route would have seen "
                "every label. Lower it, or raise seq_len"
            )
        self.prefix = prefix

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = super().batch(ids)
        labels[:, : self.prefix - 1] = IGNORE_INDEX
        return inputs, labels
