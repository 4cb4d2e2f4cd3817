"""The teacher of AtteNT's "complex" recipe: a soft draw by loss, with growing ratio and interval.

Many tests use it; the package's default is different.
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
