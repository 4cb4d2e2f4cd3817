"""What the systems of runs log: how their tags begin, the units of these, and the panels that show them.

Those of this package say it in their classes. One from outside says it in its run's data.json, so that the report needs
none of its code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from titan_attent.foundations.typed import typed
from titan_attent.report.runs import RunScalars
from titan_attent.systems.system import Panel
from titan_attent.systems.system_list import SYSTEMS

LEDGER = "ledger/"


class Logged(NamedTuple):
    """Of one system: its name, tag -> unit, and its panels."""

    name: str
    units: dict[str, str]
    panels: tuple[Panel, ...]


OWN = tuple(Logged(system.name, dict(system.tag_units), system.panels) for system in SYSTEMS)


def logged_by(runs: Iterable[RunScalars]) -> list[Logged]:
    """The systems of this package, and those from outside that the runs report; of two with one name the first."""
    found = list(OWN)
    for run in runs:
        for described in run.record.systems:
            logged = _read(described)
            if logged is not None and logged.name not in {one.name for one in found}:
                found.append(logged)
    return found


def _read(described: Any) -> Logged | None:
    """One system of data.json; None where the file says something else."""
    try:
        panels = []
        for panel in typed(list[dict], described["panels"], where="panels"):
            labels = tuple((str(tag), str(name)) for tag, name in panel.get("labels", ()))
            panels.append(replace(typed(Panel, panel | {"labels": []}), labels=labels))
        return Logged(typed(str, described["name"]), typed(dict[str, str], described["units"]), tuple(panels))
    except (ValueError, TypeError, KeyError):
        return None


def prefixes(runs: Sequence[RunScalars]) -> tuple[str, ...]:
    """How the tags begin that the systems of the runs, and their ledgers, log."""
    return (*(f"{logged.name}/" for logged in logged_by(runs)), LEDGER)


def families(runs: Sequence[RunScalars], *, maps: bool) -> tuple[str, ...]:
    """How the tags begin of which there are as many as a run has sources, modules or layers; ``maps``: those that the
    picture alone shows."""
    panels = [panel for logged in logged_by(runs) for panel in logged.panels if panel.family]
    return tuple(str(panel.family) for panel in panels if panel.map == maps)


def units(runs: Sequence[RunScalars]) -> dict[str, str]:
    """Tag -> unit, of all systems of the runs."""
    return {tag: unit for logged in logged_by(runs) for tag, unit in logged.units.items()}
