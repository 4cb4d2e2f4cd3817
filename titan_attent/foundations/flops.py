"""FLOPs of one example of T tokens, in the convention in which every system of a run counts them.

A matrix of P numbers takes 2 P T in the forward pass, 2 P T for its weight gradient and 2 P T for its input gradient.
Experts count by the share of them that one token visits. The two products of attention take 2 T^2 H (q + v) forward,
with H heads of width q for queries and keys and width v for values. They take twice that backward, all of it for input
gradients. There is no discount for causality, windows or documents: torchtitan's convention. Embedding look-ups and
elementwise operations (norms, biases, the softmax, the weights of experts) count as 0.
"""

from typing import Any

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` is torchtitan's grouped experts, in any model."""
    return type(module).__name__.endswith("GroupedExperts")


def is_routed(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of several experts, one of which computes each sequence (models/mot)."""
    return hasattr(module, "visited_share")


def matrix_flops(module: nn.Module, args: Any, *, seq_len: int) -> float:
    """FLOPs of a Linear or of experts: forward, weight gradient and input gradient take this number each. 0 for every
    other module.

    Args:
        module: one layer; its submodules are not counted; its parameters may be sharded.
        args: torchtitan's arguments of the model; read for experts only.
        seq_len: T.
    """
    if is_routed(module):
        of_experts = sum(parameter.numel() for parameter in module.parameters())
        return 2.0 * of_experts * seq_len * float(getattr(module, "visited_share"))  # noqa: B009
    if not (isinstance(module, nn.Linear) or is_experts(module)):
        return 0.0
    dims = 3 if is_experts(module) else 2  # parameters with fewer dimensions are biases
    numel = float(sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= dims))
    if is_experts(module):
        numel *= args.moe_args.top_k / args.moe_args.num_experts
    return 2 * numel * seq_len


def product_flops(args: Any, *, seq_len: int) -> float:
    """Forward FLOPs of the attention products of one layer; backward takes twice that. 0 for a model without heads.

    Args:
        args: torchtitan's arguments of the model, of any family; None if it has none.
        seq_len: T.
    """
    num_heads = getattr(args, "n_heads", 0)
    return 2.0 * seq_len**2 * num_heads * _head_widths(args) if num_heads else 0.0


def _head_widths(args: Any) -> int:
    """q + v of one head: deepseek_v3 names both, qwen3 and gpt_oss one for both, the others divide ``dim``; hyla has
    another product, and tells the sum."""
    if hasattr(args, "head_widths"):
        return args.head_widths
    if hasattr(args, "v_head_dim"):
        return args.qk_nope_head_dim + args.qk_rope_head_dim + args.v_head_dim
    return 2 * getattr(args, "head_dim", args.dim // args.n_heads)
