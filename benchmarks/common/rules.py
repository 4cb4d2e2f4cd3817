"""A rule, which is a row in an experiment's tables, and the teachers that several experiments use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNIFORM: dict[str, Any] = {"strategy": "uniform"}

AMATEUR, EXPERT, PAIR = "<amateur>", "<expert>", "<pair>"
"""Placeholders in ``[teacher] scores``: the folder of one scorer's losses on the data of a run, or of both scorers'."""

UNBOUNDED = 1e6
"""``max_repeats`` where scores decide the ratio. These runs make many passes over their data; with the default, 4, they
would leave out almost nothing. Their tables show the rules without that bound."""

COMMON: dict[str, Any] = {
    "importance": "loss",
    "warmup_passes": 1,
    "ratio_schedule": "constant",
    "initial_ratio": 0.5,
    "interval_schedule": "fixed",
    "initial_interval": 1,
    "max_interval": 1,
    "full_data_tail": 0.0,
}
"""The teacher of every rule except ``attainment_in_training``, as in the measurements that this benchmark repeats."""

ADAPTIVE: dict[str, Any] = COMMON | {
    "strategy": "hard",
    "scoring": "forward_once",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
    "max_repeats": UNBOUNDED,
}
"""Score once, then select as many as the effective sample size says, from a tenth to all."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The settings in which the runs of one rule differ from those of another.

    Attributes:
        about: its description.
        teacher: its ``[teacher]`` section.
        share: share of the steps of a full run; in the vision experiment, of its compute with scoring and scorers.
        data: the rows of a corpus that it trains on: all (empty), all without duplicates ("dedup"), or the middle half
            by the amateur's loss ("middle").
        only_on: the corpora or conditions on which it is run; empty for all.
        by_default: whether it is run where no rules are named.
    """

    about: str
    teacher: dict[str, Any]
    share: float = 1.0
    data: str = ""
    only_on: tuple[str, ...] = ()
    by_default: bool = True

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers whose losses it reads."""
        if self.data == "middle":
            return (AMATEUR,)
        scores = self.teacher.get("scores")
        return (EXPERT, AMATEUR) if scores == PAIR else (scores,) if scores else ()

    def is_for(self, name: str) -> bool:
        """Whether it is run on a corpus or under a condition."""
        return not self.only_on or name in self.only_on

    def teacher_with(self, folders: Mapping[str, str]) -> dict[str, Any]:
        """Its teacher with a folder in the place of the placeholder."""
        return {key: folders.get(value, value) for key, value in self.teacher.items()}
