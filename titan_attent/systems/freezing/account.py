"""What freezing saves, by kind, and what probing costs. Host numbers, counted step by step, so that a resume goes on.

FLOPs are counted as in units.py; probing is charged: a probe example takes a forward pass and the input gradients.
Bytes are what no longer enters a reduce-scatter under FSDP2, over all ranks' parameters. Seconds are measured: what a
step took while every module was active, less what it takes now. The first steps of a process, which compile and
allocate, do not count, those after a resume neither.
"""

from collections.abc import Sequence
from typing import Any

from titan_attent.systems.freezing.units import Unit, backward_flops, saved_flops

SETTLE = 3
"""Steps from the start of a process on whose seconds do not count."""


class FreezingAccount:
    """Of one run.

    Args:
        units: the modules.
        batch_size: examples of a global batch.
        microbatches: reductions of a step.
        reduced_bytes: of a parameter in a reduce-scatter; 0 without FSDP2.
    """

    def __init__(self, units: Sequence[Unit], *, batch_size: int, microbatches: int, reduced_bytes: int):
        self.units, self.batch_size = units, batch_size
        self.bytes_of_update = microbatches * reduced_bytes
        self.full = backward_flops(units) * batch_size
        self.forward = sum(unit.forward for unit in units) * batch_size
        self.probe = sum(unit.forward + unit.inputs for unit in units)
        self.parameters = sum(unit.numel for unit in units)
        self.active = [True] * len(units)
        self.steps_here = 0
        self.counts = dict.fromkeys(
            ("steps", "weight_flops", "input_flops", "probe_flops", "reduced_bytes", "updates"), 0.0
        )
        self.seconds = {"full": 0.0, "full_steps": 0.0, "frozen": 0.0, "frozen_steps": 0.0}

    def step_done(self, active: Sequence[bool], *, seconds: float) -> None:
        """A step with these modules active, whose training took so long."""
        weight, inputs = saved_flops(self.units, active)
        frozen = sum(unit.numel for unit, on in zip(self.units, active, strict=True) if not on)
        self.counts["steps"] += 1
        self.steps_here += 1
        self.counts["weight_flops"] += weight * self.batch_size
        self.counts["input_flops"] += inputs * self.batch_size
        self.counts["reduced_bytes"] += frozen * self.bytes_of_update
        self.counts["updates"] += frozen
        self.active = list(active)
        if self.steps_here > SETTLE:
            kind = "full" if all(active) else "frozen"
            self.seconds[kind] += seconds
            self.seconds[f"{kind}_steps"] += 1

    def probed(self, examples: int) -> None:
        self.counts["probe_flops"] += self.probe * examples

    @property
    def saved_seconds(self) -> float:
        """Of training, against all steps at the pace of those with every module active; probing not taken off."""
        of = self.seconds
        pace = of["full"] / of["full_steps"] if of["full_steps"] else 0.0
        return pace * of["frozen_steps"] - of["frozen"]

    def metrics(self) -> dict[str, float]:
        """The ``freezing/*`` scalars; FLOPs and bytes over all ranks since the first step."""
        counts = self.counts
        steps = max(1.0, counts["steps"])
        saved = counts["weight_flops"] + counts["input_flops"]
        return {
            "freezing/active_parameters": sum(
                unit.numel for unit, on in zip(self.units, self.active, strict=True) if on
            )
            / self.parameters,
            "freezing/backward_share": 1 - sum(saved_flops(self.units, self.active)) * self.batch_size / self.full,
            "freezing/saved_of_backward": (saved - counts["probe_flops"]) / (steps * self.full),
            "freezing/saved_of_step": (saved - counts["probe_flops"]) / (steps * (self.full + self.forward)),
            "freezing/saved_weight_flops": counts["weight_flops"],
            "freezing/saved_input_flops": counts["input_flops"],
            "freezing/probe_flops": counts["probe_flops"],
            "freezing/saved_reduced_bytes": counts["reduced_bytes"],
            "freezing/saved_updates": counts["updates"],
            "freezing/saved_train_seconds": self.saved_seconds,
        }

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "seconds": self.seconds}

    def load(self, state: dict[str, Any]) -> None:
        self.counts, self.seconds = state["counts"], state["seconds"]
