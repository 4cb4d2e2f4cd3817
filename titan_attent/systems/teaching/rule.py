"""The recommended rule as one value: ``strategy = "difference"`` stands for five keys that were measured together.

It selects the examples with a high cross-entropy difference (importance.py). Trusted text decides the selected share
(schedule.py, ``calibrated_ratio``). There is no tail on the full data, since it would train the examples that the rule
leaves out. docs/results/single_pass.md compares it with uniform training.
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
    """Return ``config`` with the keys of its rule filled in; ``config`` itself if it names no rule."""
    return replace(config, **KEYS) if config.strategy == DIFFERENCE else config  # type: ignore[arg-type]


def name_of(config: TeacherConfig) -> str:
    """The strategy as a message names it: that of the rule for a ``config`` with the rule's keys."""
    return DIFFERENCE if all(getattr(config, key) == value for key, value in KEYS.items()) else config.strategy


def check_rule(config: TeacherConfig, *, given: Collection[str] = ()) -> None:
    """Raise a ValueError if a key that the rule sets is given another value.

    Args:
        given: the keys in the TOML file or on the command line. Any other key counts as given if it is not the default.
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
