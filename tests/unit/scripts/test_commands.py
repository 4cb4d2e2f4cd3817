"""The commands of the pages and of scripts/: what no test runs is parsed, and its keys and files are looked up."""

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torchtitan.config import ConfigManager, JobConfig

from titan_attent.job_config import JobConfig as OurSections

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.suffix in (".sh", ".slurm")) + [ROOT / ".ci/run"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = [path for path in SCRIPTS + PAGES if path.name != "CHANGELOG.md"]
FOLDERS = ("scripts", "train_configs", "benchmarks", "tests")
"""Folders of the repository that a command may name; others are the reader's own."""
WITH_KEYS = {"titan_attent.train", "titan_attent.score"}
"""Modules that take ``--section.key value``."""


def commands_in(text: str, *, is_script: bool) -> list[list[str]]:
    """The words of the commands that start with python, torchrun, pip, sbatch or bash, of a page or of a script."""
    if not is_script:  # indented or fenced blocks
        text = "\n".join(re.sub(r"^ {4,}", "", line) for line in text.splitlines())
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        command = re.sub(r"^[#\s]*(?:srun |\$ )?", "", line)
        if not re.match(r"(python3?|torchrun|pip|sbatch|bash) [-\w./\[]", command):
            continue
        try:
            found.append(shlex.split(command, comments=True))
        except ValueError:  # prose with an apostrophe
            continue
    return found


@cache
def keys() -> frozenset[str]:
    """Every "section.key" of a run's configuration, and "section.part.key"."""
    found: set[str] = set()

    def walk(value: object, path: str) -> None:
        for name, inner in vars(value).items():
            if hasattr(inner, "__dataclass_fields__"):
                walk(inner, f"{path}{name}.")
            else:
                found.add(f"{path}{name}")

    walk(ConfigManager._merge_configs(JobConfig, OurSections)(), "")
    return frozenset(found)


def unknown_keys(command: list[str]) -> list[str]:
    """The ``--section.key`` of a command that no configuration has; ``no_`` before the key turns it off."""
    options = [word[2:].partition("=")[0].replace("-", "_") for word in command if re.match(r"--\w+\.\w", word)]
    return [name for name in options if name not in keys() and name.replace(".no_", ".") not in keys()]


def missing_files(command: list[str]) -> list[str]:
    named = [word for word in command if re.match(rf"(?:\./)?(?:{'|'.join(FOLDERS)})/[\w./-]+$", word)]
    return [word for word in named if not (ROOT / word.partition("::")[0]).exists()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_files_and_modules_of_commands_exist(source: Path) -> None:
    for command in commands_in(source.read_text(encoding="utf-8"), is_script=source in SCRIPTS):
        assert not unknown_keys(command), command
        assert not missing_files(command), command
        ours = [word for word in command if re.fullmatch(r"(titan_attent|benchmarks)(\.\w+)*", word)]
        for module in ours if "-m" in command else []:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command


def test_the_commands_are_found() -> None:
    found = [
        (source.name, command)
        for source in SOURCES
        for command in commands_in(source.read_text(encoding="utf-8"), is_script=source in SCRIPTS)
    ]
    assert len(found) > 60
    names = {name for name, _ in found}
    assert {"README.md", "runs.md", "editing.md", "CONTRIBUTING.md", "multinode.slurm", "quickstart_vision.sh"} <= names
    with_keys = [command for _, command in found if WITH_KEYS & set(command) and "--job.config_file" in command]
    assert len(with_keys) > 8
    assert any("hf" in word for _, command in found for word in command if word.startswith("--checkpoint."))


def test_a_wrong_key_file_or_module_is_seen() -> None:
    (command,) = commands_in(
        "    torchrun -m titan_attent.train --job.config_file train_configs/nowhere.toml \\\n"
        "        --trainning.steps 3 --checkpoint.no_enable --compile.enable",
        is_script=False,
    )
    assert unknown_keys(command) == ["trainning.steps"] and missing_files(command) == ["train_configs/nowhere.toml"]


def test_the_job_of_many_nodes_starts_the_command_with_its_arguments(tmp_path: Path) -> None:
    """scripts/multinode.slurm with stand-ins for srun and scontrol: what it starts, for the line in its head."""
    script = ROOT / "scripts" / "multinode.slurm"
    (line,) = re.findall(r"^#   sbatch .*? scripts/multinode\.slurm (\S+) ", script.read_text(), flags=re.M)
    assert (ROOT / line).is_file()
    for name, body in {"scontrol": "echo node7; sleep 0.2; echo node8", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    command = ["bash", str(script), line, "--training.steps", "5"]
    started = subprocess.run(command, capture_output=True, text=True, env=env | {"SLURM_JOB_ID": "11"})
    assert started.returncode == 0, started.stderr
    words = started.stdout.splitlines()
    assert words[:3] == ["torchrun", "--nnodes=2", "--nproc_per_node=8"] and "--rdzv_endpoint=node7:29500" in words
    after = words[words.index("-m") :]
    assert after == ["-m", "titan_attent.train", "--job.config_file", line, "--training.steps", "5"]
    refused = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=env)
    assert refused.returncode == 2 and "usage: sbatch scripts/multinode.slurm CONFIG.toml" in refused.stderr
