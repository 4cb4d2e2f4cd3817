"""The FLOPs per example that Highway backpropagation saves in the backward pass (counted by foundations/flops.py).

All are host numbers, added up step by step and stored in the checkpoint.

- Cuts at branches save the input gradients of the projections that read a norm's output.
- Cuts at blocks save nothing, as the weights of a block's first norm need all of its products. Rounds add input
  gradients, except for those that are computed with the weights' gradients. So with rounds the number is negative.
- Compiled blocks also compute weight gradients with every input gradient.
- A step by exact backpropagation saves nothing.

Every module is counted as active, whatever ``[freezing]`` freezes.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from titan_attent.foundations.flops import matrix_flops, product_flops
from titan_attent.systems.highway.branches import BRANCHES


class HighwayAccount:
    """The savings of one run.

    Args:
        model: a whole torchtitan model, parallelised or not.
        blocks: the blocks of the model, in the order of the forward pass.
        seq_len: tokens per example.
        is_compiled: whether the blocks are compiled.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], *, seq_len: int, is_compiled: bool):
        args: Any = getattr(model, "model_args", None)

        def matrices(module: nn.Module) -> float:
            return sum(matrix_flops(layer, args, seq_len=seq_len) for layer in module.modules())

        products, all_matrices = product_flops(args, seq_len=seq_len), matrices(model)
        self.full = 2 * all_matrices + 2 * products * len(blocks)
        self.forward = all_matrices + products * len(blocks)
        self.branch_flops = sum(
            matrices(getattr(getattr(block, branch), projection))
            for block in blocks
            for _, branch, projections in BRANCHES
            for projection in projections
            if hasattr(getattr(block, branch, None), projection)
        )
        passes = 2 if is_compiled else 1
        self.vjp_flops = [passes * matrices(block) + 2 * products for block in blocks]
        self.counts = {"steps": 0.0, "saved": 0.0}

    def step_done(self, *, branches: bool = False, vjps: Sequence[int] = ()) -> None:
        """Count a step; by default one of exact backpropagation.

        Args:
            branches: whether the step was cut at the branches.
            vjps: number of input gradients of each block that needed a pass of their own (``separate_vjps``).
        """
        self.counts["steps"] += 1
        self.counts["saved"] += self.branch_flops if branches else 0.0
        self.counts["saved"] -= sum(vjp * number for vjp, number in zip(self.vjp_flops, vjps, strict=False))

    def metrics(self) -> dict[str, float]:
        """The shares ``saved_of_backward`` and ``saved_of_step``, over all steps since the first."""
        per_step = self.counts["saved"] / max(1.0, self.counts["steps"])
        return {
            "saved_of_backward": per_step / self.full,
            "saved_of_step": per_step / (self.full + self.forward),
        }
