"""Patches that let torchtitan 0.2.2 train on CPU with gloo: for tests and small runs, not for speed.

If there is no accelerator, torchtitan is imported within :func:`device_type`, as several of its modules copy the device
type by name, and registry.py then calls :func:`apply`.

1. torchtitan assumes "cuda" and fails in ``set_device``. Here its device type is "cpu", and its device module is
   :class:`CpuDeviceModule`. Remove when torchtitan supports CPU.
2. gloo has no PREMUL_SUM, which FSDP2 uses once a gradient divide factor is set. Here such FSDP modules use plain sums.
   Remove when FSDP2 checks the backend.
3. DTensor and torch's context parallelism support only the attention kernels of GPUs, and flex attention has no
   backward on CPU. cpu_attention.py replaces them. Remove when torch supports attention on CPU there.
4. Mixture of experts: ``torch.histc`` refuses integers on CPU, and a Triton kernel computes the token order of expert
   parallelism. Here integers are converted, and torchtitan's own CPU version of the kernel is used. Remove when torch
   and torchtitan do both.
5. torchtitan computes in bfloat16 by default, which takes 60 to 100 times as long as fp32 on a CPU without bfloat16
   instructions. Here fp32 is the default on such a CPU (:func:`default_precision`). Remove when torchtitan checks the
   device.
6. DTensor draws random numbers shard by shard on CPU, so a model's initial weights would depend on the number of ranks.
   Here whole tensors are drawn (:func:`filled_whole`). Remove when DTensor's random operators support CPU.
7. The peak FLOPs per second of a CPU are unknown; torchtitan would search for a GPU and assume an A100. Here the peak
   is infinite, so that the utilisation is 0%.
"""

import logging
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import create_block_mask

from titan_attent.titan.patches.cpu_attention import CpuContextParallel, dense_attention, on_local_heads

logger = logging.getLogger(__name__)

ISA_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA with which oneDNN, torch's matrix library, leaves bfloat16's instructions unused."""


def has_native_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16, and torch uses them.

    On x86 that is AVX512_BF16, which every CPU with AMX also has. AVX-512 without it does not count: torch reports
    support, but oneDNN emulates bfloat16 at a third to a quarter of fp32's speed. On other CPUs torch's report counts.
    ``ONEDNN_MAX_CPU_ISA=AVX2`` hides the instructions from oneDNN; this function then returns False.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISA_WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def default_precision(precision: str, *, written: bool) -> str:
    """The ``training.mixed_precision_param`` to run with.

    Args:
        precision: its value in the configuration.
        written: whether the user set it; otherwise it is torchtitan's default.

    The result is the same on all ranks: rank 0 decides, and the others read it from torchrun's store.
    """
    if precision != "bfloat16" or _from_first_rank(has_native_bfloat16):
        return precision
    is_first = os.environ.get("RANK", "0") == "0"
    if written:
        if is_first:
            logger.warning(
                'training.mixed_precision_param = "bfloat16" is slow here: this CPU has no instructions for it. '
                'Remove the key to run in "float32"'
            )
        return precision
    if is_first:
        logger.info(
            'training.mixed_precision_param = "float32": this CPU has no instructions for bfloat16, torchtitan\'s '
            "default. To use bfloat16 nevertheless, set the key in the TOML or on the command line"
        )
    return "float32"


def _from_first_rank(predicate: Callable[[], bool]) -> bool:
    """Rank 0's result of ``predicate`` on every rank under torchrun; each rank's own under another launcher."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return predicate()
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"titan_attent/{predicate.__name__}"
    if os.environ["RANK"] == "0":
        store.set(key, str(predicate()))
    return store.get(key) == b"True"


def filled_whole(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend ``fill(x, ...)``, which fills ``x`` with random numbers, to DTensors, independent of their sharding.

    Every rank draws the whole tensor from its generator and keeps its shard. The generators of the ranks of the mesh
    must be in the same state. Cost: one whole tensor in memory at a time, and per rank the time of a single process.
    """

    def filled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, DTensor):
            return fill(x, *args, **kwargs)
        whole = fill(torch.empty(x.shape, dtype=x.dtype, device=x.device), *args, **kwargs)
        mesh = x.device_mesh
        return x.copy_(DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False))

    return filled


class CpuDeviceModule:
    """The functions of ``torch.cuda`` that torchtitan calls, for the CPU; memory is that of the process."""

    @staticmethod
    def set_device(device: torch.device | int | None) -> None:
        """Do nothing: there is one CPU."""

    @staticmethod
    def current_device() -> int:
        """An index as on an accelerator; ``torch.cpu`` returns a string, which ``barrier`` refuses."""
        return 0

    @staticmethod
    def synchronize(device: torch.device | int | None = None) -> None:
        """Do nothing: CPU work is synchronous."""

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
        """Do nothing: resetting the kernel's peak needs privileges, so the peak is that of the whole run."""

    @staticmethod
    def empty_cache() -> None:
        """Do nothing: there is no cache."""


@contextmanager
def device_type() -> Iterator[None]:
    """While torchtitan is imported, it takes the CPU for its device."""
    with (
        patch("torch._utils._get_available_device_type", lambda: "cpu"),
        patch("torch._utils._get_device_module", lambda device_type: CpuDeviceModule),
    ):
        yield


def apply() -> None:
    """Apply all patches of this module, after torchtitan was imported within :func:`device_type`."""
    import torchtitan.tools.utils

    if torchtitan.tools.utils.device_type != "cpu":
        raise ImportError("torchtitan was imported before titan_attent.titan: import titan_attent.titan first")
    torchtitan.tools.utils.get_peak_flops = lambda device_name: math.inf  # the utilisation is then 0%

    DTensor.normal_ = filled_whole(Tensor.normal_)  # type: ignore[method-assign]
    DTensor.uniform_ = filled_whole(Tensor.uniform_)  # type: ignore[method-assign]
    # It redraws values outside the bounds; the number of redraws would depend on the rank's shard.
    init: Any = nn.init
    init._no_grad_trunc_normal_ = filled_whole(init._no_grad_trunc_normal_)

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
