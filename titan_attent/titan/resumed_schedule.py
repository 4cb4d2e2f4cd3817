"""Restores the configuration's optimizer settings after a resume, which torchtitan replaces by the checkpoint's.

torchtitan loads learning rate, betas, eps, weight decay and the schedule's base rate from the checkpoint, so that a new
``optimizer.lr`` is ignored. Its first resumed step has the last rate of the old schedule, which is 0 for a finished
run. Here only the moments and the step come from the checkpoint. Step n of a resumed run has the learning rate that the
configuration gives to step n.

Cost: a few numbers.
"""

from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

SHOWN = {"initial_lr": "learning rate", "betas": "betas", "eps": "eps", "weight_decay": "weight decay"}


class OptimizerSettings:
    """The settings of newly built optimizers; :meth:`restore` puts them back after a checkpoint was loaded."""

    def __init__(self, optimizers: OptimizersContainer, schedulers: LRSchedulersContainer):
        self.optimizers, self.schedulers = optimizers, schedulers
        self.groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def restore(self, *, step: int) -> None:
        """Restore the settings after the checkpoint of ``step`` was loaded, and log every setting that changed."""
        changes: dict[str, None] = {}
        for optimizer, scheduler, groups in zip(self.optimizers, self.schedulers, self.groups, strict=True):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            # As LambdaLR computes it: an unchanged configuration resumes with bit-identical rates.
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            scheduler._last_lr = list(rates)
            for loaded, configured, rate in zip(optimizer.param_groups, groups, rates, strict=True):
                changes |= dict.fromkeys(_changes(loaded, configured | {"lr": rate}, step=step))
                loaded |= configured | {"lr": rate}
        for change in changes:
            logger.warning(f"The configuration differs from the checkpoint and takes precedence: {change}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changes(loaded: dict[str, Any], configured: dict[str, Any], *, step: int) -> list[str]:
    changes = [
        f"[optimizer] {name} {_text(configured[key])} instead of {_text(loaded[key])}"
        for key, name in SHOWN.items()
        if key in loaded and key in configured and not _equal(loaded[key], configured[key])
    ]
    if not _equal(loaded["lr"], configured["lr"]):
        changes.append(
            f"the learning rate of step {step + 1} is {_text(configured['lr'])} instead of {_text(loaded['lr'])}, as "
            "set by [optimizer] lr, [lr_scheduler] and training.steps"
        )
    return changes


def _equal(a: Any, b: Any) -> bool:
    return [float(x) for x in _as_list(a)] == [float(x) for x in _as_list(b)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _text(value: Any) -> str:
    return ", ".join(f"{float(number):.6g}" for number in _as_list(value))
