"""Mends for torchtitan 0.2.2 and torch 2.11 to 2.13, each with the reason and the day it can go.

Import this module before anything of torchtitan: several of its modules copy the device type by name at import.
With an accelerator present only the last two mends are in force.

1. CPU: without an accelerator torchtitan takes "cuda" and fails in ``set_device``. Its device type and device module
   are "cpu" and a CPU twin here. Goes when torchtitan supports CPU.
2. gloo has no PREMUL_SUM, which FSDP2 asks for once a gradient divide factor is set; on CPU every such FSDP module is
   told to use plain sums. Goes when FSDP2 asks the backend.
3. TensorBoard: the folder is stamped with the minute of the start, so a resumed run shows up as a second, shorter one.
   A resumed run goes on in the newest folder, and hides the steps that it trains again. Goes when torchtitan keeps it.
4. Tied embeddings (small qwen3): torch 2.13 refuses a weight in two FSDP groups, as 0.2.2 makes them (torchtitan #2495,
   mended there by #2522). Embedding, norm and output become one group. Goes with torchtitan 0.3.
"""

import os
import platform
import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

IS_CPU = not torch.accelerator.is_available()


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


def _mend_cpu() -> None:
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


_STAMP = re.compile(r"\d{8}-\d{4}")


def resumed_log_dir(log_dir: str) -> str:
    """``<tb>/<stamp of now>[/rank_N]`` -> the same below the newest stamp that exists there, or ``log_dir`` itself."""
    parts = log_dir.split(os.sep)
    place = max((i for i, part in enumerate(parts) if _STAMP.fullmatch(part)), default=None)
    if place is None:
        return log_dir
    folder = os.sep.join(parts[:place]) or os.sep
    stamps = sorted(name for name in os.listdir(folder) if _STAMP.fullmatch(name)) if os.path.isdir(folder) else []
    return os.sep.join([*parts[:place], stamps[-1], *parts[place + 1 :]]) if stamps else log_dir


def mend_tensorboard(*, resumed: bool) -> None:
    """Choose the TensorBoard folder for the run about to start; call before the metrics processor is built."""
    import torchtitan.components.metrics as titan_metrics
    from torch.utils.tensorboard import SummaryWriter

    stock = titan_metrics.BaseLogger

    class ContinuedTensorBoardLogger(stock):  # type: ignore[valid-type, misc]
        """torchtitan's TensorBoardLogger, opened at the first logged step so as to hide what is trained again."""

        def __init__(self, log_dir: str, tag: str | None = None):
            self.log_dir = resumed_log_dir(log_dir) if resumed else log_dir
            self.tag = tag
            self.writer: SummaryWriter | None = None
            titan_metrics.logger.info(f"TensorBoard logging enabled. Logs will be saved at {self.log_dir}")

        def log(self, metrics: dict[str, Any], step: int) -> None:
            if self.writer is None:
                # At every start, not only at a resume: some readers ignore the first purge they meet.
                self.writer = SummaryWriter(self.log_dir, max_queue=1000, purge_step=step)
            for name, value in metrics.items():
                self.writer.add_scalar(name if self.tag is None else f"{self.tag}/{name}", value, step)

        def close(self) -> None:
            if self.writer is not None:
                self.writer.close()

    titan_metrics.TensorBoardLogger = ContinuedTensorBoardLogger


def mend_tied_embeddings() -> None:
    """Shard tied embeddings in one FSDP group; call before a model with ``enable_weight_tying`` is parallelised."""
    import torchtitan.models.llama4.infra.parallelize as llama4
    import torchtitan.models.qwen3.infra.parallelize as qwen3

    stock_apply, stock_shard = llama4.apply_fsdp, llama4.fully_shard

    def apply_fsdp(model: Any, *args: Any, **kwargs: Any) -> None:
        def shard(module: nn.Module | list[nn.Module], **config: Any) -> None:
            if module is model.tok_embeddings:
                return  # below, together with the output that shares its weight
            if isinstance(module, list):
                module = [model.tok_embeddings, *module]
            stock_shard(module, **config)

        tied = getattr(model, "enable_weight_tying", False)
        with patch.object(llama4, "fully_shard", shard if tied else stock_shard):
            stock_apply(model, *args, **kwargs)

    qwen3.apply_fsdp = apply_fsdp


if IS_CPU:
    _mend_cpu()
