"""Exact match: the share of examples all of whose counted labels are the model's most likely tokens.

The tokens before a label are the right ones, as in training: it is the share of answers that greedy decoding would give
word for word. Ties go to the smallest id. An example without a counted label counts nowhere.

Cost per batch: one pass over the logits. With a vocabulary sharded by TP, one all-gather of 12 bytes per token; with
context parallelism, one all-reduce of 16 bytes per example.

Shapes: B rows, L tokens, V vocabulary, M examples per row, S sources.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_attent.losses.cross_entropy import IGNORE_INDEX

NAME, TOKENS = "exact_match", "token_accuracy"
"""The metrics: the share of examples, and that of counted labels."""


def most_likely(logits: Tensor) -> Tensor:
    """The id of the largest logit, int64 [B, L]; a collective where TP shards the vocabulary.

    Args:
        logits: [B, L, V], or a DTensor of one mesh dimension.
    """
    if not isinstance(logits, DTensor):
        return logits.argmax(dim=-1)
    mesh = logits.device_mesh
    if logits.placements[0] not in (Shard(-1), Shard(logits.ndim - 1)):
        return logits.full_tensor().argmax(dim=-1)
    values, columns = logits.to_local().max(dim=-1)
    # Shard splits as torch.chunk does: ceil(V / ranks) columns per rank, fewer on the last.
    columns = columns + mesh.get_local_rank() * -(-logits.shape[-1] // mesh.size())
    values_R, columns_R = (_gathered(x.contiguous(), mesh) for x in (values, columns))
    # argmax takes the first of equals: the rank with the smallest ids.
    return columns_R.gather(0, values_R.argmax(dim=0, keepdim=True))[0]


def _gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[...] of each rank of a mesh of one dimension -> [ranks, ...]."""
    of_ranks = [torch.empty_like(x) for _ in range(mesh.size())]
    torch.distributed.all_gather(of_ranks, x, group=mesh.get_group())
    return torch.stack(of_ranks)


class ExactMatch:
    """Counts matches in the batches of a validation.

    Args:
        sources: (name, first example id) of each span of examples of one data source, ascending from 0
            (``Examples.sources``).
        cp_mesh: the mesh that shards the tokens of an example, if there is one.
        device: of the batches.
    """

    def __init__(self, sources: Sequence[tuple[str, int]], *, cp_mesh: DeviceMesh | None, device: torch.device):
        self.names = sorted({name for name, _ in sources})
        self.cp_mesh = cp_mesh
        self._firsts = torch.tensor([first for _, first in sources], device=device)
        self._source = torch.tensor([self.names.index(name) for name, _ in sources], device=device)

    @property
    def num_counts(self) -> int:
        return 1 + 2 * len(self.names)

    def count(self, predicted: Tensor, labels: Tensor, ids: Tensor, example_index: Tensor | None) -> Tensor:
        """The counts of a batch; a collective over the ranks that share its examples.

        Args:
            predicted: int64 [B, L], the most likely tokens (:func:`most_likely`); this rank's under context
                parallelism, like the labels.
            labels: int64 [B, L], ``IGNORE_INDEX`` where a token does not count.
            ids: int64 [B], the example of each row, or [B, M], the examples of each row; N and above for none.
            example_index: int64 [B, L], in [0, M): the example of each token in its row; None for one per row.

        Returns:
            fp64 [1 + 2 S]: right tokens, the matching examples of each source, all examples of each source. Their sum
            over the ranks that have other tokens is the count of all.
        """
        counted = labels != IGNORE_INDEX
        right = counted & (predicted == labels)
        ids = ids.view(len(labels), -1)
        slots = torch.arange(len(labels), device=labels.device)[:, None] * ids.shape[1]
        slots = (slots + (0 if example_index is None else example_index)).expand_as(labels).flatten()
        per_example = torch.zeros(2, ids.numel(), dtype=torch.float64, device=labels.device)
        per_token = torch.stack((counted, counted & ~right)).flatten(1).double()
        per_example.scatter_add_(1, slots.expand(2, -1), per_token)
        counts_once = True
        if self.cp_mesh is not None:
            torch.distributed.all_reduce(per_example, group=self.cp_mesh.get_group())
            counts_once = self.cp_mesh.get_local_rank() == 0
        exists = per_example[0] > 0
        flags = torch.stack((exists & (per_example[1] == 0), exists)).double() * counts_once
        spans = torch.searchsorted(self._firsts, ids.flatten().contiguous(), right=True) - 1
        sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=labels.device)
        sums.scatter_add_(1, self._source[spans].expand(2, -1), flags)
        return torch.cat((right.sum().double()[None], sums.flatten()))

    def shares(self, counts: Sequence[float], *, num_labels: float) -> dict[str, float]:
        """The metrics by name, from the summed counts; with several sources also one per source."""
        right, num = counts[0], len(self.names)
        matching, existing = counts[1 : 1 + num], counts[1 + num :]
        shares = {NAME: _share(sum(matching), sum(existing)), TOKENS: _share(right, num_labels)}
        if num > 1:
            of_sources = zip(self.names, matching, existing, strict=True)
            shares |= {f"{NAME}/{name}": _share(a, b) for name, a, b in of_sources if b}
        return shares


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
