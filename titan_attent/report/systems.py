"""The scalars that the systems of runs log: the prefixes of their tags, their units, and the panels that show them.

The systems of this package declare them in their classes; the mixture of sources, which is no system, has them here. An
external system declares them in its run's data.json, so that the report does not need its code.
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
    """The scalars of one system: its name, tag -> unit, and its panels."""

    name: str
    units: dict[str, str]
    panels: tuple[Panel, ...]


MIXTURE = Logged("mixture", {}, (Panel("proportion of each source", family="mixture/proportion/", shares=True),))
"""The scalars of the plan of the data (data/plan/mixture.py)."""
OWN = (*(Logged(system.name, dict(system.tag_units), system.panels) for system in SYSTEMS), MIXTURE)


def logged_by(runs: Iterable[RunScalars]) -> list[Logged]:
    """The systems of this package, then the external ones in the runs' records; the first of those with equal names."""
    systems = list(OWN)
    for run in runs:
        for described in run.record.systems:
            logged = _read(described)
            if logged is not None and logged.name not in {one.name for one in systems}:
                systems.append(logged)
    return systems


def _read(described: Any) -> Logged | None:
    """One system in data.json; None where its description is malformed."""
    try:
        panels = []
        for panel in typed(list[dict], described["panels"], where="panels"):
            labels = tuple((str(tag), str(name)) for tag, name in panel.get("labels", ()))
            panels.append(replace(typed(Panel, panel | {"labels": []}), labels=labels))
        return Logged(typed(str, described["name"]), typed(dict[str, str], described["units"]), tuple(panels))
    except (ValueError, TypeError, KeyError):
        return None


def prefixes(runs: Sequence[RunScalars]) -> tuple[str, ...]:
    """The prefixes of the tags that the systems of the runs, and their ledgers, log."""
    return (*(f"{logged.name}/" for logged in logged_by(runs)), LEDGER)


def families(runs: Sequence[RunScalars], *, maps: bool) -> tuple[str, ...]:
    """The prefixes of the families of tags: those with one tag per source, module or layer.

    ``maps``: return the families that are drawn as maps, which are in the picture only, instead of the others.
    """
    panels = [panel for logged in logged_by(runs) for panel in logged.panels if panel.family]
    return tuple(str(panel.family) for panel in panels if panel.map == maps)


def units(runs: Sequence[RunScalars]) -> dict[str, str]:
    """Tag -> unit, for all systems of the runs."""
    return {tag: unit for logged in logged_by(runs) for tag, unit in logged.units.items()}
