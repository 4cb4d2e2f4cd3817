"""Patches for torchtitan 0.2.2 and torch 2.11 to 2.15; registry.py applies them.

1. TensorBoard: torchtitan names the folder after the minute of the start, so a resumed run shows up as a second,
   shorter run. Here a resumed run continues in the newest folder and hides the steps that it trains again. Remove when
   torchtitan keeps the folder.
2. Tied embeddings (small qwen3): torchtitan 0.2.2 puts one weight into two FSDP groups, which torch 2.13 refuses
   (torchtitan #2495, fixed by #2522). Here embedding, norm and output are one group. Remove with torchtitan 0.3.
3. Mixture of experts: a layer counts its tokens in eval mode too, so validation and scoring would change the bias that
   balances the experts. Here the counts are restored. Remove when torchtitan counts in training only.
4. Mixture of experts under tensor parallelism: each rank holds a partial sum of the router's gradient, and nothing sums
   these, so the router's replicas diverge (torchtitan #2387, fixed by #2416). Here the gradient is summed. Remove with
   torchtitan 0.3.
5. torch 2.13's pipeline schedules infer shapes by running the stages on uninitialised memory, and the experts count its
   tokens. Here the counts are restored. Remove when torch uses meta tensors for it.
6. Compiled blocks under tensor parallelism: the embedding passes the first block the result of a collective that has
   not finished (AsyncCollectiveTensor). torch 2.13 takes its gradient for a plain tensor and fails ("no attribute
   '_local_tensor'"), also in torchtitan's own trainer. Here the stream waits for it. Remove when torch fixes it.
7. Pipeline stages of torch 2.11 allocate their receive buffers at the first call. If that is a scoring or validation
   pass, the buffers have no gradients, and every later training step fails ("expecting to send gradients"). Here they
   always have gradients. Remove when torch 2.13, which allocates them again, is the oldest supported version.
8. torch 2.11 clips gradients with an operator that silently skips a DTensor with Partial placement: the gradient of a
   norm's weight under tensor parallelism without FSDP. Here the gradient is summed before. Remove with 7.
9. Under a pipeline torchtitan warns that ranks without the last stage log no loss. Here they do (metrics.py), so the
   warning is dropped. Remove when torchtitan logs the loss there.
10. llama4 in Hugging Face's format: torchtitan converts the experts to transposed views, which safetensors refuses, so
   a run with ``last_save_in_hf`` ends without its last weights. Here they are contiguous. Remove when torchtitan makes
   them so.

Other faults of torchtitan are fixed in modules that replace its code:

- trainer.py: gradients under DDP (#2323), ``n_tokens_seen`` under context parallelism (#2990)
- pipeline.py: gradients under a pipeline (#2972)
- metrics.py: ``global_max_loss`` (#3111)
- validator.py: the validation loss under context parallelism (#3257)
"""

import importlib
import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel

IS_CPU = not torch.accelerator.is_available()


_STAMP = re.compile(r"\d{8}-\d{4}")


def resumed_log_dir(log_dir: str) -> str:
    """Replace the time stamp in ``<tb>/<stamp>[/rank_N]`` by the newest stamp below ``<tb>``, if there is one."""
    parts = log_dir.split(os.sep)
    index = max((i for i, part in enumerate(parts) if _STAMP.fullmatch(part)), default=None)
    if index is None:
        return log_dir
    folder = os.sep.join(parts[:index]) or os.sep
    stamps = sorted(name for name in os.listdir(folder) if _STAMP.fullmatch(name)) if os.path.isdir(folder) else []
    return os.sep.join([*parts[:index], stamps[-1], *parts[index + 1 :]]) if stamps else log_dir


def wait_for_a_second_of_its_own(folder: str) -> None:
    """Wait until no event file in ``folder`` has this second in its name, at most two seconds.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second of their creation.
    After a start within the second of the one before it would hide the newer steps instead of those trained again.
    """
    names = [name.split(".") for name in os.listdir(folder)] if os.path.isdir(folder) else []
    seconds = [int(parts[3]) for parts in names if parts[:3] == ["events", "out", "tfevents"] and parts[3].isdigit()]
    wait = max(seconds, default=0) + 1 - time.time()
    if 0 < wait <= 2:
        time.sleep(wait)


def continue_tensorboard(*, resumed: bool) -> None:
    """Choose the TensorBoard folder for the run about to start; call before the metrics processor is built."""
    import torchtitan.components.metrics as titan_metrics
    from torch.utils.tensorboard import SummaryWriter

    stock = titan_metrics.BaseLogger

    class ContinuedTensorBoardLogger(stock):  # type: ignore[valid-type, misc]
        """torchtitan's TensorBoardLogger, opened at the first logged step to hide the steps that are trained again."""

        def __init__(self, log_dir: str, tag: str | None = None):
            self.log_dir = resumed_log_dir(log_dir) if resumed else log_dir
            self.tag = tag
            self.writer: SummaryWriter | None = None
            self.on_open: Callable[[SummaryWriter, int], None] | None = None
            titan_metrics.logger.info(f"TensorBoard logging enabled. Logs will be saved at {self.log_dir}")

        def _opened(self, step: int) -> SummaryWriter:
            if self.writer is None:
                wait_for_a_second_of_its_own(self.log_dir)
                # At every start, not only at a resume: some readers ignore the first purge they read.
                self.writer = SummaryWriter(self.log_dir, max_queue=1000, purge_step=step)
                if self.on_open is not None:
                    self.on_open(self.writer, step)
            return self.writer

        def log(self, metrics: dict[str, Any], step: int) -> None:
            for name, value in metrics.items():
                self._opened(step).add_scalar(name if self.tag is None else f"{self.tag}/{name}", value, step)

        def log_text(self, tag: str, text: str, step: int) -> None:
            self._opened(step).add_text(tag, text, step)

        def close(self) -> None:
            if self.writer is not None:
                self.writer.close()

    titan_metrics.TensorBoardLogger = ContinuedTensorBoardLogger


