"""A run that is poisoned on one rank ends on all ranks before a save, and resumes from the last good checkpoint. A
folder that another run uses is refused."""

import fcntl
import os
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from launch import launch, read_checkpoint, read_scalars, run
from torch.distributed.tensor import DTensor

from titan_attent.titan.trainer import TeachingTrainer

STEPS, POISONED, INTERVAL = 10, 5, 2


def poison(step: int) -> None:
    """Prepares the worker of rank 1: from ``step`` on its losses are NaN, and the gradients of what it holds."""
    if os.environ["RANK"] != "1":
        return
    stock = TeachingTrainer.forward_backward_step

    def forward_backward_step(self: TeachingTrainer, **kwargs: Any) -> torch.Tensor:
        loss = stock(self, **kwargs)
        if self.step < step:
            return loss
        for parameter in self.model_parts[0].parameters():
            grad = parameter.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(torch.nan)  # type: ignore[union-attr]
        self.health.saw(loss * torch.nan)
        return loss * torch.nan

    TeachingTrainer.forward_backward_step = forward_backward_step  # type: ignore[method-assign]


def test_a_poisoned_run_ends_before_it_saves_and_goes_on_from_the_last_good_checkpoint(
    small_run: list[str], tmp_path: Path
) -> None:
    arguments = [
        *small_run,
        *("--job.dump_folder", str(tmp_path), "--training.steps", str(STEPS), "--metrics.log_freq", "100"),
        *("--checkpoint.enable", "--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest_k", "2"),
    ]
    ended = launch(*arguments, prepare=partial(poison, POISONED))
    output = ended.stdout + ended.stderr
    assert ended.returncode, output
    assert output.count("titan_attent: error: ") == 1 and "Traceback" not in output
    (message,) = (line for line in output.splitlines() if line.startswith("titan_attent: error: "))
    assert f"step 6: the loss is not finite since step {POISONED}, and the weights" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoint' / 'step-4'}" in message
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*")) == ["step-2", "step-4"]
    saved = read_checkpoint(tmp_path, step=4)
    assert all(tensor.isfinite().all() for tensor in saved.values() if isinstance(tensor, torch.Tensor))

    # This process takes the folder's lock, as another run would.
    with open(tmp_path / "run.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run that ended does not hold it
        refused = launch(*arguments)
    assert refused.returncode
    assert refused.stderr.count("another run is using this folder") == 1 and "Traceback" not in refused.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*")) == ["step-2", "step-4"]

    run(*arguments, "--metrics.log_freq", "1")
    assert sorted(read_scalars(tmp_path, "loss_metrics/global_avg_loss"))[-6:] == list(range(5, STEPS + 1))
