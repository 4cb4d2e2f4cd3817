"""Cuts at the branches of a block, attention and feed-forward apart: no rounds, and no input gradient of a branch.

    y = x + attention(norm(x)) + feed_forward(norm(x + attention(norm(x))))

With k = 0 both branches get g at their output. A cut at the block alone saves next to nothing: to find the gradients of
the first norm's weights, autograd goes through all that stands behind it. Here the norms' outputs are detached. That
leaves out the input gradients of the first projections of both branches (q, k, v; gate and up), whose weights are more
than half of a block's. What the norms' weights gamma lose by it is found again from the projections' own gradients.
With n = x' gamma, the input of the projections, and dW = sum_t dz_t n_t over the tokens,

    gamma_d dgamma_d = sum_t n_td (dz_t W)_d = sum_o W_od dW_od

summed over the projections that read n: exact, elementwise, once a step.

Cost: reading those weights and their gradients where they lie; under FSDP2 or TP one small reduction a norm.
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
"""Norm, branch, and the projections in it that read the norm's output; nothing else does."""

SMALLEST = 1e-6
"""Of a norm's weight: below it its gradient is 0, as it cannot be told from rounding."""


class Switch:
    """Compiled blocks ask for it: a graph for each of its values."""

    is_on = False


class BranchCuts:
    """The hooks on the branches of all blocks. While :attr:`switch` is on, a forward pass is cut there.

    Raises:
        ValueError: a block has not the two branches.
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
                        f'[highway] cut = "branch" with a block that has no {branch} of {", ".join(projections)}: it '
                        'knows dense llama3 and qwen3. Set cut = "block", or method = "exact"'
                    )
                self._norms.append((getattr(block, norm), [getattr(inner, name) for name in projections]))
                self._handles.append(inner.register_forward_pre_hook(_cut_by(self.switch)))

    def norm_gradients(self) -> None:
        """Set the gradients of the norms' weights from those of the projections behind them, of the whole step.

        None where a projection has none: it is frozen. A collective under FSDP2 and TP. No host sync.
        """
        with torch.no_grad():
            for norm, projections in self._norms:
                weights: list[Any] = [projection.weight for projection in projections]
                gamma: Any = norm.weight
                if gamma.requires_grad and all(weight.grad is not None for weight in weights):
                    product: Any = sum((weight * weight.grad).sum(dim=0) for weight in weights)
                    if isinstance(gamma, DTensor) and isinstance(product, DTensor):
                        product = product.redistribute(gamma.device_mesh, gamma.placements)
                    is_large = gamma.abs() > SMALLEST
                    gamma.grad = torch.where(is_large, product / torch.where(is_large, gamma, 1.0), 0.0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _cut_by(switch: Switch) -> Any:
    def cut(branch: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0].detach(), *args[1:]) if switch.is_on else None

    return cut
