"""The Dockerfile, without docker: the files that its commands name are in the image."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()
COPIED = {Path(word).name for line in LINES if line.startswith("COPY") for word in line.split()[1:-1]}
ENVIRONMENT = dict(word.split("=", 1) for line in LINES if line.startswith("ENV") for word in line.split()[1:])
(COMMAND,) = (json.loads(line.removeprefix("CMD ")) for line in LINES if line.startswith("CMD"))
NAMED = re.compile(r"\b(?:scripts|train_configs)/[\w./-]+\.\w+")
MADE = ("data", "outputs", "my.toml")
"""Mounted, or made by the command."""


def examples() -> list[list[str]]:
    """The commands after the image's name in the comment at the top."""
    comment = re.sub(r"\\\n#\s*", "", TEXT.split("\nFROM")[0])
    runs = [line.lstrip("# ") for line in comment.splitlines() if line.lstrip("# ").startswith("docker run")]
    assert len(runs) == 2
    return [words[words.index("titan_attent") + 1 :] for words in map(shlex.split, runs)]


def in_the_image(path: str) -> bool:
    return Path(path).parts[0] in COPIED and (ROOT / path).exists()


@pytest.mark.parametrize("command", [COMMAND, *(command for command in examples() if command)], ids=" ".join)
def test_the_files_in_a_command_are_in_the_image(command: list[str]) -> None:
    for word in command:
        if "/" in word or word.endswith((".toml", ".sh")):
            assert word in MADE or in_the_image(word), word
    if "torchrun" in command:
        assert command[command.index("-m") + 1] == "titan_attent.train" and "--job.config_file" in command


def test_the_scripts_of_the_default_command_find_their_files_there() -> None:
    todo, seen = [COMMAND[1]], set()
    while todo:
        path = todo.pop()
        assert in_the_image(path), path
        seen.add(path)
        if path.endswith(".sh"):
            text = (ROOT / path).read_text()
            sourced = re.findall(r'\$\(dirname "\$0"\)/([\w.]+)', text)
            todo += {*NAMED.findall(text), *(f"scripts/{name}" for name in sourced)} - seen
    assert {"scripts/environment.sh", "scripts/processes.sh", "train_configs/quickstart.toml"} <= seen


def test_what_is_copied_is_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == COPIED


def test_the_image_has_every_dependency_before_the_code() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()[1:]}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in needed if "python_version" not in line}  # type: ignore[index]
    assert names - {"triton"} <= pinned  # torch brings triton
    steps = [line for line in LINES if line.startswith(("COPY", "RUN"))]
    code = next(i for i, line in enumerate(steps) if "titan_attent" in line)
    assert any("--requirement /tmp/requirements.lock" in line for line in steps[:code])
    assert any("--no-deps" in line for line in steps[code:])


def test_the_environment_of_the_image_is_used_unchanged(tmp_path: Path) -> None:
    """A container's start makes no second environment and installs nothing."""
    assert (
        ENVIRONMENT["VENV"] == "/venv" and "cat pyproject.toml scripts/constraints.txt > /venv/installed.toml" in TEXT
    )
    image, venv = tmp_path / "workspace", tmp_path / "venv"
    (image / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/environment.sh"):
        (image / name).write_bytes((ROOT / name).read_bytes())
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\necho asked to install >&2\nexit 1\n")
    (venv / "bin" / "python").chmod(0o755)
    parts = ("pyproject.toml", "scripts/constraints.txt")
    (venv / "installed.toml").write_bytes(b"".join((ROOT / name).read_bytes() for name in parts))
    script = "set -euo pipefail; source scripts/environment.sh; pwd; command -v python"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=image,
        env={**os.environ, "VENV": str(venv), "PATH": os.path.dirname(sys.executable) + ":/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(image), str(venv / "bin" / "python")] and not done.stderr
