"""Training by the q-norm over inputs, with the package's own weights; and what a trained model does on new inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titan_attent.losses.worst_case import PowerWeights, WorstCase, scale_gradients
from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN, SeededTask


def words_of(task: SeededTask, split: str, first: int, num: int) -> Tensor:
    """The words of rows ``first`` to ``first + num - 1``, int64 [num, T]."""
    rows = task.rows(split, np.arange(first, first + num))
    return torch.from_numpy(rows.words.reshape(num, -1).astype(np.int64))


def train(
    model: Any, task: SeededTask, *, q: float, inputs: int, steps: int, rate: float, look: Callable[[int], None]
) -> None:
    """``steps`` steps of Adam on new inputs each, ``inputs`` of them with ``task.seeds`` rows each.

    Args:
        look: called with the number of each finished step.
    """
    rule = PowerWeights(q, task.seeds)
    worst = WorstCase(rule, first_scale=1.0, device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    size = inputs * task.seeds
    for step in range(steps):
        losses, _ = model.rows(words_of(task, TRAIN, step * size, size))
        ones, seen = torch.ones(size), losses.detach()
        optimizer.zero_grad()
        (losses * rule(seen, ones, worst.scale)).mean().backward()
        worst.add(seen, ones)
        scale_gradients(model.parameters(), worst.finish())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        look(step + 1)


@torch.no_grad()
def measure(model: Any, task: SeededTask, *, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss, whether right), [inputs, seeds] each, of inputs that were not trained."""
    losses, right = model.rows(words_of(task, IN_DISTRIBUTION, 0, inputs * task.seeds))
    return losses.view(inputs, task.seeds).numpy(), right.view(inputs, task.seeds).numpy()
