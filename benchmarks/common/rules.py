"""The teachers that the rules of several experiments have in common."""

from typing import Any

UNBOUNDED = 1e6
"""``max_repeats`` where scores decide the ratio: these runs pass over their data many times, and with the default, 4,
they would leave out next to nothing. Their tables are of rules that no bound held back."""

COMMON: dict[str, Any] = {
    "importance": "loss",
    "warmup_passes": 1,
    "ratio_schedule": "constant",
    "initial_ratio": 0.5,
    "interval_schedule": "fixed",
    "initial_interval": 1,
    "max_interval": 1,
    "anneal_fraction": 0.0,
}
"""The teacher of every rule but ``attainment_in_training``, as in the measurements that this benchmark repeats."""

ADAPTIVE: dict[str, Any] = COMMON | {
    "strategy": "hard",
    "scoring": "forward_once",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
    "max_repeats": UNBOUNDED,
}
"""Scored once, and then as many as the effective sample size says, from a tenth to all."""
