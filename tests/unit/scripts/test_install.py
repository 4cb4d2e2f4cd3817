"""``pip install .`` in a checkout: the built package has every module, and can be imported alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_package_that_pip_builds_has_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "titan_attent", source / "titan_attent", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "installed")
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "titan_attent").rglob("*.py")}
    assert len(expected) > 200 and built == expected
    code = "import titan_attent, titan_attent.train, titan_attent.score; print(titan_attent.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", check=True, capture_output=True, text=True
    )
    assert result.stdout.startswith(str(tmp_path / "installed"))
