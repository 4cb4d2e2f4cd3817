"""``python -m titan_attent`` lists commands that exist, without torch, and the package's dependencies are declared."""

import ast
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import pytest

import titan_attent
from titan_attent.__main__ import COMMANDS, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["titan_attent", {option!r}]
try:
    runpy.run_module("titan_attent", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
assert not {{"torch", "torchtitan", "numpy"}} & sys.modules.keys(), "it imports torch"
"""


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_it_answers_without_importing_torch(option: str) -> None:
    code = WITHOUT_TORCH.format(option=option)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if option == "--version":
        expected = (
            f"titan_attent {titan_attent.__version__}, torch {version('torch')}, torchtitan {version('torchtitan')}"
        )
        assert result.stdout.startswith(expected)
    else:
        assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_listed_commands_exist(name: str) -> None:
    module, _, subcommand = name.partition(" ")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__") is not None
    if subcommand.startswith("--"):
        from titan_attent.titan.first_checks import CHECK

        assert (module, subcommand.split()[0]) == ("titan_attent.train", CHECK)
    elif subcommand:
        from titan_attent.titan.scoring.command import SUBCOMMANDS

        assert subcommand in SUBCOMMANDS


def test_without_arguments_it_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "titan_attent.score pair" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["train"], ["--verison"], ["--version", "train"]])
def test_a_command_in_place_of_a_module_is_one_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "-m titan_attent.train; see --help" in capsys.readouterr().err


def test_the_exported_names_are_found_at_their_first_use() -> None:
    for name in titan_attent.__all__:
        assert getattr(titan_attent, name).__name__ == name
    assert titan_attent._HOMES.keys() == set(titan_attent.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Techer'"):
        titan_attent.Techer  # noqa: B018


THROUGH = {"aiohttp": "fsspec", "cycler": "matplotlib", "google": "tensorboard"}
"""Imported module -> the dependency that brings it."""


OPTIONAL = {"lightning", "transformers"}
"""Imported by adapters/ alone."""


def test_every_imported_package_is_a_dependency() -> None:
    imported: set[str] = set()
    for path in (ROOT / "titan_attent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "titan_attent", "tomllib"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    extra = {re.split(r"[^\w-]", line)[0] for line in chain(*project["optional-dependencies"].values())}
    distributions = packages_distributions()
    for name in imported:
        brought_by = {THROUGH[name]} if name in THROUGH else {one.lower() for one in distributions.get(name, [name])}
        allowed = declared | (extra if name in OPTIONAL else set())
        assert brought_by & allowed, f"{name} is imported, and no dependency in pyproject.toml brings it"
    assert len(imported) > 10
