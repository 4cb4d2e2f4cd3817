"""Highway backpropagation between pipeline stages: a schedule in which all stages run their backward at once.

This is the method of Fagnou et al. (ICLR 2025, arXiv 2501.17086) with pipeline stages as blocks. Stage p = 0 .. P-1
maps h_p to h_{p+1} = h_p + g_p(h_p), and J_p is its whole Jacobian. Gradients are row vectors. w^m_p is the gradient at
the output of stage p after m rounds. The last stage, with norm, head and loss, runs an ordinary backward first; g is
the exact gradient at its input. For p <= P-2:

    w^0_p = g,    w^m_{P-2} = g,    w^{m+1}_{p-1} = w^{m+1}_p + (w^m_p J_p - w^m_p)

The weights of stage p get their gradients from w^k_p. For m >= P-2-p, w^m_p is exact, hence the same for all such m.
There the difference is left out instead of computed as zero, so **k = P-2 rounds equal GPipe and 1F1B bit for bit**.
The paper starts from the gradient at the last block's output. Its k + 1 rounds take the time of k rounds here, and are
exact for the same number of stages. If the last stage holds only norm and head, both start from the same gradient.

The sum over the later stages goes down the pipeline as one message: stage p receives w^{m+1}_p, adds its own
w^m_p J_p - w^m_p and sends w^{m+1}_{p-1}. This adds no latency to a round: stage p starts P-2-p sends after stage P-2,
and the next round's message arrives when it has finished the previous one. Stage p takes part in rounds a_p .. b_p only
(:func:`span`): unused values are neither computed nor sent.

Cost, if forward, input gradients and weight gradients of each stage take one second each:

- Time per microbatch: P + k + 3 seconds and 2 (P - 1) sends; 1F1B takes 3 P seconds and as many sends.
- Work of stage p: that of backpropagation, and up to min(k, p) further input gradients.
- Messages per stage and microbatch: one forward and at most k + 1 backward, for any P.
- Memory: activations of all microbatches, as in GPipe, and k + 1 gradients of the residual stream's shape per
  microbatch.

Differences are computed in fp32 or better and sent in the stream's own precision.

Input and weight gradients are computed separately, as in torch's zero-bubble schedules, so compiled stages are refused
as in those. With activation checkpointing each pass over a stage recomputes its forward.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, ScheduleGPipe, _batch_p2p, _wait_batch_p2p
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def num_rounds(num_stages: int, iterations: int) -> int:
    """The number of rounds k: at most P - 2, which is exact; -1 also means P - 2."""
    if iterations < -1:
        raise ValueError(f"iterations = {iterations}: it must be at least 0, or -1 for exact gradients")
    max_rounds = max(0, num_stages - 2)
    return max_rounds if iterations == -1 else min(iterations, max_rounds)


def span(p: int, num_stages: int, rounds: int) -> tuple[int, int]:
    """The rounds (a_p, b_p) of stage p <= P-2: it needs w^m_p for m = a_p .. b_p."""
    exact = num_stages - 2 - p
    return min(max(0, rounds - p), exact), min(rounds, exact)


class HighwaySchedule(ScheduleGPipe):
    """The pipeline schedule of Highway backpropagation. ``step`` and ``eval`` are called as in torch's schedules.

    Args:
        stage: the only stage of the rank; its output is one hidden state. FSDP2 inside reduces once per step, as in
            torch's schedules.
        n_microbatches: any number; 1F1B needs at least P.
        loss_fn: (output, target) -> loss, on the last stage.
        iterations: k, see :func:`num_rounds`.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads: as in ``PipelineScheduleSingle``.

    Attributes:
        exact: whether the next steps run exactly, in GPipe's order. Set it between steps, to the same on all ranks.
        rounds: k.

    Raises:
        ValueError: the stage uses DDP, or has compiled modules.
    """

    def __init__(
        self,
        stage: PipelineStage,
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        iterations: int,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
    ):
        _check(stage)
        super().__init__(
            stage,
            n_microbatches,
            loss_fn,
            args_chunk_spec=args_chunk_spec,
            kwargs_chunk_spec=kwargs_chunk_spec,
            output_merge_spec=output_merge_spec,
            scale_grads=scale_grads,
        )
        self.rounds = num_rounds(stage.num_stages, iterations)
        self.exact = False

    def _step_microbatches(  # type: ignore[override]
        self,
        arg_mbs: list | None = None,
        kwarg_mbs: list | None = None,
        target_mbs: list | None = None,
        losses: list | None = None,
        return_outputs: bool = True,
        **loss: Any,
    ) -> None:
        """Run the microbatches of a step. ``loss`` is empty in torch 2.11; torch 2.13 passes ``loss_kwargs``."""
        if self.exact or not self._has_backward:
            super()._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, **loss)
            return
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        first_target = None if target_mbs is None else target_mbs[0]
        args = (arg_mbs[0], kwarg_mbs[0], first_target, *loss.values())  # how many are taken depends on torch
        self._initialize_stage(*args[: len(inspect.signature(self._initialize_stage).parameters)])

        stage, num = self._stage, self._n_microbatches
        # NCCL processes the messages of a rank, or of a pair of ranks, in the order of the calls. So the last stage
        # posts the receives of all inputs before it sends a gradient, as its neighbour receives none before it has sent
        # all inputs. Any other stage posts one receive at a time: an output posted after the receives of all inputs
        # would wait for the last of them.
        posted = [_batch_p2p(stage.get_fwd_recv_ops(i)) for i in range(num) if stage.is_last]
        sends: list[dist.Work] = []
        for i in range(num):
            _wait_batch_p2p(posted[i] if stage.is_last else _batch_p2p(stage.get_fwd_recv_ops(i)))
            output = stage.forward_one_chunk(i, arg_mbs[i], kwarg_mbs[i], save_forward_output=return_outputs)
            sends += _batch_p2p(stage.get_fwd_send_ops(i))
            self._maybe_compute_loss(stage, output, target_mbs, i, *loss.values())
            if stage.is_last:  # immediately, as the other stages wait for this gradient
                stage.backward_one_chunk(i, loss=self._maybe_get_loss(stage, i), full_backward=False)
                sends += _batch_p2p(stage.get_bwd_send_ops(i))
        for i in range(num):
            if stage.is_last:
                stage.backward_weight_one_chunk(i)
            else:
                sends += self._backward(i)
        _wait_batch_p2p(sends)
        self._update_losses(stage, losses)
        stage.perform_reduce_grad(num if self.scale_grads else 1)

    def _backward(self, i: int) -> list[dist.Work]:
        """Run all rounds of microbatch i on a stage before the last. Returns the pending sends."""
        stage, k = self._stage, self.rounds
        self._check_outputs(i)
        p = stage.stage_index
        first, last = span(p, stage.num_stages, k)
        # w^last is exact already, but the stage below needs one more round.
        sends_product = not stage.is_first and last == stage.num_stages - 2 - p < k
        w = self._receive(i)
        sends = self._send(i, w) if not stage.is_first and span(p - 1, stage.num_stages, k)[0] == 0 else []
        for _ in range(first, last):
            product = self._input_gradient(i, w)
            after = self._receive(i)
            sends += self._send(i, _corrected(product, after, w))
            w = after
        self._return_to_buffer(i, w)
        stage.backward_one_chunk(i, full_backward=not sends_product)
        if sends_product:
            sends += _batch_p2p(stage.get_bwd_send_ops(i))
            stage.backward_weight_one_chunk(i)
        else:
            del stage.bwd_cache[i]
        return sends

    def _receive(self, i: int) -> Tensor:
        _wait_batch_p2p(_batch_p2p(self._stage.get_bwd_recv_ops(i)))
        (w,) = self._stage._retrieve_recv_grads(i)
        return w.clone()  # up to torch 2.14 the next message overwrites the same buffer

    def _return_to_buffer(self, i: int, w: Tensor) -> None:
        """Put w back into the receive buffer for the stage's own backward; torch 2.15 empties it on reading."""
        (info,) = self._stage.grad_recv_info[i]
        if info.buffer is None:
            info.buffer = w.to_local() if isinstance(w, DTensor) else w

    def _send(self, i: int, w: Tensor) -> list[dist.Work]:
        self._stage.bwd_cache[i] = (w,)
        return _batch_p2p(self._stage.get_bwd_send_ops(i))

    def _input_gradient(self, i: int, w: Tensor) -> Tensor:
        """w J; the graph is kept."""
        module = self._stage.submod
        if isinstance(module, FSDPModule):  # as torch's stage does before each backward
            module.set_is_last_backward(False)
            module.set_reshard_after_backward(False)
            module.set_requires_gradient_sync(False)
        (output,), inputs = _ends(self._stage, i)
        (product,) = torch.autograd.grad(output, inputs[0], w, retain_graph=True)
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(True)  # the default; torch 2.15's stage relies on it outside of steps
        return product

    def _check_outputs(self, i: int) -> None:
        outputs, inputs = _ends(self._stage, i)
        if len(outputs) != 1 or (not self._stage.is_first and outputs[0].shape != inputs[0].shape):
            raise ValueError(
                f"stage {self._stage.stage_index} has outputs of shapes {[tuple(y.shape) for y in outputs]}: Highway "
                "backpropagation between stages needs one hidden state, of the shape of the stage's input"
            )


