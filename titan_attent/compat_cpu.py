"""What torchtitan 0.2.2 needs to train on CPU with gloo: for tests and small runs, not for speed.

Part of compat.py, which calls :func:`mend` where there is no accelerator, before anything else of torchtitan is
imported: several of its modules copy the device type by name at import.

1. torchtitan takes "cuda" and fails in ``set_device``. Its device type and device module are "cpu" and a twin here.
   Goes when torchtitan supports CPU.
2. gloo has no PREMUL_SUM, which FSDP2 asks for once a gradient divide factor is set; every such FSDP module is told to
   use plain sums. Goes when FSDP2 asks the backend.
3. DTensor and torch's context parallelism know the attention kernels of GPUs only: heads cut by tensor parallelism are
   attended to as plain tensors, and the keys and values of cut sequences are gathered. Goes when they know the CPU's.
4. Flex attention has no backward on CPU: it is computed over the whole mask, which need not be compiled then. Goes when
   torch has it.
5. Mixture of experts: ``torch.histc`` refuses integers on CPU, and the token order of expert parallelism comes from a
   Triton kernel; torchtitan's own CPU twin of that kernel is used. Go when torch and torchtitan do so.
"""

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import _attention
from torch.distributed.tensor.experimental._attention import _ContextParallel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask


class CpuDeviceModule:
    """What torchtitan calls on ``torch.cuda``, for the CPU: the process's memory stands for the device's."""

    @staticmethod
    def set_device(device: torch.device | int | None) -> None:
        """One CPU: nothing to choose."""

    @staticmethod
    def current_device() -> int:
        """An index as on an accelerator; ``torch.cpu`` answers with a string, which ``barrier`` refuses."""
        return 0

    @staticmethod
    def synchronize(device: torch.device | int | None = None) -> None:
        """CPU work is synchronous."""

    @staticmethod
    def get_device_name(device: torch.device | int | None = None) -> str:
        return platform.processor() or platform.machine()

    @staticmethod
    def get_device_properties(device: torch.device | int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @staticmethod
    def memory_stats(device: torch.device | int | None = None) -> dict[str, int]:
        """Peak resident memory of this process in bytes, under the names of the CUDA allocator."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    @staticmethod
    def reset_peak_memory_stats(device: torch.device | int | None = None) -> None:
        """The kernel's peak cannot be reset without privileges: the peak is the run's."""

    @staticmethod
    def empty_cache() -> None:
        """There is no cache."""


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


def mend() -> None:
    """Put all of it in force."""
    # torchtitan asks torch for the device once, while its modules import each other.
    if "torchtitan" in sys.modules:
        raise ImportError("torchtitan was imported before titan_attent.compat: import titan_attent.compat first")
    with (
        patch("torch._utils._get_available_device_type", lambda: "cpu"),
        patch("torch._utils._get_device_module", lambda device_type: CpuDeviceModule),
    ):
        import torchtitan.tools.utils  # noqa: F401

    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_with_sums(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_with_sums  # type: ignore[method-assign]

    import torchtitan.distributed.context_parallel as titan_cp

    titan_cp._ContextParallel = CpuContextParallel

    import torchtitan.models.attention as titan_attention

    stock_sdpa = titan_attention.ScaledDotProductAttentionWrapper.forward

    def sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return on_local_heads(partial(stock_sdpa, module))(*args, **kwargs)

    titan_attention.ScaledDotProductAttentionWrapper.forward = sdpa
    titan_attention.FlexAttentionWrapper.forward = dense_attention
    titan_attention._compiled_create_block_mask = partial(create_block_mask, device="cpu")

    import torchtitan.models.moe.utils as titan_moe

    titan_moe.generate_permute_indices = partial(titan_moe.generate_permute_indices, use_cpu=True)
    stock_histc = torch.histc

    def histc(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.is_floating_point():
            return stock_histc(input, *args, **kwargs)
        return stock_histc(input.double(), *args, **kwargs).to(input.dtype)

    torch.histc = histc
