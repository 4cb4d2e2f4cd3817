"""The packages: who may import whom, and that all but one of them work where torchtitan is not installed."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "titan_attent"
MAX_LINES = 300
"""Of code in a module; docstrings, comments and empty lines are not counted."""

WITHOUT_TORCHTITAN = """
import importlib, pkgutil, sys

class Door:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchtitan":
            raise ImportError("torchtitan behind the door")

sys.meta_path.insert(0, Door())
import titan_attent
names = [module.name for module in pkgutil.walk_packages(titan_attent.__path__, "titan_attent.")]
inside = ("titan", "train", "score", "scorers", "edit")
outside = [name for name in names if name.split(".")[1] not in inside and "__main__" not in name]
for name in outside:
    importlib.import_module(name)
assert not any(name.partition(".")[0] == "torchtitan" for name in sys.modules)
print(len(outside))
"""


def test_the_contracts_of_pyproject_are_kept() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_all_packages_but_titan_are_imported_without_torchtitan() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCHTITAN], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50


def test_the_trainer_names_no_system() -> None:
    imported = {
        node.module
        for node in ast.walk(ast.parse((PACKAGE / "titan" / "trainer.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert "titan_attent.titan.joined_systems" in imported
    systems = [module for module in imported if module.startswith("titan_attent.systems.")]
    assert systems == ["titan_attent.systems.system"]


def names_in(path: Path) -> set[str]:
    """Every name, attribute and argument in a module's code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone, and a run of all of them would end at the second."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, num in names.items() if num > 1] == []


def test_only_titan_knows_the_trainers_configuration() -> None:
    """RunSettings and its own section are all that a system sees of a run's configuration."""
    outside = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("titan", "job_config.py")
    ]
    assert len(outside) > 100
    assert [path for path in outside if names_in(path) & {"job_config", "JobConfig"}] == []


def test_no_package_but_titan_loads_torchtitan_by_its_name() -> None:
    """importlib and sys.modules are not seen by the contracts; the list of commands prints its version."""
    by_name = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"torchtitan(\.[\w.]*)?", str(node.value))
    }
    assert {name for name in by_name if not name.startswith("titan/")} == {"__main__.py"}
    assert "titan/first_checks.py" in by_name


def code_lines(source: str) -> set[int]:
    """The numbers, from 1, of lines with a token that is neither a comment nor a string standing alone."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokens:
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if not all(one.type == tokenize.STRING for one in statement):
                lines.update(line for one in statement for line in range(one.start[0], one.end[0] + 1))
            statement = []
        elif token.type not in skipped:
            statement.append(token)
    return lines


def num_code_lines(source: str) -> int:
    return len(code_lines(source))


def test_code_lines_are_counted_without_docstrings_and_comments() -> None:
    docs = '"""A module.\n\nMore.\n"""\n\n', '"""Of X."""\n\n\n', '    """F."""\n    # why\n'
    code = "X = (\n    1,  # one\n)\n", "def f():\n", "    return X\n"
    assert num_code_lines("".join(docs[i] + code[i] for i in range(3))) == 5


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_read_at_one_sitting(module: Path) -> None:
    assert num_code_lines(module.read_text()) <= MAX_LINES


def test_docs_draw_who_imports_whom_as_the_code_does() -> None:
    """The table of docs/design/architecture.md: one row per package, and the packages that its modules import."""
    graph = grimp.build_graph("titan_attent")
    actual: dict[str, set[str]] = {}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            here, there = (name.split(".")[1] if "." in name else "titan_attent" for name in (importer, imported))
            if here != there and here != "titan_attent":
                actual.setdefault(here, set()).add(there)
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)[/.py]*` \|[^|]*\| (.*?) \|$", page, re.M)
    drawn = {package: set(re.findall(r"`(\w+)", imports)) for package, imports in rows}
    assert {package: imports for package, imports in drawn.items() if imports} == actual
