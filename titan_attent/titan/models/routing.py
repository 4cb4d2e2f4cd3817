"""Routing as a system of a run: exploration noise, the balance loss, and the shares of the experts in the log.

    a batch is read   keys of the noise, for the step that trains it
    microbatch        balance loss x its weight, and counts of sequences and tokens per expert, on the device
    after a step      one all-reduce of the counts; the moving average of the shares, for the balance loss
    a logged step     shares of the steps up to the one before

Cost: per step one all-reduce of 16 bytes per layer and expert on the ``batch`` mesh, and one copy to the host before a
logged step.
"""

import json
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.mot.config import MotConfig
from titan_attent.models.mot.gate import balance_loss, count_routes, route_keys
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Batch, Columns, ExampleStats, LossFunction, Panel, Run, StepLoss, System

ROUTE_KEYS = "route_keys"
"""The tensor of a batch that the model takes beside the tokens, int64 [B]. It is no column: the model reads it."""
MEMORY = 0.9
"""Weight of the earlier steps in the moving average of the shares."""
SEQUENCES, TOKENS = "mot/sequence_share/", "mot/token_share/"


class Routing(System):
    """The system of the section ``[mot]``; takes part in every run of ``mot_attent``."""

    name = "mot"
    keeps_state = True
    panels = (
        Panel("sequences per expert", family=SEQUENCES, map=True),
        Panel("collapse of experts", ("mot/largest_sequence_share", "mot/balance"), right="mot/balance"),
    )

    @classmethod
    def is_on(cls, config: MotConfig) -> bool:
        return True

    @classmethod
    def identity(cls, config: MotConfig, settings: RunSettings) -> dict[str, Any]:
        keys = ("num_experts", "prefix", "shared_attention", "seed")
        return {f"mot.{key}": getattr(config, key) for key in keys}

    config: MotConfig

    def __init__(self, run: Run, config: MotConfig):
        super().__init__(run, config)
        self.model = cast(Any, run.model_parts[0])
        shape = (self.model.model_args.n_layers, config.num_experts)
        kwargs: dict[str, Any] = {"dtype": torch.float64, "device": run.device}
        self.shares = torch.full(shape, 1 / config.num_experts, **kwargs)
        """The moving average of the shares of the sequences, fp64 [N, E], the same on all ranks."""
        self.of_step = torch.zeros(2, *shape, **kwargs)
        """Sequences and tokens of the current step per layer and expert, of this rank."""
        self.since_log = torch.zeros(2, *shape, **kwargs)
        """The same of all ranks, since the last copy to the host."""
        self.scalars: dict[str, float] = {}

    def read_columns_of_step(self, example_ids: Tensor, step: int, *, skipped: Tensor | None = None) -> Columns:
        config = self.config
        if config.noise == 0 or 0 < config.noise_steps < step:
            return {}
        return {ROUTE_KEYS: route_keys(example_ids, seed=config.seed, step=step)}

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        return partial(self._balanced, loss) if self.config.balance > 0 else loss

    def _balanced(self, loss: LossFunction, pred: Tensor, batch: Batch) -> StepLoss:
        """``loss`` plus the balance loss of each sequence times its valid tokens: a mean over the tokens, as it."""
        stepped = loss(pred, batch)
        valid = (batch.labels != IGNORE_INDEX).sum(dim=1)
        balance = (balance_loss(self.model.probabilities, self.shares.to(torch.float32)) * valid).sum()
        return stepped._replace(to_differentiate=stepped.to_differentiate + self.config.balance * balance)

    def after_microbatch(self, batch: Batch, stats: ExampleStats | None) -> None:
        routes, valid = self.model.routes, (batch.labels != IGNORE_INDEX).sum(dim=1)
        count = partial(count_routes, routes, num_experts=self.config.num_experts)
        self.of_step += torch.stack((count(torch.ones_like(valid)), count(valid)))

    def after_step(self) -> None:
        mesh = self.run.mesh("batch")
        if mesh is not None:
            dist.all_reduce(self.of_step, group=mesh.get_group())
        sequences = self.of_step[0]
        self.shares.mul_(MEMORY).add_(sequences / sequences.sum(dim=1, keepdim=True), alpha=1 - MEMORY)
        self.since_log += self.of_step
        self.of_step.zero_()
        if (self.run.step() + 1) % self.run.settings.log_every == 0:
            self._copy_to_host()

    def _copy_to_host(self) -> None:
        shares = self.since_log / self.since_log.sum(dim=2, keepdim=True)
        largest = shares[0].amax(dim=1)
        balance = self.shares.square().sum(dim=1).mean() * self.config.num_experts
        numbers = torch.cat((shares.flatten(), largest.mean().view(1), balance.view(1))).tolist()
        self.since_log.zero_()
        num_layers, num_experts = self.shares.shape
        names = [f"{layer}.{expert}" for layer in range(num_layers) for expert in range(num_experts)]
        tags = [SEQUENCES + name for name in names] + [TOKENS + name for name in names]
        self.scalars = dict(zip([*tags, "mot/largest_sequence_share", "mot/balance"], numbers, strict=True))

    def metrics(self) -> dict[str, float]:
        return self.scalars

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares, "since_log": self.since_log, "scalars": json.dumps(self.scalars)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shares.copy_(cast(Tensor, state["shares"]))
        self.since_log.copy_(cast(Tensor, state["since_log"]))
        self.scalars = json.loads(state["scalars"])
