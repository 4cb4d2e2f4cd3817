"""A resumed run has the settings of its configuration at every step, and logs every changed setting."""

from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.job_config import LRScheduler

from titan_attent.titan.resumed_schedule import OptimizerSettings

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Run:
    """Two parts of a model, each with an optimizer, as under a pipeline."""

    def __init__(self, *, steps: int, warmup: int = 2, **settings: Any):
        torch.manual_seed(0)
        self.parts: list[nn.Module] = [nn.ModuleDict({name: nn.Linear(3, 3)}) for name in ("a", "b")]
        self.optimizers = OptimizersContainer(self.parts, torch.optim.AdamW, SETTINGS | settings)
        self.schedulers: LRSchedulersContainer = build_lr_schedulers(
            self.optimizers, LRScheduler(warmup_steps=warmup), steps
        )
        self.settings = OptimizerSettings(self.optimizers, self.schedulers)

    def train(self, num_steps: int) -> list[float]:
        rates = []
        for _ in range(num_steps):
            for part in self.parts:
                sum(p.square().sum() for p in part.parameters()).backward()  # type: ignore[union-attr]
            (rate,) = {group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups}
            assert [rate] == self.schedulers.schedulers[0].get_last_lr()
            rates.append(rate)
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.schedulers.step()
        return rates

    def resumed(self, folder: Path, *, step: int) -> "Run":
        dcp.load({"o": self.optimizers, "s": self.schedulers}, checkpoint_id=folder, no_dist=True)
        self.settings.restore(step=step)
        return self

    def save(self, folder: Path) -> None:
        dcp.save({"o": self.optimizers, "s": self.schedulers}, checkpoint_id=folder, no_dist=True)


def test_the_same_settings_go_on_to_the_last_digit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight = Run(steps=12).train(12)
    cut = Run(steps=12)
    assert cut.train(5) == straight[:5]
    cut.save(tmp_path)
    assert Run(steps=12).resumed(tmp_path, step=5).train(7) == straight[5:]
    assert "takes precedence" not in caplog.text


@pytest.mark.parametrize(
    "changed",
    [{"steps": 18}, {"lr": 0.03}, {"warmup": 8}, {"steps": 40, "lr": 0.5, "warmup": 20}, {"steps": 13}],
    ids=str,
)
def test_other_settings_hold_from_the_resumed_step_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    """The rates are those of a run that had the new settings from the beginning."""
    first = Run(steps=12)
    assert first.train(12)[-1] > 0
    first.save(tmp_path)
    settings = {"steps": 18} | changed
    expected = Run(**settings).train(settings["steps"])[12:]
    assert Run(**settings).resumed(tmp_path, step=12).train(settings["steps"] - 12) == expected
    assert expected[0] > 0
    assert f"takes precedence: the learning rate of step 13 is {expected[0]:.6g} instead of 0" in caplog.text
    assert ("[optimizer] learning rate 0.03 instead of 0.1" in caplog.text) == (settings.get("lr") == 0.03)
    assert caplog.text.count("the learning rate of step 13") == 1, "once, not once per model part"


def test_betas_eps_and_weight_decay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Run(steps=12)
    first.train(4)
    first.save(tmp_path)
    again = Run(steps=12, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.0).resumed(tmp_path, step=4)
    for optimizer, before in zip(again.optimizers, first.optimizers, strict=True):
        (group,), (old,) = optimizer.param_groups, before.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.99), 1e-6, 0.0)
        for weight, was in zip(group["params"], old["params"], strict=True):  # the moments are the checkpoint's
            assert torch.equal(optimizer.state[weight]["exp_avg"], before.state[was]["exp_avg"])
            assert float(optimizer.state[weight]["step"]) == 4
    for words in (
        "betas 0.8, 0.99 instead of 0.9, 0.95",
        "eps 1e-06 instead of 1e-08",
        "weight decay 0 instead of 0.1",
    ):
        assert f"[optimizer] {words}" in caplog.text
    assert "the learning rate of step" not in caplog.text
