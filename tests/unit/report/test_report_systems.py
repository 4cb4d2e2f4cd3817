"""report/systems.py: tags, units and panels of external systems."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from titan_attent.data.run_record import RunRecord
from titan_attent.report.runs import RunScalars
from titan_attent.report.summary import summarize
from titan_attent.report.systems import OWN, families, logged_by, prefixes, units
from titan_attent.report.teaching import panels_of
from titan_attent.systems.system import Panel

PANELS = (
    Panel("tokens agreed", ("outside/agreed",), labels=(("outside/agreed", "agreed"),), shares=True),
    Panel("of each layer", family="outside/layer/"),
)
OUTSIDE: dict[str, Any] = json.loads(  # as read from the file
    json.dumps(
        {
            "name": "outside",
            "units": {"outside/agreed": "share", "outside/visits": "visits"},
            "panels": [asdict(panel) for panel in PANELS],
        }
    )
)


def a_run(*systems: Any) -> RunScalars:
    scalars = {tag: {1: 0.25} for tag in ("outside/agreed", "outside/visits", "outside/layer/0", "teacher/ratio")}
    return RunScalars(Path("run"), scalars=scalars, record=RunRecord(systems=systems))


def test_a_run_brings_the_panels_units_and_tags_of_its_systems() -> None:
    run = a_run(OUTSIDE)
    assert [logged.name for logged in logged_by([run])] == [*(logged.name for logged in OWN), "outside"]
    assert "outside/" in prefixes([run]) and "outside/layer/" in families([run], maps=False)
    assert [panel for panel in panels_of([run]) if panel.title == "tokens agreed"] == [PANELS[0]]
    facts = summarize(run)
    assert (facts["outside/agreed"], facts["outside/visits"]) == ("25.00%", "0.25 visits")
    assert facts["outside/layer/0"] == "25.00%" and facts["teacher/ratio"] == "25.00%"


def test_without_a_description_the_tags_of_a_system_are_left_out() -> None:
    facts = summarize(a_run())
    assert "outside/agreed" not in facts and facts["teacher/ratio"] == "25.00%"
    assert "outside/agreed" not in units([a_run()])


@pytest.mark.parametrize(
    "system",
    [
        {},
        {"name": "outside"},
        OUTSIDE | {"name": 7},
        OUTSIDE | {"units": ["share"]},
        OUTSIDE | {"panels": [{"title": 3}]},
        OUTSIDE | {"panels": [{"title": "t", "labels": [1]}]},
        OUTSIDE | {"panels": [{"title": "t", "color": "red"}]},
        OUTSIDE | {"panels": "none"},
    ],
)
def test_a_damaged_description_costs_that_system_alone(system: dict[str, Any]) -> None:
    assert logged_by([a_run(system)]) == list(OWN)


def test_no_run_can_change_what_the_own_systems_log() -> None:
    assert logged_by([a_run(OUTSIDE | {"name": "teacher"})]) == list(OWN)


def test_validation_sets_and_a_mixture_in_the_table() -> None:
    """Each set has its loss and its bits per byte, and sources their epochs and proportions."""
    values = {"loss": 3.0, "loss/web": 2.5, "loss/code": 3.5, "bits_per_byte": 1.25, "bits_per_byte/web": 1.125}
    scalars = {f"validation_metrics/{tag}": {10: value} for tag, value in values.items()}
    mixed = {"epochs/web": 0.5, "proportion/web": 0.75, "proportion/code": 0.25}
    scalars |= {f"mixture/{tag}": {10: value} for tag, value in mixed.items()}
    facts = summarize(RunScalars(Path("run"), scalars=scalars))
    assert facts["validation loss"] == "3.0000"
    assert (facts["validation loss, web"], facts["validation loss, code"]) == ("2.5000", "3.5000")
    bits = [facts[f"bits per byte{name}"] for name in ("", ", web", ", code")]
    assert bits == ["1.2500", "1.1250", "-"]
    assert facts["mixture/epochs/web"] == "0.5"
    assert (facts["mixture/proportion/web"], facts["mixture/proportion/code"]) == ("75.00%", "25.00%")
