"""Every script in benchmarks/ finds what it imports: nobody runs them all at every change."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_all_scripts_are_imported() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert len(names) > 10
    path = os.pathsep.join(str(ROOT / folder) for folder in ("benchmarks", "tests"))
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT)
    assert result.returncode == 0, result.stderr