def highway_schedule(stock: PipelineScheduleSingle, iterations: int) -> HighwaySchedule:
    """The highway schedule with the stage, microbatches and loss of ``stock``, to be used instead of it.

    Raises:
        ValueError: ``stock`` has several stages per rank; or as in :class:`HighwaySchedule`.
    """
    if not isinstance(stock, PipelineScheduleSingle):
        raise ValueError(
            f"{type(stock).__name__}: Highway backpropagation needs one stage per rank. Use GPipe or 1F1B instead"
        )
    return HighwaySchedule(
        cast(PipelineStage, stock._stage),
        stock._n_microbatches,
        stock._loss_fn,
        iterations=iterations,
        args_chunk_spec=stock._args_chunk_spec,
        kwargs_chunk_spec=stock._kwargs_chunk_spec,
        output_merge_spec=stock._output_merge_spec,
        scale_grads=stock.scale_grads,
    )


def _ends(stage: Any, i: int) -> tuple[Any, Any]:
    """The outputs and inputs of microbatch i, with the graph between them; torch 2.15 renamed their storage."""
    if hasattr(stage, "fwd_cache"):
        return stage.fwd_cache[i]
    state = stage._forward_chunk_states[i]
    return state.stage_output_for_backward(), state.input_values


def _corrected(product: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """w^m J + (w^{m+1} - w^m)."""
    wide = torch.promote_types(product.dtype, torch.float32)
    return (product.to(wide) + (after.to(wide) - before.to(wide))).to(product.dtype)


def _check(stage: PipelineStage) -> None:
    if isinstance(stage.submod, DistributedDataParallel):
        raise ValueError(
            "a pipeline stage uses DDP, which reduces gradients in one backward, but Highway backpropagation runs "
            "several: use FSDP2 in the stages"
        )
    for name, module in stage.submod.named_modules():
        if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            raise ValueError(
                f"{name or 'the stage'} is compiled, and torch.compile cannot compute input and weight gradients "
                "separately: turn compilation off, or use another schedule"
            )
