"""Attention on CPU under parallelism and with flex masks, which torch supports on GPUs only; part of cpu.py.

Under tensor parallelism each rank attends with its local heads as plain tensors. Under context parallelism keys and
values are gathered. Flex attention, which has no backward on CPU, is computed with the dense mask: [L, L] scores per
head, and no compilation.
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
from torch.nn.attention.flex_attention import BlockMask


def on_local_heads(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend ``attention(q, k, v, ...)`` to DTensors sharded along the heads; each rank computes its local heads."""

    def local(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        if not isinstance(q, DTensor):
            return attention(q, k, v, **kwargs)
        assert q.placements == (Shard(1),)
        out = attention(*(x.to_local() for x in (q, k, v) if isinstance(x, DTensor)), **kwargs)
        return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False)

    return local


class CpuContextParallel(_ContextParallel):
    """Context parallelism of ``scaled_dot_product_attention`` on CPU: local queries, gathered keys and values.

    It uses one all-gather and a mask instead of a ring.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if self.attention_type != self.AttentionType.SDPA:
            return super()._apply(module, mesh)
        ranks, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()

        def forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, **kwargs: Any) -> Tensor:
            k, v = (collectives.all_gather_tensor_autograd(x.contiguous(), self.seq_dim, group) for x in (k, v))
            positions = torch.arange(k.shape[self.seq_dim]).view(ranks, -1)
            if _attention._cp_options.enable_load_balance:  # rank r holds chunks r and 2 ranks - 1 - r
                chunks = positions.view(2 * ranks, -1)
                positions = torch.cat((chunks[:ranks], chunks[ranks:].flip(0)), dim=1)
            mask = positions[rank][:, None] >= positions.flatten() if is_causal else None
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
    """torchtitan's ``FlexAttentionWrapper.forward`` without its kernel: computes the dense [L, L] scores per head."""
    assert score_mod is None, "torchtitan 0.2.2 passes no score_mod"
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # A mask function compares and indexes tensors, so it takes the positions of all dimensions at once. torch's
    # create_mask maps it over one after the other, which takes longer than the attention of a small model.
    sizes, width = (*q.shape[:3], k.shape[2]), q.shape[-1]
    positions = (torch.arange(size, device=q.device) for size in sizes)
    mask = block_mask.mask_mod(*(at.view(-1, *[1] * (3 - dim)) for dim, at in enumerate(positions)))
    scores = q @ k.transpose(-2, -1) * (width**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(dim=-1) @ v
    return (out, scores.logsumexp(dim=-1)) if return_lse else out
