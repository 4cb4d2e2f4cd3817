"""The teacher of AtteNT's "complex" recipe: a soft draw on the loss, ratio and interval that grow.

Many tests were written against it; the package's own default is another.
"""

from typing import Any

from titan_attent.systems.teaching.config import TeacherConfig

PAPER: dict[str, Any] = {
    "strategy": "soft",
    "importance": "loss",
    "warmup_passes": 1,
    "ratio_schedule": "incremental",
    "final_ratio": 0.8,
    "interval_schedule": "incremental",
}


def paper_config(**changes: Any) -> TeacherConfig:
    return TeacherConfig(**(PAPER | changes))
