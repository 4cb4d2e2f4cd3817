"""The FLOPs, bytes and seconds that freezing saves, and the FLOPs that probing costs.

All are host numbers, added up step by step and stored in the checkpoint.

- FLOPs are counted as in units.py. Probing is subtracted: a probe example costs a forward pass and the input gradients.
- Bytes are those of frozen gradients, which FSDP2 no longer reduces; they cover the parameters of all ranks.
- Seconds are measured: the time of a step with every module active, minus the time of a step with frozen modules. The
  first steps of a process, also after a resume, are left out because they compile and allocate.
"""

from collections.abc import Sequence
from typing import Any

from titan_attent.systems.freezing.units import Unit, backward_flops, saved_flops

UNTIMED_STEPS = 3
"""Number of first steps of a process whose seconds are left out."""


class FreezingAccount:
    """The savings and costs of one run.

    Args:
        units: the modules.
        batch_size: examples per global batch.
        microbatches: gradient reductions per step.
        reduced_bytes: bytes per parameter in a reduce-scatter; 0 without FSDP2.
    """

    def __init__(self, units: Sequence[Unit], *, batch_size: int, microbatches: int, reduced_bytes: int):
        self.units, self.batch_size = units, batch_size
        self.bytes_of_update = microbatches * reduced_bytes
        self.full = backward_flops(units) * batch_size
        self.forward = sum(unit.forward for unit in units) * batch_size
        self.probe = sum(unit.forward + unit.inputs for unit in units)
        self.parameters = sum(unit.numel for unit in units)
        self.active = [True] * len(units)
        self.steps_in_process = 0
        self.counts = dict.fromkeys(
            ("steps", "weight_flops", "input_flops", "probe_flops", "reduced_bytes", "updates"), 0.0
        )
        self.seconds = {"full": 0.0, "full_steps": 0.0, "frozen": 0.0, "frozen_steps": 0.0}

    def step_done(self, active: Sequence[bool], *, seconds: float) -> None:
        """Count a step in which ``active`` modules were trained, and the ``seconds`` of its training."""
        weight, inputs = saved_flops(self.units, active)
        frozen = sum(unit.numel for unit, on in zip(self.units, active, strict=True) if not on)
        self.counts["steps"] += 1
        self.steps_in_process += 1
        self.counts["weight_flops"] += weight * self.batch_size
        self.counts["input_flops"] += inputs * self.batch_size
        self.counts["reduced_bytes"] += frozen * self.bytes_of_update
        self.counts["updates"] += frozen
        self.active = list(active)
        if self.steps_in_process > UNTIMED_STEPS:
            kind = "full" if all(active) else "frozen"
            self.seconds[kind] += seconds
            self.seconds[f"{kind}_steps"] += 1

    def probed(self, examples: int) -> None:
        """Count a probe of so many examples."""
        self.counts["probe_flops"] += self.probe * examples

    @property
    def saved_seconds(self) -> float:
        """Seconds of training saved, compared with steps at the mean time of full steps; probing is not subtracted."""
        seconds = self.seconds
        full_step = seconds["full"] / seconds["full_steps"] if seconds["full_steps"] else 0.0
        return full_step * seconds["frozen_steps"] - seconds["frozen"]

    def metrics(self) -> dict[str, float]:
        """The ``freezing/*`` scalars. FLOPs and bytes are totals over all ranks since the first step."""
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
