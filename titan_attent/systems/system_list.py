"""The systems that may take part in a run's steps, in the order in which they do (systems/system.py).

A new one is a folder with a :class:`System` in it, its section in job_config.py, a line here and a page in docs/guide/.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.highway.stages import HighwayStages
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.system import System
from titan_attent.systems.teaching.system import Teaching
from titan_attent.systems.teaching.trace import Trace

SYSTEMS: tuple[type[System], ...] = (
    Teaching,  # [teacher]: which examples are trained, and with what weights
    Trace,  # [teacher] trace: the ids of every step
    Freezing,  # [freezing]: which parts of the model a step updates
    HighwayStages,  # [highway] cut = "stage": the way of the gradient between pipeline stages
    Highway,  # [highway]: which way the gradient takes; last, see its docstring
)


RENAMED: dict[str, str] = {system.former_name: system.name for system in SYSTEMS if system.former_name}
"""Former name of a system -> its name: of its section, its state and its tags."""

FORMER_KEYS: dict[str, str] = {
    f"{system.name}.{key}": instead for system in SYSTEMS for key, instead in system.former_keys.items()
}
"""Key of an earlier version, as section.key -> the error message that names its successor."""


def renamed(key: str, *, separator: str) -> str:
    """A key of an earlier version, as ``modules.seed``, under today's name of its system."""
    name, found, rest = key.partition(separator)
    return RENAMED.get(name, name) + found + rest


class SystemOn(NamedTuple):
    """A system that takes part in a run, and its section."""

    system: type[System]
    config: Any


def systems_on(sections: Any, *, from_outside: Sequence[type[System]] = ()) -> list[SystemOn]:
    """The systems that are turned on, in the order in which they are called.

    Args:
        sections: has each section of the configuration as an attribute.
        from_outside: systems beside those of this package; they come before a system with ``comes_last``.
    """
    systems = sorted((*SYSTEMS, *from_outside), key=lambda system: system.comes_last)
    return [one for one in _with_sections(systems, sections) if one.system.is_on(one.config)]


def check_values(sections: Any, *, from_outside: Sequence[type[System]] = ()) -> None:
    """Let every system, on or off, refuse values of its section; ValueError."""
    for system, config in _with_sections((*SYSTEMS, *from_outside), sections):
        system.check_values(config)


def check_given(sections: Any, given: Collection[str]) -> None:
    """Let every system of this package refuse keys that are given and not read; ValueError.

    Args:
        given: the keys that a TOML file or the command line names, as ``section.key``.
    """
    for system, config in _with_sections(SYSTEMS, sections):
        prefix = f"{system.name}."
        system.check_given(config, [key.removeprefix(prefix) for key in given if key.startswith(prefix)])


def _with_sections(systems: Sequence[type[System]], sections: Any) -> list[SystemOn]:
    return [SystemOn(system, getattr(sections, system.name)) for system in systems if hasattr(sections, system.name)]
