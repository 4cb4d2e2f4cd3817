"""Cuts before the branches of a block (attention and feed-forward), for zero rounds.

    y = x + attention(norm(x)) + feed_forward(norm(x + attention(norm(x))))

With k = 0 both branches get g at their output. A cut before the whole block would save almost nothing: the gradients of
the first norm's weights need a backward through everything after it. So the norms' outputs are detached instead. This
saves the input gradients of the first projections of both branches (q, k, v; gate and up), which hold more than half of
a block's weights.

The gradients of the norms' weights gamma, lost by the cut, follow from the projections' own gradients. With
n = x' gamma, the input of the projections, and dW = sum_t dz_t n_t over the tokens,

    gamma_d dgamma_d = sum_t n_td (dz_t W)_d = sum_o W_od dW_od

summed over the projections that read n. This is exact and elementwise, computed once per step.

Cost: one read of those weights and their gradients; under FSDP2 or TP also one small reduction per norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

BRANCHES = (
    ("attention_norm", "attention", ("wq", "wk", "wv")),
    ("ffn_norm", "feed_forward", ("w1", "w3")),
)
"""(norm, branch, the branch's projections that read the norm's output); nothing else reads it."""

MIN_NORM_WEIGHT = 1e-6
"""Absolute value of a norm's weight below which its gradient is set to 0, as it would be dominated by rounding."""


class Switch:
    """Whether the branches are cut. Compiled blocks read it and have one graph per value."""

    is_on = False


class BranchCuts:
    """Hooks on the branches of all blocks, which cut a forward pass there while :attr:`switch` is on.

    Raises:
        ValueError: a block lacks one of the two branches.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.switch = Switch()
        self._norms: list[tuple[nn.Module, list[nn.Module]]] = []
        self._handles: list[RemovableHandle] = []
        for block in blocks:
            for norm, branch, projections in BRANCHES:
                inner = getattr(block, branch, None)
                if inner is None or not all(hasattr(inner, name) for name in projections):
                    raise ValueError(
                        f'[highway] cut = "branch" with a block that has no {branch} with {", ".join(projections)}: '
                        'only dense llama3 and qwen3 are supported. Set cut = "block", or method = "exact"'
                    )
                self._norms.append((getattr(block, norm), [getattr(inner, name) for name in projections]))
                self._handles.append(inner.register_forward_pre_hook(_cut_by(self.switch)))

    def norm_gradients(self) -> None:
        """Set the gradients of the norms' weights for the whole step, from those of the projections after them.

        A norm keeps None if a projection after it is frozen and has no gradient. A collective under FSDP2 and TP. No
        host sync.
        """
        with torch.no_grad():
            for norm, projections in self._norms:
                weights: list[Any] = [projection.weight for projection in projections]
                gamma: Any = norm.weight
                if gamma.requires_grad and all(weight.grad is not None for weight in weights):
                    product: Any = sum((weight * weight.grad).sum(dim=0) for weight in weights)
                    if isinstance(gamma, DTensor) and isinstance(product, DTensor):
                        product = product.redistribute(gamma.device_mesh, gamma.placements)
                    is_large = gamma.abs() > MIN_NORM_WEIGHT
                    gamma.grad = torch.where(is_large, product / torch.where(is_large, gamma, 1.0), 0.0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _cut_by(switch: Switch) -> Any:
    def cut(branch: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0].detach(), *args[1:]) if switch.is_on else None

    return cut
