"""Attention on CPU under parallelism and flex masks, where torch knows the kernels of GPUs only; part of cpu.py.

Heads that tensor parallelism has cut are attended to as plain tensors; the keys and values of sequences that context
parallelism has cut are gathered; flex attention, which has no backward on CPU, is computed over the whole mask, which
need not be compiled then: [L, L] scores of every head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import _attention
from torch.distributed.tensor.experimental._attention import _ContextParallel
from torch.nn.attention.flex_attention import BlockMask, create_mask


def on_local_heads(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attention(q, k, v, ...)`` also for DTensors that are cut along the heads, each rank its own."""

    def local(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        if not isinstance(q, DTensor):
            return attention(q, k, v, **kwargs)
        assert q.placements == (Shard(1),)
        out = attention(*(x.to_local() for x in (q, k, v) if isinstance(x, DTensor)), **kwargs)
        return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False)

    return local


class CpuContextParallel(_ContextParallel):
    """Context parallelism of ``scaled_dot_product_attention`` on CPU: this rank's queries, everyone's keys and values.

    One all-gather and a mask instead of a ring.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if self.attention_type != self.AttentionType.SDPA:
            return super()._apply(module, mesh)
        ranks, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()

        def forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, **kwargs: Any) -> Tensor:
            k, v = (collectives.all_gather_tensor_autograd(x.contiguous(), self.seq_dim, group) for x in (k, v))
            place = torch.arange(k.shape[self.seq_dim]).view(ranks, -1)
            if _attention._cp_options.enable_load_balance:  # rank r holds pieces r and 2 ranks - 1 - r
                pieces = place.view(2 * ranks, -1)
                place = torch.cat((pieces[:ranks], pieces[ranks:].flip(0)), dim=1)
            mask = place[rank][:, None] >= place.flatten() if is_causal else None
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)

        module.forward = on_local_heads(forward)
        return module


def dense_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask,
    score_mod: None = None,
    scale: float | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torchtitan's ``FlexAttentionWrapper.forward`` without its kernel: the whole [L, L] scores of every head."""
    assert score_mod is None, "torchtitan 0.2.2 gives none"
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    batch, heads, length, width = q.shape
    mask = create_mask(block_mask.mask_mod, batch, heads, length, k.shape[2], device=q.device)
    scores = q @ k.transpose(-2, -1) * (width**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(dim=-1) @ v
    return (out, scores.logsumexp(dim=-1)) if return_lse else out
