"""One run: the authors' AdamW and cosine schedule, in fewer and smaller steps, and the scores of every split.

As in their code: weight decay for matrices alone, a linear warm-up of 100 (fuzzy logic) or 1,000 steps (SRAVEN) and a
cosine down to a tenth of the peak, no dropout, no clipping. Seeds set the split of the task, its rows and the weights.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.hyla.models import ReferenceModel
from benchmarks.hyla.problems import PROBLEMS, Problem
from titan_attent.tasks.task import TRAIN

CURVE_ROWS = 512
"""Rows of a split for a point of the curve before its last."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run, which are also its identity."""

    task: str
    method: str
    seed: int
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: int
    measured_rows: int = 4096
    pilot: bool = False

    @property
    def name(self) -> str:
        last = f"pilot-{self.lr}" if self.pilot else f"seed-{self.seed}"
        return f"{self.task}/{self.method}/{last}"


def learning_rate(run: Run, step: int) -> float:
    """The rate of ``step``, counted from 0."""
    if step < run.warmup:
        return run.lr * step / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def measure(model: ReferenceModel, problem: Problem, num_rows: int) -> dict[str, float]:
    """The mean score of ``num_rows`` rows of each split."""
    found, batch_size = {}, min(256, num_rows)
    with torch.no_grad():
        for split in problem.splits:
            batches = (problem.batch(split, i, batch_size) for i in range(-(-num_rows // batch_size)))
            scores = torch.cat([problem.scores(model(batch.inputs), batch) for batch in batches])
            found[split] = scores.double().mean().item()
    return found


def train(run: Run) -> dict[str, Any]:
    """Train and measure; returns the result in types of JSON."""
    torch.manual_seed(run.seed)
    problem: Problem = PROBLEMS[run.task](seed=run.seed)
    model = ReferenceModel(problem, run.task, run.method)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": run.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=run.lr,
        fused=True,
    )
    started, losses, curve = time.process_time(), [], []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
        batch = problem.batch(TRAIN, step, run.batch_size)
        loss = problem.loss(model(batch.inputs), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % max(1, run.steps // 10) == 0 or step + 1 == run.steps:
            mean, losses = torch.stack(losses).mean().item(), []
            num_rows = run.measured_rows if step + 1 == run.steps else min(CURVE_ROWS, run.measured_rows)
            curve.append({"step": step + 1, "loss": mean} | measure(model, problem, num_rows))
    return {
        "run": asdict(run),
        "scores": {split: curve[-1][split] for split in problem.splits},
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": time.process_time() - started,
    }
