"""Whether a run can still learn: ends one whose weights are no numbers any more, before they are saved.

One gradient that is NaN or infinite poisons AdamW's state and the weights for ever: a run whose loss is NaN once trains
to its end, and its purge drops the good checkpoints one by one. The rule:

- A run ends where its weights or its optimizer's state hold NaN or infinity. They are looked at before every save, so
  that no such checkpoint is written and no good one purged; before the first step and after the last; and where a
  logged step's loss, its gradient norm or a validation loss is not finite.
- A loss or norm that is not finite and leaves the weights finite (a norm that overflows, which clipping then makes a
  step of nothing) is a warning. After ``PATIENCE`` such logged steps in a row the run ends, too: it learns nothing.

What decides is equal on all ranks: a loss and a norm that are logged are (metrics.py), and what is looked at is
reduced over all of them. The weights are held in fp32 or bf16, and gradients may be either: the largest absolute value
is compared, which cannot overflow as a sum of squares can.

Cost: between forward and optimizer step three elementwise operations on one number a microbatch, which note the first
step whose loss was not finite, and no host sync. A save and a look: one read of the weights and the optimizer's state,
one all-reduce of two numbers, one host sync.
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
"""Logged steps in a row that may learn nothing."""
NEVER = 2**62
"""In place of a step."""
CAUSES = (
    "a smaller optimizer.lr, a longer lr_scheduler.warmup_steps or a smaller training.max_norm; where the same step "
    "fails again, look at its data"
)


def all_finite(tensors: Iterable[Tensor], *, device: torch.device) -> Tensor:
    """Whether no element is NaN or infinite: bool scalar on ``device``, without a host sync there. Each is read once;
    DTensors by their local part, integers not at all."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel():  # an empty one has no largest element
            by_device.setdefault(local.device, []).append(local.detach())
    finite = torch.ones((), dtype=torch.bool, device=device)
    for group in by_device.values():
        largest = torch._foreach_norm(group, math.inf)
        finite &= torch.stack([norm.float() for norm in largest]).isfinite().all().to(device)
    return finite


class Health:
    """Of a trainer, on all ranks.

    Args:
        trainer: torchtitan's, whose ``checkpointer`` is not replaced after.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.device: torch.device = trainer.device
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=self.device)
        self.fruitless = 0

    # -- what is told to it ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step. A collective."""
        if not self._look()[0]:
            self._end(
                f"the weights or the optimizer's state that this run starts from (step {self.trainer.step}) hold NaN or"
                " infinity: nothing can be learned from them. Load another checkpoint, an earlier one by "
                "checkpoint.load_step, or start anew in another job.dump_folder"
            )

    def saw(self, loss: Tensor) -> None:
        """The loss of a microbatch of the step under way, this rank's part of it; no host sync."""
        loss = loss.detach()
        loss = (loss.to_local() if isinstance(loss, DTensor) else loss).reshape(())
        here = torch.where(loss.isfinite(), NEVER, self.trainer.step)
        torch.minimum(self.first_bad, here, out=self.first_bad)

    def logged(self, step: int, loss: float, grad_norm: float) -> None:
        """A logged step; host numbers, equal on all ranks. A collective where one is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.fruitless = 0
            return
        self._look_or_end(step)
        self.fruitless += 1
        numbers = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if self.fruitless >= PATIENCE:
            self._end(
                f"{numbers}: not finite in {PATIENCE} logged steps in a row. The weights are finite, but nothing is "
                f"learned. {self._mend()}"
            )
        logger.warning(f"{numbers}: not finite; the weights are, and the run goes on")

    def validated(self, step: int, loss: float) -> None:
        """A validation; the same. A collective where it is not finite."""
        if not math.isfinite(loss):
            self._look_or_end(step)
            logger.warning(
                f"step {step}: the validation loss is {loss}, though the weights are finite: validation examples "
                "overflow, or none of them has a label. The run goes on"
            )

    def guarded(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """``save`` of the checkpointer, where a look comes first: at the last step in any case. A collective, as saving
        is."""

        def wrapper(curr_step: int, last_step: bool = False) -> Any:
            if last_step or self.trainer.checkpointer._should_save(curr_step, last_step):
                self._look_or_end(curr_step)
            return save(curr_step, last_step=last_step)

        return wrapper

    # -- looking --------------------------------------------------------------------------------------------------

    def _numbers(self) -> Iterator[Tensor]:
        for part in self.trainer.model_parts:
            yield from part.parameters()
        for optimizer in self.trainer.optimizers:
            for state in optimizer.state.values():
                yield from (value for key, value in state.items() if isinstance(value, Tensor) and key != "step")

    @torch.no_grad()
    def _look(self) -> tuple[bool, int]:
        """Whether all weights are finite, and the first step since the last look whose loss was not. A collective."""
        finite = all_finite(self._numbers(), device=self.device)
        found = torch.stack((finite.long(), self.first_bad))
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
        self.first_bad.fill_(NEVER)
        all_good, first = found.tolist()
        return bool(all_good), first

    def _look_or_end(self, step: int) -> None:
        finite, first = self._look()
        if not finite:
            what = f"the loss is not finite since step {first}" if first < NEVER else "a gradient was not finite"
            self._end(
                f"step {step}: {what}, and the weights or the optimizer's state hold NaN or infinity: nothing more can "
                f"be learned. They are not saved. {self._mend()}"
            )
        if first < NEVER:
            logger.warning(f"step {first}: the loss was not finite; the weights are, and the run goes on")

    def _mend(self) -> str:
        checkpointer, step = self.trainer.checkpointer, -1
        if checkpointer.enable:
            with suppress(Exception):  # of a save on its way, which would hide what ends the run
                checkpointer._async_wait()
            step = checkpointer._find_load_step()
        if step < 0:
            return f"There is no checkpoint to go on from. Start anew, with {CAUSES}"
        return (
            f"The last good checkpoint is {checkpointer._create_checkpoint_id(step)}, from which the same command goes "
            f"on; change something first: {CAUSES}"
        )

    def _end(self, message: str) -> NoReturn:
        """On all ranks alike, at the same place."""
        self.trainer.close()
        fail(ValueError(message))