def fix_tied_embeddings() -> None:
    """Shard tied embeddings in one FSDP group; call before a model with ``enable_weight_tying`` is parallelised."""
    import torchtitan.models.llama4.infra.parallelize as llama4
    import torchtitan.models.qwen3.infra.parallelize as qwen3

    stock_apply, stock_shard = llama4.apply_fsdp, llama4.fully_shard

    def apply_fsdp(model: Any, *args: Any, **kwargs: Any) -> None:
        def shard(module: nn.Module | list[nn.Module], **config: Any) -> None:
            if module is model.tok_embeddings:
                return  # it is sharded below, together with the output that shares its weight
            if isinstance(module, list):
                module = [model.tok_embeddings, *module]
            stock_shard(module, **config)

        tied = getattr(model, "enable_weight_tying", False)
        with patch.object(llama4, "fully_shard", shard if tied else stock_shard):
            stock_apply(model, *args, **kwargs)

    qwen3.apply_fsdp = apply_fsdp


def fix_llama4_format() -> None:
    """Make the weights of llama4 contiguous, so that safetensors takes them."""
    from torchtitan.models.llama4.model.state_dict_adapter import Llama4StateDictAdapter as Adapter

    stock = Adapter.to_hf

    def to_hf(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: weight.contiguous() for name, weight in stock(self, state_dict).items()}

    Adapter.to_hf = to_hf


@contextmanager
def expert_counts_kept(model_parts: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the experts' token counts afterwards, for forward passes that are not training steps."""
    counts = [
        buffer for part in model_parts for name, buffer in part.named_buffers() if name.endswith("tokens_per_expert")
    ]
    before = [count.clone() for count in counts]
    try:
        yield
    finally:
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a process group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return collectives.wait_tensor(collectives.all_reduce(grads[0].contiguous(), "sum", ctx.group)), None


def fix_router_gradients(model: str) -> None:
    """Sum the gradients of expert scores over tensor parallel ranks; call before the model is parallelised."""
    # qwen3 and deepseek_v3 import llama4's function by name, so each module has its own reference.
    module: Any = importlib.import_module(f"torchtitan.models.{model}.infra.parallelize")
    stock = module.apply_moe_ep_tp

    def apply_moe_ep_tp(model: Any, *, tp_mesh: DeviceMesh | None, **kwargs: Any) -> None:
        stock(model, tp_mesh=tp_mesh, **kwargs)
        if tp_mesh is None:
            return
        group = tp_mesh.get_group()
        for block in model.layers.values():
            # Scores applied after the experts multiply a partial sum of the experts' output.
            if block.moe_enabled and not block.moe.score_before_experts:
                block.moe.router.gate.register_forward_hook(
                    lambda gate, args, scores: _SumGradient.apply(scores, group)
                )

    module.apply_moe_ep_tp = apply_moe_ep_tp


def patched_parallelize(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap torchtitan's ``parallelize_fn`` so that no block receives a tensor of an unfinished collective."""
    stock = RowwiseParallel._prepare_output_fn

    def prepare_output(layouts: Any, local: bool, module: nn.Module, outputs: DTensor, mesh: DeviceMesh) -> Tensor:
        return stock(layouts, local, module, outputs.redistribute(placements=layouts), mesh)

    def patched(*args: Any, **kwargs: Any) -> nn.Module:
        with patch.object(RowwiseParallel, "_prepare_output_fn", staticmethod(prepare_output)):
            return parallelize(*args, **kwargs)

    return patched


def fix_clipping() -> None:
    """Sum partial gradients before torchtitan clips them; call before the first step."""
    import torchtitan.distributed.utils as utils

    stock = utils.clip_grad_norm_

    def clip_grad_norm_(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        parameters = list(parameters)
        sum_gradients(parameters)
        return stock(parameters, *args, **kwargs)

    utils.clip_grad_norm_ = clip_grad_norm_


def drop_pipeline_warning() -> None:
    """Drop torchtitan's warning about the loss of pipeline ranks; call before a trainer is built."""
    import torchtitan.train

    torchtitan.train.ensure_pp_loss_visible = lambda *args: None


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient that is a ``Partial`` DTensor by its sum, equal on the ranks. A collective."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements):
            summed = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
            parameter.grad = grad.redistribute(placements=summed)


def fix_pipeline_start() -> None:
    """Let pipeline stages allocate buffers with gradients and keep expert counts while they infer shapes."""
    stock = PipelineStage._prepare_forward_infra
    takes_has_backward = "has_backward" in inspect.signature(stock).parameters  # since torch 2.13

    def prepare(self: PipelineStage, *args: Any, **kwargs: Any) -> Any:
        with_gradients = nullcontext() if takes_has_backward else patch.object(self, "_has_backward", True)
        with expert_counts_kept([self.submod]), with_gradients:
            return stock(self, *args, **kwargs)

    PipelineStage._prepare_forward_infra = prepare  # type: ignore[method-assign]
