"""docs/reference/reference.md is what the code says."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from titan_attent.job_config import JobConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.PATH.read_text() == script.reference(), "run python scripts/make_reference.py"


def test_every_key_stands_in_it_with_its_meaning(script: ModuleType) -> None:
    page = script.PATH.read_text()
    for section in fields(JobConfig):
        rows = page.partition(f"\n## [{section.name}]\n")[2].partition("\n## ")[0].splitlines()
        for key in fields(section.type):  # type: ignore[arg-type]
            (row,) = (row for row in rows if row.startswith(f"| `{key.name}` | "))
            assert len(row.split(" | ")[2]) > 20


def test_a_cell_keeps_lists_and_bars_apart(script: ModuleType) -> None:
    assert script.cell("a | b\nc\n- one\n  more\n- two") == "a \\| b c<br>&bull; one more<br>&bull; two"
