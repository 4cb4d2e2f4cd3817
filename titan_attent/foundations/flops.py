"""FLOPs of one example of T tokens, in the convention in which every system of a run counts them.

A matrix of P numbers takes 2 P T in the forward pass, as much for its weight gradient and as much for its input
gradient; of experts the share that a token visits. Attention's two products take 2 T^2 H (q + v) forward, with H heads
whose queries and keys are q wide and values v, and twice that backward, all of it on the way of the input gradient
(torchtitan's convention: no discount for causality, windows or documents). A look-up takes none, and neither does what
goes element by element: norms, biases, the softmax, the weights of experts.
"""

from typing import Any

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """torchtitan's grouped experts, of whichever model."""
    return type(module).__name__.endswith("GroupedExperts")


def matrix_flops(module: nn.Module, args: Any, *, seq_len: int) -> float:
    """Of a Linear or of experts: forward, for the weight gradient, or for the input gradient; each is as much. 0 for
    every other module.

    Args:
        module: one layer, not what stands in it; its parameters may be sharded.
        args: torchtitan's arguments of the model; read for experts only.
        seq_len: T.
    """
    if not (isinstance(module, nn.Linear) or is_experts(module)):
        return 0.0
    dims = 3 if is_experts(module) else 2  # what has fewer is a bias
    numel = float(sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= dims))
    if is_experts(module):
        numel *= args.moe_args.top_k / args.moe_args.num_experts
    return 2 * numel * seq_len


def product_flops(args: Any, *, seq_len: int) -> float:
    """Of one layer's attention products, forward; twice that backward. 0 without ``args``.

    Args:
        args: torchtitan's arguments of the model, of whichever family.
        seq_len: T.
    """
    return 0.0 if args is None else 2.0 * seq_len**2 * args.n_heads * _head_widths(args)


def _head_widths(args: Any) -> int:
    """q + v of a head: deepseek_v3 names both, qwen3 and gpt_oss one for both, the others divide ``dim``."""
    if hasattr(args, "v_head_dim"):
        return args.qk_nope_head_dim + args.qk_rope_head_dim + args.v_head_dim
    return 2 * getattr(args, "head_dim", args.dim // args.n_heads)
