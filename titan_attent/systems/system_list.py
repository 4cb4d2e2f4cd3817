"""The systems that may take part in a run's steps, in the order in which they do (systems/system.py).

A new one is a folder with a :class:`System` in it, its section in job_config.py, a line here and a page in docs/.
"""

from typing import Any

from titan_attent.systems.freezing.system import AdaptiveModules
from titan_attent.systems.highway.stages import HighwayStages
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.system import System
from titan_attent.systems.teaching.system import Teaching

SYSTEMS: tuple[type[System], ...] = (
    Teaching,  # [teacher]: which examples are trained, and with what weights
    AdaptiveModules,  # [modules]: which parts of the model a step updates
    HighwayStages,  # [backward] cut = "stage": the way of the gradient between pipeline stages
    Highway,  # [backward]: which way the gradient takes; last, see its docstring
)


def systems_on(job_config: Any) -> list[type[System]]:
    """Those that ``job_config`` turns on, in order."""
    return [system for system in SYSTEMS if hasattr(job_config, system.name) and system.is_on(job_config)]
