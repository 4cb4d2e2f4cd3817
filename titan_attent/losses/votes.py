"""What a group of rows with one input and several random seeds answers: the majority's vote, and the worst inputs.

For each input: its loss, the mean over the valid tokens of its rows; the share of its rows that are answered right; and
whether the majority is right. An answer is all counted tokens of a row, each the most likely one. The answer of most
rows is elected; between as many of a right and of a wrong one, the wrong one. Where the right answer depends on the
seed, an answer that is right in some rows and wrong in others is two.

Over all inputs: the mean of the votes, and of losses and shares the worst 5% (the 95th percentile of the loss, the 5th
of the share; linear between inputs) and the worst.

Cost per batch: a comparison of the answers of the m rows of each input with each other, m L tokens per row. Per
validation: 32 bytes per input of all ranks, on every rank, and one all-gather of them.

Shapes: B rows of L tokens, m rows per input, G = B / m inputs.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.exact_match import NAME as EXACT_MATCH

VOTE = f"{EXACT_MATCH}_vote"
LOSS_P95, LOSS_WORST = "input_loss_p95", "input_loss_worst"
MATCH_P95, MATCH_WORST = "input_match_p95", "input_match_worst"
"""The metrics: share of inputs whose majority is right; loss, and share of right rows, of the worst inputs."""


def majority_is_right(predicted: Tensor, labels: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """The vote over each input's rows.

    Args:
        predicted: int64 [B, L], the most likely tokens.
        labels: int64 [B, L], ``IGNORE_INDEX`` where a token does not count.
        group_size: m; B is a multiple of it.

    Returns:
        (share of right rows, fp64 [G]; whether the vote is right, bool [G]).
    """
    counted = labels != IGNORE_INDEX
    answers = torch.where(counted, predicted, IGNORE_INDEX).view(-1, group_size, labels.shape[1])
    right_Gm = (~counted | (predicted == labels)).all(dim=1).view(-1, group_size)
    return right_Gm.sum(dim=1).double() / group_size, vote(right_Gm, answers)


def vote(right_Gm: Tensor, answers_GmL: Tensor) -> Tensor:
    """Whether the answer of most rows of an input is right: bool [G].

    Args:
        right_Gm: bool [G, m].
        answers_GmL: integers [G, m, L], equal where two rows answer alike.
    """
    same_Gmm = (answers_GmL[:, :, None] == answers_GmL[:, None]).all(dim=-1)
    num_Gm = (same_Gmm & (right_Gm[:, None] == right_Gm[:, :, None])).sum(dim=2)
    return (num_Gm * right_Gm).amax(dim=1) > (num_Gm * ~right_Gm).amax(dim=1)


class InputVotes:
    """The inputs of one validation at a time.

    Args:
        group_size: m, neighbouring rows with one input; every batch has whole groups.
        num_groups: groups that a rank reads in a validation, padding included; equal on all ranks.
        gather: the mesh whose ranks read other inputs; None for one rank.
        add_up: the mesh of a pipeline, of which one rank adds what it reads; None without.
        device: of the batches.
    """

    def __init__(
        self,
        *,
        group_size: int,
        num_groups: int,
        gather: DeviceMesh | None,
        add_up: DeviceMesh | None,
        device: torch.device,
    ):
        self.group_size, self._gather, self._add_up = group_size, gather, add_up
        # Columns: whether the input exists, its loss, its share of right rows, its vote.
        self._table = torch.zeros(num_groups, 4, dtype=torch.float64, device=device)
        self._filled = 0

    def add(self, predicted: Tensor, labels: Tensor, losses_B: Tensor, counts_B: Tensor) -> None:
        """Add a batch.

        Args:
            predicted, labels: as in :func:`majority_is_right`; an input without a counted label counts nowhere.
            losses_B: fp32 [B], mean nats over the valid tokens of a row.
            counts_B: fp32 [B], their number.
        """
        counts = counts_B.double().view(-1, self.group_size)
        nats = (losses_B.double().view(-1, self.group_size) * counts).sum(dim=1)
        counts_G = counts.sum(dim=1)
        share_G, vote_G = majority_is_right(predicted, labels, group_size=self.group_size)
        rows = torch.stack(((counts_G > 0).double(), nats / counts_G.clamp(min=1), share_G, vote_G.double()), dim=1)
        self._table[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def take(self) -> dict[str, float]:
        """The metrics by name, and begin anew. A collective."""
        if self._add_up is not None:
            dist.all_reduce(self._table, group=self._add_up.get_group())
        tables = [self._table]
        if self._gather is not None:
            tables = [torch.empty_like(self._table) for _ in range(self._gather.size())]
            dist.all_gather(tables, self._table, group=self._gather.get_group())
        inputs = torch.cat(tables).cpu().numpy()
        self._table.zero_()
        self._filled = 0
        return metrics_of(inputs[inputs[:, 0] > 0, 1:])


def metrics_of(inputs: np.ndarray) -> dict[str, float]:
    """fp64 [inputs, 3], the loss, the share of right rows and the vote of each -> the metrics; NaN without inputs."""
    names: Sequence[str] = (VOTE, LOSS_P95, LOSS_WORST, MATCH_P95, MATCH_WORST)
    if not len(inputs):
        return dict.fromkeys(names, float("nan"))
    losses, shares, votes = inputs.T
    values = (votes.mean(), np.percentile(losses, 95), losses.max(), np.percentile(shares, 5), shares.min())
    return {name: float(value) for name, value in zip(names, values, strict=True)}
