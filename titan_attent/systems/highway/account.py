"""What the highway saves, in FLOPs of an example's backward pass (foundations/flops.py). Host numbers, counted step by
step, so that a resume goes on.

- Branches: the input gradients of the projections that read a norm's output.
- Blocks: nothing, as the weights of a block's first norm need all of its products. A round's input gradients come on
  top, but for those that come with the weights': with rounds the number is negative.
- Compiled blocks find weight gradients with every input gradient, wanted or not.
- A step by exact backpropagation saves nothing.

Counted with every module active, whatever ``[freezing]`` freezes.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from titan_attent.foundations.flops import matrix_flops, product_flops
from titan_attent.systems.highway.branches import BRANCHES


class HighwayAccount:
    """Of one run.

    Args:
        model: torchtitan's, whole, parallelised or not.
        blocks: of it, in the order of the forward pass.
        seq_len: tokens of an example.
        is_compiled: whether the blocks are.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], *, seq_len: int, is_compiled: bool):
        args: Any = getattr(model, "model_args", None)

        def matrices(module: nn.Module) -> float:
            return sum(matrix_flops(layer, args, seq_len=seq_len) for layer in module.modules())

        products, everything = product_flops(args, seq_len=seq_len), matrices(model)
        self.full = 2 * everything + 2 * products * len(blocks)
        self.forward = everything + products * len(blocks)
        self.of_branches = sum(
            matrices(getattr(getattr(block, branch), projection))
            for block in blocks
            for _, branch, projections in BRANCHES
            for projection in projections
            if hasattr(getattr(block, branch, None), projection)
        )
        passes = 2 if is_compiled else 1
        self.of_vjps = [passes * matrices(block) + 2 * products for block in blocks]
        self.counts = {"steps": 0.0, "saved": 0.0}

    def step_done(self, *, branches: bool = False, vjps: Sequence[int] = ()) -> None:
        """A step, by exact backpropagation unless told otherwise.

        Args:
            branches: it was cut at the branches.
            vjps: input gradients of each block that came by themselves (sweep.py).
        """
        self.counts["steps"] += 1
        self.counts["saved"] += self.of_branches if branches else 0.0
        self.counts["saved"] -= sum(vjp * number for vjp, number in zip(self.of_vjps, vjps, strict=False))

    def metrics(self) -> dict[str, float]:
        """``saved_of_backward`` and ``saved_of_step``, shares since the first step."""
        of_step = self.counts["saved"] / max(1.0, self.counts["steps"])
        return {
            "saved_of_backward": of_step / self.full,
            "saved_of_step": of_step / (self.full + self.forward),
        }
