"""Checks that all ranks follow the same decision, by a hash of it in every exchange of losses.

Every rank decides by itself which examples are trained. Tensor, pipeline and context parallel peers decide from equal
copies of the loss buffer, the ranks of the ``batch`` mesh from sums that they share. A faulty device, other code or
other settings could make one rank decide differently. It would then train different examples as part of the same
batch, silently. So every exchange carries the hash of the current decision in one more column, and each rank compares
the hashes that it receives with its own.

Cost: 8 bytes per row of the exchange and rank; no collective of its own; no host sync before :meth:`Agreement.check`.
"""

import torch
from torch import Tensor

_NO_ROUND = -1

Decision = tuple[Tensor, int]
"""The hash of a decision, int64 [1], and its round."""


class Agreement:
    """The current decision, and the first round in which the hash of a peer differed.

    Args:
        device: the device of the exchanged tensors.
    """

    def __init__(self, device: torch.device):
        self.decision: Decision | None = None
        self._differed_in = torch.full((), _NO_ROUND, dtype=torch.int64, device=device)

    def announce(self, decision: int, *, round: int) -> None:
        """Compare ``decision``, a signed 64-bit hash, from now on. It copies to the device: do not call in a step."""
        self.decision = torch.tensor([decision], dtype=torch.int64, device=self._differed_in.device), round

    def columns(self, num_rows: int) -> list[Tensor]:
        """The columns to add to an exchange of ``num_rows`` rows: the hash, int64 [num_rows, 1]; none before the first
        decision."""
        return [] if self.decision is None else [self.decision[0].expand(num_rows, 1)]

    def compare(self, gathered: Tensor, decision: Decision | None) -> Tensor:
        """Remove the column of hashes, and note whether any differs from this rank's. No host sync.

        Args:
            gathered: int64 [ranks, rows, n + 1], or n columns without a decision.
            decision: this rank's decision when the exchange began.

        Returns:
            int64 [ranks, rows, n].
        """
        if decision is None:
            return gathered
        own, round = decision
        first = (gathered[:, :, -1] != own).any() & (self._differed_in == _NO_ROUND)
        self._differed_in = torch.where(first, round, self._differed_in)
        return gathered[:, :, :-1]

    def check(self) -> None:
        """Raise a RuntimeError that names the round if hashes differed. A host sync: do not call in a step."""
        differed_in = int(self._differed_in)
        if differed_in != _NO_ROUND:
            raise RuntimeError(
                f"the ranks decided differently in round {differed_in}: this rank's selection differs from that of its "
                "peers in the data, tensor, pipeline or context parallel mesh, so they train different examples as one "
                "batch. Resume from a checkpoint written before that round. If the error returns, look for ranks with "
                "other code, settings or data, or for a faulty device"
            )
