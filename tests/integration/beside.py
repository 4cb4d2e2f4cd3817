"""An external test system that pulls the learner's logits towards those of a frozen model.

With ``targets`` the frozen logits come from disk instead: the ids and values of the largest K of each token, as columns
[B, L, K] of the batch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from titan_attent import job_config
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Batch, Columns, DataFacts, LossFunction, Run, StepLoss, System


@dataclass
class BesideConfig:
    checkpoint: str = ""
    """Checkpoint of the frozen model; empty for none."""

    targets: str = ""
    """A file written by torch.save: {"ids": int32 [N, L, K], "logits": bfloat16 [N, L, K]}."""

    weight: float = 1.0
    """Weight of the added loss term, a mean squared difference of logits."""


@dataclass
class JobConfig(job_config.JobConfig):
    beside: BesideConfig = field(default_factory=BesideConfig)


class Beside(System):
    name = "beside"

    @classmethod
    def is_on(cls, config: BesideConfig) -> bool:
        return bool(config.checkpoint or config.targets)

    @classmethod
    def check(cls, config: BesideConfig, settings: RunSettings) -> None:
        if config.targets and settings.degrees.context > 1:
            raise ValueError("[beside] targets with context parallelism: a column is whole on each rank. Set it to 1")

    @classmethod
    def check_data(cls, config: BesideConfig, facts: DataFacts) -> None:
        if config.checkpoint:
            facts.check_frozen(config.checkpoint)

    def __init__(self, run: Run, config: BesideConfig):
        super().__init__(run, config)
        self.frozen = run.build_frozen(config.checkpoint) if config.checkpoint else None
        self.targets = torch.load(config.targets) if config.targets else None
        self.columns = ("top_ids", "top_logits") if config.targets else ()

    def read_columns(self, example_ids: Tensor) -> Columns:
        if self.targets is None:
            return {}
        return {"top_ids": self.targets["ids"][example_ids], "top_logits": self.targets["logits"][example_ids]}

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        def with_term(pred: Tensor, batch: Batch) -> StepLoss:
            inner = loss(pred, batch)
            term = self._towards_columns(pred, batch) if self.frozen is None else self._towards_frozen(pred, batch)
            return inner._replace(to_differentiate=inner.to_differentiate + self.config.weight * term)

        return with_term

    def _towards_frozen(self, pred: Any, batch: Batch) -> Tensor:
        assert self.frozen is not None and batch.inputs.shape == batch.labels.shape
        return whole((pred.float() - self.frozen(batch.inputs).float()).square().mean(dim=-1).sum())

    def _towards_columns(self, pred: Any, batch: Batch) -> Tensor:
        ids, logits = batch.columns["top_ids"].long(), batch.columns["top_logits"].float()
        whole_pred = pred.redistribute(placements=[Replicate()]).to_local() if isinstance(pred, DTensor) else pred
        return (whole_pred.float().gather(-1, ids) - logits).square().mean(dim=-1).sum()


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def write_targets(path: Path, *, num_examples: int, seq_len: int, vocab_size: int, k: int = 3) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(vocab_size, (num_examples, seq_len, k), generator=generator, dtype=torch.int32)
    logits = torch.randn(num_examples, seq_len, k, generator=generator).bfloat16()
    torch.save({"ids": ids, "logits": logits}, path)


SYSTEMS = (Beside,)
