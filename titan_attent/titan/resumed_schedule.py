"""The optimizer's settings after a resume: those of the configuration, not those of the checkpoint.

torchtitan loads a checkpoint's learning rate, betas, eps and weight decay over the configuration's, and the base rate
of its schedule, so that a new ``optimizer.lr`` is ignored; and the rate of the first step is the last of the old
schedule, which of a finished run is 0. Here the checkpoint gives the moments and the step, and the configuration the
rest: step n of a resumed run has the rate that the configuration gives step n.

Cost: a few numbers.
"""

from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

SHOWN = {"initial_lr": "learning rate", "betas": "betas", "eps": "eps", "weight_decay": "weight decay"}


class Settings:
    """Those of freshly made optimizers; ``follow`` puts them back after a load."""

    def __init__(self, optimizers: OptimizersContainer, schedulers: LRSchedulersContainer):
        self.optimizers, self.schedulers = optimizers, schedulers
        self.groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def follow(self, *, step: int) -> None:
        """After ``step`` was loaded: the configuration's settings, at the step that the schedule has reached."""
        changes: dict[str, None] = {}
        for optimizer, scheduler, groups in zip(self.optimizers, self.schedulers, self.groups, strict=True):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            # As LambdaLR computes it, so that a resumed run without changes has the same rates to the last digit.
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            scheduler._last_lr = list(rates)
            for there, here, rate in zip(optimizer.param_groups, groups, rates, strict=True):
                changes |= dict.fromkeys(_changes(there, here | {"lr": rate}, step=step))
                there |= here | {"lr": rate}
        for change in changes:
            logger.warning(f"Resumed with other settings than the checkpoint's, and these hold: {change}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changes(there: dict[str, Any], here: dict[str, Any], *, step: int) -> list[str]:
    changes = [
        f"[optimizer] {name} {_text(here[key])} instead of {_text(there[key])}"
        for key, name in SHOWN.items()
        if key in there and key in here and not _equal(there[key], here[key])
    ]
    if not _equal(there["lr"], here["lr"]):
        changes.append(
            f"the learning rate of step {step + 1} is {_text(here['lr'])} instead of {_text(there['lr'])}, as "
            "[optimizer] lr, [lr_scheduler] and training.steps say now"
        )
    return changes


def _equal(a: Any, b: Any) -> bool:
    return [float(x) for x in _all(a)] == [float(x) for x in _all(b)]


def _all(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _text(value: Any) -> str:
    return ", ".join(f"{float(number):.6g}" for number in _all(value))
