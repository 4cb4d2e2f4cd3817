"""titan/checks/toml_checks.py: which module has the sections, and what a TOML may hold because of it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titan_attent.job_config import JobConfig
from titan_attent.systems.system import System
from titan_attent.systems.system_list import SystemOn
from titan_attent.titan.checks.toml_checks import check_toml, sections_of
from titan_attent.titan.joined_systems import JoinedSystems
from titan_attent.titan.settings import systems_from


@dataclass
class Extra:
    value: int = 1


@dataclass
class Derived(JobConfig):
    extra: Extra = field(default_factory=Extra)


@dataclass
class Foreign:
    extra: Extra = field(default_factory=Extra)


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "derived_sections", SimpleNamespace(JobConfig=Derived))
    monkeypatch.setitem(sys.modules, "foreign_sections", SimpleNamespace(JobConfig=Foreign))
    monkeypatch.setitem(sys.modules, "no_sections", SimpleNamespace())


def written(folder: Path, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text)
    return str(path)


def test_the_toml_may_name_another_module_with_more_sections(tmp_path: Path) -> None:
    text = '[job]\ncustom_config_module = "derived_sections"\n[extra]\nvalue = 2\n[teacher]\nseed = 3\n'
    assert check_toml(written(tmp_path, text))["extra"] == {"value": 2}


def test_the_command_line_comes_first(tmp_path: Path) -> None:
    path = written(tmp_path, "[extra]\nvalue = 2\n")
    assert check_toml(path, module="derived_sections")["extra"] == {"value": 2}
    with pytest.raises(ValueError, match='unknown key "extra" in the top level'):
        check_toml(path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "foreign_sections",
            "its JobConfig lacks data, distillation, freezing, highway, hyla, mot, teacher, vision; derive it from "
            "JobConfig of "
            "titan_attent.job_config",
        ),
        ("no_sections", "no attribute 'JobConfig'; check the name"),
        ("there_is_none", "No module named 'there_is_none'; check the name, and PYTHONPATH"),
    ],
)
def test_a_module_without_the_sections_is_refused(module: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sections_of(module)


# -- systems from outside ---------------------------------------------------------------------------------------------


def a_system(name: str = "extra", **more: Any) -> type[System]:
    return type("Made", (System,), {"name": name} | more)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ((a_system("teacher"),), 'the name "teacher" of a system is taken'),
        ((a_system("modules"),), 'the name "modules" of a system is taken'),
        ((a_system("optimizer"),), 'the name "optimizer" of a system is taken'),
        ((a_system("ledger"),), 'the name "ledger" of a system is taken'),
        ((a_system(), a_system()), 'the name "extra" of a system is taken'),
        ((type("Nameless", (System,), {}),), "the system Nameless has no name"),
        ((Extra,), "is not a class derived from"),
        ((a_system("nowhere"),), 'its JobConfig has no section "nowhere"'),
    ],
)
def test_what_a_module_may_not_list(listed: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(JobConfig=Derived, SYSTEMS=listed))
    with pytest.raises(ValueError, match=message):
        sections_of("outside")


def test_a_system_that_is_listed_with_its_section_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = a_system()
    monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(JobConfig=Derived, SYSTEMS=(made,)))
    assert sections_of("outside") is Derived and systems_from("outside") == (made,)


@pytest.mark.parametrize("columns", [("weight", "weight"), ("input",), ("inputs",), ("example_id",), ("share",)])
def test_a_column_has_one_owner(columns: tuple[str, ...]) -> None:
    made = a_system(columns=columns)
    run: Any = SimpleNamespace(dataset=SimpleNamespace(columns=("share",)))
    with pytest.raises(ValueError, match=f'the column "{columns[0]}" of a batch has two owners'):
        JoinedSystems([SystemOn(made, None)], run, lambda pred, batch: None)  # type: ignore[arg-type, return-value]
    assert JoinedSystems([SystemOn(a_system(columns=("own",)), None)], run, lambda pred, batch: None)  # type: ignore[arg-type, return-value]


def test_two_systems_with_a_sampler_are_refused_by_name() -> None:
    run: Any = SimpleNamespace(dataset=SimpleNamespace(columns=()))
    sampler, loss = object(), lambda pred, batch: None
    first, second = (SystemOn(a_system(name, sampler=sampler), None) for name in ("first", "second"))
    other = SystemOn(a_system("other"), None)
    assert JoinedSystems([other, second], run, loss).sampler is sampler  # type: ignore[arg-type]
    assert JoinedSystems([other], run, loss).sampler is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the systems first and second each bring a sampler.*turn all but one"):
        JoinedSystems([first, other, second], run, loss)  # type: ignore[arg-type]
