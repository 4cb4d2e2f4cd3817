"""The torch in the scripts' environments: for the suite that of constraints.txt, for test_torch.sh the requested one.

The interpreter is a fake that logs its arguments instead of running them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
NOTES = """#!/bin/sh
echo "$@" >> "{log}"
case "$2" in venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;; pip) shift 3; grep -h == "$2" >> "{log}" ;; esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of the repository that the scripts need, and a fake ``python3``."""
    clone = tmp_path / "a clone"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", clone)
    for name in ("environment.sh", "constraints.txt", "test.sh", "test_torch.sh"):
        shutil.copy(ROOT / "scripts" / name, clone / "scripts")
    (clone / "python3").write_text(NOTES.format(log=clone / "log"))
    (clone / "python3").chmod(0o755)
    return clone


def run(clone: Path, script: str, *args: str, **environment: str) -> list[str]:
    """The arguments of the interpreters in this call."""
    (clone / "log").write_text("")
    ours = {key: value for key, value in os.environ.items() if key not in ("VENV", "CONSTRAINTS", "PYTHON")}
    subprocess.run(
        ["bash", str(clone / "scripts" / script), *args],
        env=ours | {"PYTHON": str(clone / "python3")} | environment,
        check=True,
        capture_output=True,
    )
    return (clone / "log").read_text().splitlines()


def installs(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("torch==")]


def test_the_suite_runs_on_the_torch_of_the_constraints(clone: Path) -> None:
    pinned = re.findall(r"^torch==.*$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE)
    lines = run(clone, "test.sh", "tests/unit")
    assert installs(lines) == pinned and len(pinned) == 1
    assert lines[-1] == "-m pytest -n 2 --dist loadfile tests/unit"
    assert installs(run(clone, "test.sh")) == []  # already installed
    (clone / "scripts" / "constraints.txt").write_text("torch==2.12.0\n")
    assert installs(run(clone, "test.sh")) == ["torch==2.12.0"]
    with (clone / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert installs(run(clone, "test.sh")) == ["torch==2.12.0"]


def test_another_torch_has_its_own_environment(clone: Path) -> None:
    run(clone, "test.sh")
    lines = run(clone, "test_torch.sh", "2.14.1", "tests/unit", "-x")
    assert installs(lines) == ["torch==2.14.1"]
    assert lines[-1] == "-m pytest -n 2 --dist loadfile tests/unit -x"
    assert installs(run(clone, "test_torch.sh", "2.14.1")) == []
    assert installs(run(clone, "test_torch.sh", "2.15.0")) == ["torch==2.15.0"]
    assert installs(run(clone, "test.sh")) == []
    assert sorted(path.name for path in clone.glob(".venv*")) == [".venv", ".venv-torch-2.14.1", ".venv-torch-2.15.0"]


@pytest.mark.parametrize("args", [[], ["tests/unit"], ["-x"]])
def test_a_version_is_required(clone: Path, args: list[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(clone, "test_torch.sh", *args)
    assert error.value.returncode == 2 and b"usage" in error.value.stderr
    assert not list(clone.glob(".venv*"))


def test_the_package_allows_the_tested_versions() -> None:
    """They include the torch of the suite."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (line for line in project["dependencies"] if re.match(r"torch\W", line))
    assert torch == "torch>=2.11,<=2.15.0"
    for file in ("scripts/constraints.txt", "requirements.lock"):
        assert "\ntorch==2.13.0\n" in (ROOT / file).read_text(), file
