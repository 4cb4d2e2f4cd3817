"""Highway backpropagation between pipeline stages: a schedule in which all stages run their backward at once.

Fagnou et al., ICLR 2025, arXiv 2501.17086, with a pipeline stage for a block. Stage p = 0 .. P-1 maps h_p to
h_{p+1} = h_p + g_p(h_p), J_p is its whole Jacobian, gradients are rows. w^m_p is the gradient at the output of stage p
after m rounds. The last stage, with norm, head and loss, runs an ordinary backward first; g is the exact gradient at
its input. For p <= P-2:

    w^0_p = g,    w^m_{P-2} = g,    w^{m+1}_{p-1} = w^{m+1}_p + (w^m_p J_p - w^m_p)

The weights of stage p get their gradients from w^k_p. w^m_p is exact, hence the same, for all m >= P-2-p; there the
difference is left out rather than computed as zero, and **k = P-2 rounds give what GPipe and 1F1B give, bit for bit**.
The paper starts from the gradient at the last block's output: its k + 1 rounds take the time of k rounds here and are
exact for as many stages. A last stage of norm and head alone starts there, too.

The sum over the later stages goes down the pipeline as one message: stage p receives w^{m+1}_p, adds its own
w^m_p J_p - w^m_p and hands w^{m+1}_{p-1} on. No round costs latency for that: stage p started P-2-p sends after stage
P-2 and is found by the next round's message when it is done with the last one's. A stage takes part in rounds
a_p .. b_p only (:func:`span`): what is not used is neither computed nor sent.

Time of one microbatch, if forward, input and weight gradients of each stage take a second: P + k + 3, and two times
P - 1 sends; 1F1B takes 3 P and as many sends. Work of stage p: as backpropagation, and up to min(k, p) input gradients
more. Messages of a stage and microbatch: one forward, at most k + 1 backward, whatever P is. Memory: activations of all
microbatches, as in GPipe, and k + 1 gradients of the residual stream's shape a microbatch. Differences are taken in
fp32 or better and sent in the stream's own precision.

Input and weight gradients are split as in torch's zero-bubble schedules. So compiled stages are refused, as there; with
activation checkpointing each pass over a stage runs its forward again.
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
    """k: -1 is P - 2, which is exact, and more are as many."""
    if iterations < -1:
        raise ValueError(f"iterations = {iterations}: it must be at least 0, or -1 for exact gradients")
    most = max(0, num_stages - 2)
    return most if iterations == -1 else min(iterations, most)


def span(p: int, num_stages: int, rounds: int) -> tuple[int, int]:
    """(a_p, b_p), for p <= P-2: stage p needs w^m_p for m = a_p .. b_p."""
    exact = num_stages - 2 - p
    return min(max(0, rounds - p), exact), min(rounds, exact)


class HighwaySchedule(ScheduleGPipe):
    """See above. ``step`` and ``eval`` are the stock schedules'.

    Args:
        stage: the rank's only one; hands one hidden state on. FSDP2 inside is reduced once a step, as in torch's.
        n_microbatches: any number; 1F1B wants at least P.
        loss_fn: (output, target) -> loss, on the last stage.
        iterations: k, see :func:`num_rounds`.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads: as in ``PipelineScheduleSingle``.

    Attributes:
        exact: run the next steps in GPipe's order, exactly. Set alike on all ranks, between steps.
        rounds: k.

    Raises:
        ValueError: for a stage in DDP, or with compiled modules.
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
        """``loss``: torch 2.13 hands ``loss_kwargs`` on, 2.11 does not."""
        if self.exact or not self._has_backward:
            super()._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, **loss)
            return
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        first_target = None if target_mbs is None else target_mbs[0]
        known = (arg_mbs[0], kwarg_mbs[0], first_target, *loss.values())
        self._initialize_stage(*known[: len(inspect.signature(self._initialize_stage).parameters)])

        stage, num = self._stage, self._n_microbatches
        # NCCL serves the messages of a rank, or of a pair of ranks, in the order of the calls. So the last stage asks
        # for all inputs before it sends a gradient: its neighbour takes none before it has sent them all. Any other
        # stage asks for one at a time: an output behind all inputs would wait for the last of them.
        ahead = [_batch_p2p(stage.get_fwd_recv_ops(i)) for i in range(num) if stage.is_last]
        sends: list[dist.Work] = []
        for i in range(num):
            _wait_batch_p2p(ahead[i] if stage.is_last else _batch_p2p(stage.get_fwd_recv_ops(i)))
            output = stage.forward_one_chunk(i, arg_mbs[i], kwarg_mbs[i], save_forward_output=return_outputs)
            sends += _batch_p2p(stage.get_fwd_send_ops(i))
            self._maybe_compute_loss(stage, output, target_mbs, i, *loss.values())
            if stage.is_last:  # at once: the others wait for it
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
        """All rounds of microbatch i on a stage before the last; returns what is still being sent."""
        stage, k = self._stage, self.rounds
        self._check_outputs(i)
        p = stage.stage_index
        first, last = span(p, stage.num_stages, k)
        goes_on = not stage.is_first and last == stage.num_stages - 2 - p < k  # exact, and asked for one round more
        w = self._receive(i)
        sends = self._send(i, w) if not stage.is_first and span(p - 1, stage.num_stages, k)[0] == 0 else []
        for _ in range(first, last):
            product = self._input_gradient(i, w)
            after = self._receive(i)
            sends += self._send(i, _corrected(product, after, w))
            w = after
        self._hand_back(i, w)
        stage.backward_one_chunk(i, full_backward=not goes_on)
        if goes_on:
            sends += _batch_p2p(stage.get_bwd_send_ops(i))
            stage.backward_weight_one_chunk(i)
        else:
            del stage.bwd_cache[i]
        return sends

    def _receive(self, i: int) -> Tensor:
        _wait_batch_p2p(_batch_p2p(self._stage.get_bwd_recv_ops(i)))
        (w,) = self._stage._retrieve_recv_grads(i)
        return w.clone()  # up to torch 2.14 the next one comes into the same buffer

    def _hand_back(self, i: int, w: Tensor) -> None:
        """The stage's own backward takes w from the buffer, which torch 2.15 empties when it is read."""
        (info,) = self._stage.grad_recv_info[i]
        if info.buffer is None:
            info.buffer = w.to_local() if isinstance(w, DTensor) else w

    def _send(self, i: int, w: Tensor) -> list[dist.Work]:
        self._stage.bwd_cache[i] = (w,)
        return _batch_p2p(self._stage.get_bwd_send_ops(i))

    def _input_gradient(self, i: int, w: Tensor) -> Tensor:
        """w J; the graph stays."""
        module = self._stage.submod
        if isinstance(module, FSDPModule):  # as torch's stage does before each backward
            module.set_is_last_backward(False)
            module.set_reshard_after_backward(False)
            module.set_requires_gradient_sync(False)
        (output,), inputs = _ends(self._stage, i)
        (product,) = torch.autograd.grad(output, inputs[0], w, retain_graph=True)
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(True)  # the default, on which torch 2.15's stage relies outside of steps
        return product

    def _check_outputs(self, i: int) -> None:
        outputs, inputs = _ends(self._stage, i)
        if len(outputs) != 1 or (not self._stage.is_first and outputs[0].shape != inputs[0].shape):
            raise ValueError(
                f"stage {self._stage.stage_index} hands on {[tuple(y.shape) for y in outputs]}: highway "
                "backpropagation between stages needs one hidden state, of the shape of the stage's input"
            )


def highway_schedule(stock: PipelineScheduleSingle, iterations: int) -> HighwaySchedule:
    """The highway schedule of a schedule's stage, microbatches and loss, to be used instead of it.

    Raises:
        ValueError: for a schedule of several stages a rank, and as :class:`HighwaySchedule`.
    """
    if not isinstance(stock, PipelineScheduleSingle):
        raise ValueError(f"{type(stock).__name__}: highway backpropagation wants one stage a rank, as in GPipe or 1F1B")
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
    """Outputs and inputs of microbatch i, with the graph between them; torch 2.15 keeps them under another name."""
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
        raise ValueError("DDP reduces gradients in one backward, here are several: use FSDP2 in the stages")
    for name, module in stage.submod.named_modules():
        if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            raise ValueError(
                f"{name or 'the stage'} is compiled, and torch.compile does not split input and weight gradients: "
                "turn compilation off, or use another schedule"
            )
