"""Training by the q-norm over inputs, with the package's own weights; and what a trained model does on new inputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titan_attent.losses.votes import metrics_of, vote
from titan_attent.losses.worst_case import PowerWeights, WorstCase, scale_gradients
from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN, SeededTask

AHEAD = 64
"""Steps whose rows are drawn at once."""


def words_of(task: SeededTask, split: str, first: int, num: int) -> Tensor:
    """The words of rows ``first`` to ``first + num - 1``, int64 [num, T]."""
    rows = task.rows(split, np.arange(first, first + num))
    return torch.from_numpy(rows.words.reshape(num, -1).astype(np.int64))


def train(model: Any, task: SeededTask, *, q: float, inputs: int, steps: int, rate: float) -> None:
    """``steps`` steps of Adam on new inputs each, ``inputs`` of them with ``task.seeds`` rows each."""
    rule = PowerWeights(q, task.seeds)
    worst = WorstCase(rule, first_scale=1.0, device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    size = inputs * task.seeds
    ahead: Sequence[Tensor] = ()
    for step in range(steps):
        if step % AHEAD == 0:
            ahead = words_of(task, TRAIN, step * size, AHEAD * size).split(size)
        losses, _, _ = model.rows(ahead[step % AHEAD])
        ones, seen = torch.ones(size), losses.detach()
        optimizer.zero_grad()
        (losses * rule(seen, ones, worst.scale)).mean().backward()
        worst.add(seen, ones)
        scale_gradients(model.parameters(), worst.finish())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: Any, task: SeededTask, *, inputs: int) -> dict[str, float]:
    """What the model does on new inputs, ``task.seeds`` rows of each: shares of inputs, and losses."""
    losses, answers, right = model.rows(words_of(task, IN_DISTRIBUTION, 0, inputs * task.seeds))
    right_Gm = right.view(inputs, task.seeds)
    votes = vote(right_Gm, answers.view(inputs, task.seeds, -1))
    shares, means = right_Gm.double().mean(dim=1), losses.view(inputs, task.seeds).double().mean(dim=1)
    of_inputs = torch.stack((means, shares, votes.double()), dim=1).numpy()
    never = {"right": float(shares.mean()), "never_right": float((shares == 0).double().mean())}
    return never | {"loss": float(means.mean())} | metrics_of(of_inputs)
