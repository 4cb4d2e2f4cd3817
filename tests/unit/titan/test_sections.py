"""titan/checks/preflight.py: which module has the sections, and what a TOML may hold because of it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from titan_attent.job_config import JobConfig
from titan_attent.titan.checks.preflight import check_toml, sections_of


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
            "its JobConfig lacks data, freezing, highway, teacher, vision; derive it from that of "
            "titan_attent.job_config",
        ),
        ("no_sections", "no attribute 'JobConfig'; check the name"),
        ("there_is_none", "No module named 'there_is_none'; check the name, and PYTHONPATH"),
    ],
)
def test_a_module_without_the_sections_is_refused(module: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sections_of(module)
