"""Linear layers of several experts, applied to sequences that each belong to one expert.

The sequences of a batch are sorted by expert (:func:`group`), so that those of one expert are neighbours. In bfloat16
one grouped product (``torch.nn.functional.grouped_mm``) multiplies each group by its expert's matrix. Other dtypes,
which it does not take on every device and under torch.compile, multiply each sequence by a copy of its expert's matrix.
No shape depends on how many sequences an expert got, and nothing waits for the device.

Every expert takes part in every step: one without sequences gets a gradient of zeros. So FSDP2 gathers and reduces the
same on all ranks, whatever was routed.

Cost: the products of one expert for every sequence. Bfloat16: no memory beside the result. Other dtypes: a copy of the
matrix per sequence, kept for the backward pass.

Shapes: B sequences, L tokens, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Groups(NamedTuple):
    """The order that makes the sequences of each expert neighbours.

    Attributes:
        order: int64 [B], the sequence at each place of the sorted batch.
        inverse: int64 [B], the place of each sequence.
        experts: int64 [B], the expert at each place, rising.
        ends: int32 [E], the number of tokens up to the end of each expert's group.
    """

    order: Tensor
    inverse: Tensor
    experts: Tensor
    ends: Tensor


def group(route: Tensor, *, num_experts: int, seq_len: int) -> Groups:
    """Sort sequences by their experts; those of one expert keep their order.

    Args:
        route: the expert of each sequence, int64 [B].
        num_experts: E.
        seq_len: L.
    """
    experts, order = route.sort(stable=True)
    counts = (route[:, None] == torch.arange(num_experts, device=route.device)).sum(dim=0)
    return Groups(order, order.argsort(), experts, (counts.cumsum(0) * seq_len).int())


class RoutedLinear(nn.Module):
    """A linear layer without bias per expert.

    ``weight`` is [E x outputs, inputs], the experts' matrices one below the other: FSDP2 splits it into even shards on
    any number of ranks, where [E, outputs, inputs] would leave ranks beyond the E-th without any.
    """

    def __init__(self, in_features: int, out_features: int, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts * out_features, in_features))

    @property
    def visited_share(self) -> float:
        """The share of the weights that a token is multiplied by, for counts of FLOPs."""
        return 1 / self.num_experts

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[B, L, inputs], sorted by expert -> [B, L, outputs], in the same order."""
        dtype, device = x.dtype, x.device.type
        if self.num_experts == 1:
            return F.linear(x, self.weight)
        weight = self.weight.view(self.num_experts, -1, x.shape[-1])
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype != torch.bfloat16:
            return torch.bmm(x, weight[groups.experts].transpose(1, 2))
        tokens, weight = x.to(dtype).flatten(0, 1), weight.to(dtype)
        return F.grouped_mm(tokens, weight.transpose(1, 2), offs=groups.ends).unflatten(0, x.shape[:2])
