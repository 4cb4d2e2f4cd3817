"""Agreement: do all ranks follow the same decision? A hash of it rides on the exchange of losses.

Tensor, pipeline and context parallel peers hold equal copies of the loss buffer and decide on their own; so do the
ranks of the ``batch`` mesh, from sums that they share. If one of them ever decided otherwise (because of a faulty
device, other code or other settings), it would train other examples as part of the same batch, and nobody would notice.
So every exchange carries the hash of the decision in force in one more column, and each rank compares the hashes that
it gets with its own.

Cost: 8 bytes a row of the exchange and rank, no collective of its own, no host sync before :meth:`Agreement.check`.
"""

import torch
from torch import Tensor

_NO_ROUND = -1

Decision = tuple[Tensor, int]
"""The hash, int64 [1], and its round."""


class Agreement:
    """The decision in force, and the first round in which a peer was seen to have another.

    Args:
        device: of what is exchanged.
    """

    def __init__(self, device: torch.device):
        self.decision: Decision | None = None
        self._differed_in = torch.full((), _NO_ROUND, dtype=torch.int64, device=device)

    def announce(self, decision: int, *, round: int) -> None:
        """Compare ``decision``, a signed 64-bit hash, from now on. Copied to the device: not in the step."""
        self.decision = torch.tensor([decision], dtype=torch.int64, device=self._differed_in.device), round

    def columns(self, num_rows: int) -> list[Tensor]:
        """What joins an exchange of ``num_rows`` rows: the hash in a column, int64 [num_rows, 1]; nothing before the
        first decision."""
        return [] if self.decision is None else [self.decision[0].expand(num_rows, 1)]

    def compare(self, gathered: Tensor, decision: Decision | None) -> Tensor:
        """Take the column off again, and note if it differs from this rank's. No host sync.

        Args:
            gathered: int64 [ranks, rows, n + 1], or n columns without a decision.
            decision: this rank's when the exchange began.

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
        """Raise a RuntimeError that names the round if ranks were seen to differ. A host sync: not in the step."""
        differed_in = int(self._differed_in)
        if differed_in != _NO_ROUND:
            raise RuntimeError(
                f"the ranks decided differently in round {differed_in}: this rank's selection is not that of its peers "
                "in the data, tensor, pipeline or context parallel mesh, so that they train different examples as one "
                "batch. Resume from a checkpoint of before that round; if it comes back, look for ranks with other "
                "code, settings or data, or for a faulty device"
            )
