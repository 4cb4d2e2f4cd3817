"""Ends a run whose weights contain NaN or infinity, before they are saved.

One NaN or infinite gradient makes AdamW's state and the weights non-finite for the rest of the run. Without this check,
such a run trains to its end, and purges its good checkpoints one by one. The rule:

- A run ends if its weights or its optimizer's state hold NaN or infinity. They are checked before every save, so that
  no such checkpoint is written and no good one is purged; before the first step and after the last; and when a logged
  loss, gradient norm or validation loss is not finite.
- A non-finite loss or norm is a warning if the weights are finite, for example if the norm overflows, and clipping then
  scales the gradient to 0. After ``PATIENCE`` such logged steps in a row the run ends as well, as it learns nothing.

All ranks decide alike: logged losses and norms are equal on all ranks (metrics.py), and the result of a check is
reduced over all ranks. Weights and gradients may be fp32 or bf16. The check compares the largest absolute value, which
cannot overflow as a sum of squares can.

Cost: between forward and optimizer step, three elementwise operations on one number per microbatch, to note the first
step with a non-finite loss; no host sync. Per check: one read of the weights and the optimizer's state, one all-reduce
of two numbers, one host sync.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.tools.logging import logger

from titan_attent.titan.user_errors import fail

PATIENCE = 3
"""The number of consecutive logged steps with a non-finite loss or norm after which a run ends."""
NEVER = 2**62
"""The value of ``first_bad`` while all losses are finite; larger than any step."""
CAUSES = (
    "a smaller optimizer.lr, a longer lr_scheduler.warmup_steps or a smaller training.max_norm; where the same step "
    "fails again, check its data"
)
"""Settings to change before resuming a run with non-finite weights, for the message."""

NO_LABELS = (
    "a longer training.seq_len or a larger training.global_batch_size: no token of the batch has a label that counts, "
    "as in a span of a document that holds only a part of its prompt"
)
"""The same where the loss is not finite because it is the mean over no label."""


def all_finite(tensors: Iterable[Tensor], *, device: torch.device) -> Tensor:
    """Whether all elements are finite: a bool scalar on ``device``, without a host sync. Every element is read once. Of
    DTensors only the local shard is read; integer tensors are ignored."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel():  # an empty tensor has no largest element
            by_device.setdefault(local.device, []).append(local.detach())
    finite = torch.ones((), dtype=torch.bool, device=device)
    for group in by_device.values():
        largest = torch._foreach_norm(group, math.inf)
        finite &= torch.stack([norm.float() for norm in largest]).isfinite().all().to(device)
    return finite


class Health:
    """Checks the losses and weights of a trainer, on all ranks.

    Args:
        trainer: torchtitan's Trainer; its ``checkpointer`` must not be replaced afterwards.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.device: torch.device = trainer.device
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=self.device)
        self.num_bad_logs = 0

    # -- called by the trainer ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Check the weights before the first step. A collective."""
        if not self._check()[0]:
            self._end(
                f"the weights or the optimizer's state that this run starts from (step {self.trainer.step}) hold NaN or"
                " infinity. Load another checkpoint (an earlier one with checkpoint.load_step), or start a new run in "
                "another job.dump_folder"
            )

    def saw(self, loss: Tensor) -> None:
        """Note the loss of a microbatch of the current step on this rank; no host sync."""
        loss = loss.detach()
        loss = (loss.to_local() if isinstance(loss, DTensor) else loss).reshape(())
        bad_step = torch.where(loss.isfinite(), NEVER, self.trainer.step)
        torch.minimum(self.first_bad, bad_step, out=self.first_bad)

    def logged(self, step: int, loss: float, grad_norm: float) -> None:
        """Check a logged step; host numbers, equal on all ranks. A collective if one of them is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.num_bad_logs = 0
            return
        self._check_or_end(step)
        self.num_bad_logs += 1
        numbers = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        causes = CAUSES if self.trainer.num_labels else NO_LABELS
        if self.num_bad_logs >= PATIENCE:
            self._end(
                f"{numbers}: not finite in {PATIENCE} logged steps in a row. The weights are finite, but the model "
                f"learns nothing. {self._fix(causes)}"
            )
        why = "" if self.trainer.num_labels else ", as no token of the batch has a label that counts"
        logger.warning(f"{numbers}: not finite{why}; the weights are finite, and the run continues")

    def validated(self, step: int, loss: float) -> None:
        """Check a validation loss, equal on all ranks. A collective if it is not finite."""
        if not math.isfinite(loss):
            self._check_or_end(step)
            logger.warning(
                f"step {step}: the validation loss is {loss}, though the weights are finite: validation examples "
                "overflow, or none of them has a label. The run continues"
            )

    def guarded(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the checkpointer's ``save`` to check the weights before every save, and always at the last step. A
        collective, like a save."""

        def wrapper(curr_step: int, last_step: bool = False) -> Any:
            if last_step or self.trainer.checkpointer._should_save(curr_step, last_step):
                self._check_or_end(curr_step)
            return save(curr_step, last_step=last_step)

        return wrapper

    # -- checks of the weights ------------------------------------------------------------------------------------

    def _numbers(self) -> Iterator[Tensor]:
        for part in self.trainer.model_parts:
            yield from part.parameters()
        for optimizer in self.trainer.optimizers:
            for state in optimizer.state.values():
                yield from (value for key, value in state.items() if isinstance(value, Tensor) and key != "step")

    @torch.no_grad()
    def _check(self) -> tuple[bool, int]:
        """Whether all weights are finite, and the first step since the last check with a non-finite loss, or ``NEVER``.
        A collective."""
        finite = all_finite(self._numbers(), device=self.device)
        state = torch.stack((finite.long(), self.first_bad))
        torch.distributed.all_reduce(state, op=torch.distributed.ReduceOp.MIN)
        self.first_bad.fill_(NEVER)
        is_finite, first_bad = state.tolist()
        return bool(is_finite), first_bad

    def _check_or_end(self, step: int) -> None:
        is_finite, first_bad = self._check()
        if not is_finite:
            has_bad_loss = first_bad < NEVER
            cause = f"the loss is not finite since step {first_bad}" if has_bad_loss else "a gradient was not finite"
            self._end(
                f"step {step}: {cause}, and the weights or the optimizer's state hold NaN or infinity. They are not "
                f"saved. {self._fix()}"
            )
        if first_bad < NEVER:
            logger.warning(f"step {first_bad}: the loss was not finite; the weights are finite, and the run continues")

    def _fix(self, causes: str = CAUSES) -> str:
        checkpointer, step = self.trainer.checkpointer, -1
        if checkpointer.enable:
            with suppress(Exception):  # an error of a pending save would hide why the run ends
                checkpointer._async_wait()
            step = checkpointer._find_load_step()
        if step < 0:
            return f"There is no checkpoint to resume from. Start again with {causes}"
        return (
            f"The last good checkpoint is {checkpointer._create_checkpoint_id(step)}. The same command resumes from "
            f"it; change a setting first: {causes}"
        )

    def _end(self, message: str) -> NoReturn:
        """End the run; all ranks call this at the same point."""
        self.trainer.close()
        fail(ValueError(message))
