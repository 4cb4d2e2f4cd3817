"""All systems of this package, in the order in which a run calls them (systems/system.py).

To add one: a folder with a :class:`System`, its section in job_config.py, a line here and a page in docs/guide/.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from titan_attent.systems.distillation.system import Distillation
from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.highway.stages import HighwayStages
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.system import System
from titan_attent.systems.teaching.span_masks import SpanMasks
from titan_attent.systems.teaching.system import Teaching
from titan_attent.systems.teaching.trace import Trace

SYSTEMS: tuple[type[System], ...] = (
    Teaching,  # [teacher]: which examples are trained on, and with which weights
    SpanMasks,  # [teacher] level = "span": which labels of an example have a loss
    Trace,  # [teacher] trace: the example ids of every step
    Distillation,  # [distillation]: which targets the loss has beside the labels; after those that weight examples
    Freezing,  # [freezing]: which modules of the model a step updates
    HighwayStages,  # [highway] cut = "stage": how the gradient reaches the pipeline stages
    Highway,  # [highway]: how the gradient reaches the blocks; must be last, see its docstring
)


RENAMED: dict[str, str] = {system.former_name: system.name for system in SYSTEMS if system.former_name}
"""Former name of a system -> its current name, which its section, state and tags share."""

FORMER_KEYS: dict[str, str] = {
    f"{system.name}.{key}": instead for system in SYSTEMS for key, instead in system.former_keys.items()
}
"""Key of an earlier version, as section.key -> the error message that names its successor."""


def renamed(key: str, *, separator: str) -> str:
    """Replace the former name of a system at the start of a key such as ``modules.seed`` by the current one."""
    name, matched_separator, remainder = key.partition(separator)
    return RENAMED.get(name, name) + matched_separator + remainder


class SystemOn(NamedTuple):
    """A system that is turned on, with its section."""

    system: type[System]
    config: Any


def systems_on(sections: Any, *, from_outside: Sequence[type[System]] = ()) -> list[SystemOn]:
    """The systems that are turned on, in the order in which they are called.

    Args:
        sections: an object with each section of the configuration as an attribute.
        from_outside: external systems; they are called before any system with ``comes_last``.
    """
    systems = sorted((*SYSTEMS, *from_outside), key=lambda system: system.comes_last)
    return [entry for entry in _with_sections(systems, sections) if entry.system.is_on(entry.config)]


def check_values(sections: Any, *, from_outside: Sequence[type[System]] = ()) -> None:
    """Call every system's ``check_values``, whether it is on or off. ValueError for an invalid value."""
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
