"""The recommended rule as one value: ``strategy = "difference"`` stands for the five keys that were measured together.

It selects the examples whose cross-entropy difference (importance.py) is high, keeps the share that trusted text asks
for (schedule.py, ``calibrated_ratio``) and trains no tail on the full data, which holds what the rule leaves out. How
it compares with uniform training: docs/results/single_pass.md.
"""

from collections.abc import Collection
from dataclasses import replace

from titan_attent.systems.teaching.config import TeacherConfig

DIFFERENCE = "difference"
KEYS = {
    "strategy": "hard",
    "importance": "cross_entropy_difference",
    "ratio_schedule": "calibrated",
    "interval_schedule": "fixed",
    "full_data_tail": 0.0,
}
"""The keys that ``strategy = "difference"`` sets, and their values."""


def with_rule(config: TeacherConfig) -> TeacherConfig:
    """Return ``config`` with the keys of its rule filled in; ``config`` itself where it names no rule."""
    return replace(config, **KEYS) if config.strategy == DIFFERENCE else config  # type: ignore[arg-type]


def check_rule(config: TeacherConfig, *, given: Collection[str] = ()) -> None:
    """Refuse a rule together with another value of a key that the rule sets; ValueError.

    Args:
        given: the keys that a TOML file or a command line names. Of other keys the default counts as not given.
    """
    if config.strategy != DIFFERENCE:
        return
    default = TeacherConfig()
    for key, rules_value in KEYS.items():
        value = getattr(config, key)
        is_given = key in given or value != getattr(default, key)
        if key != "strategy" and is_given and value != rules_value:
            raise ValueError(
                f'[teacher] {key} = {value!r} with strategy = "{DIFFERENCE}", which sets {key} = {rules_value!r}: '
                f'remove {key}, or set strategy = "hard" and choose every key yourself'
            )
