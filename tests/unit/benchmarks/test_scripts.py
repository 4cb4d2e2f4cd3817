"""Every module of benchmarks/ can be imported, and every experiment is a command. They are too slow to run them all."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.common.measure import command_of, module_name

ROOT = Path(__file__).parents[3]
EXPERIMENTS = {
    "cheaper_steps",
    "convergence",
    "distillation",
    "distillation_text",
    "editing",
    "highway",
    "hyla",
    "instructions",
    "long_windows",
    "mot",
    "parity",
    "seeds",
    "single_pass",
    "vision",
    "weights",
}

IMPORT_ALL = """
import importlib, pkgutil, sys
import benchmarks

names = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
for name in names:
    module = importlib.import_module(name)
    if name.endswith(("__main__", "long_windows.gpu")):
        sys.argv = [name, "--help"]
        try:
            module.main()
        except SystemExit as end:
            assert not end.code, name
        else:
            sys.exit(f"{name}: no --help")
print(len(names))
"""


def test_all_modules_are_imported_and_every_experiment_says_how_it_is_called() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 40
    for name in EXPERIMENTS:
        assert f"usage: python -m benchmarks.{name} [-h]" in result.stdout
    assert "usage: python -m benchmarks.long_windows.gpu [-h]" in result.stdout


def test_every_package_lists_its_modules() -> None:
    packages = [path.parent for path in (ROOT / "benchmarks").rglob("__init__.py")]
    assert {package.name for package in packages} == EXPERIMENTS | {"benchmarks", "common", "corpora", "speed"}
    for package in packages:
        docs = (package / "__init__.py").read_text().replace(",", " ").split()
        inside = [*package.glob("*.py"), *(path.parent for path in package.glob("*/__init__.py"))]
        assert {path.name for path in inside} - {"__init__.py"} <= set(docs), package


def test_shared_code_imports_no_experiment() -> None:
    for package in ("common", "corpora"):
        for path in (ROOT / "benchmarks" / package).glob("*.py"):
            imported = set(re.findall(r"^from benchmarks\.(\w+)", path.read_text(), flags=re.M))
            assert imported <= {"common", "corpora"}, path


def test_a_result_names_the_command_that_made_it() -> None:
    assert module_name(str(ROOT / "benchmarks" / "speed" / "loss.py")) == "benchmarks.speed.loss"
    assert module_name(str(ROOT / "benchmarks" / "highway" / "__main__.py")) == "benchmarks.highway"


def test_a_result_names_no_interpreter_of_a_machine() -> None:
    script = str(ROOT / "benchmarks" / "speed" / "adopting.py")
    argv = [script, "--parts", "streaming", "--streaming-python", "/somewhere/bin/python", "--rounds", "3"]
    expected = "python -m benchmarks.speed.adopting --parts streaming --streaming-python PYTHON --rounds 3"
    assert command_of(argv) == expected and command_of([script, "--python", "x"]).endswith(" --python PYTHON")
