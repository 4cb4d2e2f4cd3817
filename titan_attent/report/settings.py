"""The settings in which runs differ, and the runs that differ in their seeds alone.

A run records the keys that its configuration changes (``configured``), and facts of its data and model (``setting``).
Runs of earlier versions recorded the latter alone: each of them is a setting of its own.
"""

from collections.abc import Sequence
from typing import Any

from titan_attent.report.runs import RunScalars

SEEDS = ("debug.seed", "data.seed")
PATHS = ("data.path", "data.validation_path", "teacher.scores", "checkpoint.initial_load_path")
"""Keys that may differ between the seeds of a setting: whether they are given counts. The data count by ``setting``."""
UNIMPORTANT = ("job.", "metrics.", "profiling.", "comm.", "checkpoint.folder")
"""The beginnings of keys that change nothing in what is learned."""


def settings_of(run: RunScalars) -> dict[str, Any]:
    """All recorded settings of a run, by name."""
    return {**(run.record.configured or {}), **run.record.setting}


def differing_settings(runs: Sequence[RunScalars]) -> dict[str, list[str]]:
    """Setting -> its value in each run, as text, for the settings in which the runs differ.

    A key that a run does not change is "default"; what a run of an earlier version did not record is "-".
    """
    all_settings = [settings_of(run) for run in runs]
    names = sorted({name for settings in all_settings for name in settings if not name.startswith(UNIMPORTANT)})
    rows = {}
    for name in names:
        is_key = any(name in (run.record.configured or {}) for run in runs)
        values = []
        for run, settings in zip(runs, all_settings, strict=True):
            if name in settings:
                values.append(_text(settings[name]))
            else:
                values.append("default" if is_key and run.record.configured is not None else "-")
        if len(set(values) - {"-"}) > 1:
            rows[name] = values
    return rows


def _text(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def seed_of(run: RunScalars) -> tuple[Any, ...]:
    return tuple(settings_of(run).get(name) for name in SEEDS)


def groups_of(runs: Sequence[RunScalars]) -> list[list[RunScalars]]:
    """The runs of each setting, in the order of their first runs; runs of a setting differ in their seeds alone."""
    groups: dict[Any, list[RunScalars]] = {}
    for i, run in enumerate(runs):
        key: Any = i
        if run.record.configured is not None:
            settings = {
                name: bool(value) if name in PATHS else str(value)
                for name, value in settings_of(run).items()
                if name not in SEEDS and not name.startswith(UNIMPORTANT)
            }
            key = tuple(sorted(settings.items()))
            seeds = [seed_of(other) for other in groups.get(key, [])]
            if seed_of(run) in seeds:  # the same run twice is no second sample
                key = i
        groups.setdefault(key, []).append(run)
    return list(groups.values())
