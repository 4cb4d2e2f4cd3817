"""The checks before torch is imported: the same messages as the complete ones, and nothing left behind."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titan_attent.systems.system_list import RENAMED
from titan_attent.titan.first_checks import FORMER_SECTIONS

ROOT = Path(__file__).parents[3]
RANK_ZERO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
WITHOUT_TORCH = """
import runpy, sys

class Door:
    def find_spec(self, name, path=None, target=None):
        closed = ("titan_attent.titan.launch", "torchtitan.components")
        if name.partition(".")[0] in ("torch", "numpy") or name in closed:
            raise ImportError(f"{name} behind the door")

sys.meta_path.insert(0, Door())
runpy.run_module("titan_attent.train", run_name="__main__", alter_sys=True)
"""
CHECK_ALONE = """
import sys
from titan_attent.titan.first_checks import check_command_line

check_command_line("titan_attent.train")
left = sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "torchtitan", "numpy"))
print("left", left)
"""


def start(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | RANK_ZERO | environment, capture_output=True, text=True)


def config(folder: Path, text: str) -> str:
    path = folder / "x.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("toml", "args", "words"),
    [
        ("[training]\nstepz = 3", [], 'unknown key "stepz" in [training]; did you mean "steps"?'),
        ("[trainig]\nsteps = 3", [], 'unknown key "trainig" in the top level; did you mean "training"?'),
        ("[teacher]\nstrategi = 'soft'", [], 'unknown key "strategi" in [teacher]; did you mean "strategy"?'),
        ("[teacher]\nreference_path = 'x'", [], "[teacher] reference_path: "),
        ("training = 3", [], "training is a section: write [training]"),
        ("[training", [], "is not valid TOML"),
        ("", ["--training.stepz", "3"], "Unrecognized options: --training.stepz"),
        ("[training]\nseq_len = -1", [], "[training] seq_len = -1: it must be a whole number at least 1"),
        ("[training]\nsteps = 'many'", [], "[training] steps = 'many': it must be a whole number"),
        ("", ["--training.seq_len", "0"], "[training] seq_len = 0"),
        (
            "[teacher]\ninitial_ratio = 1.5",
            [],
            "[teacher] initial_ratio = 1.5: it must be a number above 0 and at most 1",
        ),
        ("[data]\npath = 'missing'", [], "[data] path: missing: not a data set, no such folder; correct the path"),
        (
            "[data]\nvalidation_path = 'missing'\n[validation]\nenable = true",
            [],
            "[data] validation_path: missing: not a data set, no such folder",
        ),
        ("[data.sources]\nweb = { proportion = 2 }", [], "[data.sources.web] proportion = 2: it must be a number"),
        ("[data.sources.web]\nproportion = 0.5\nrepeat = 2", [], "web has proportion and repeat: give a source"),
        ("[data.validation_sets]\nweb = 'data'", [], "[data.validation_sets] web = 'data': write web = { path"),
        (
            "[data.validation_sets]\nweb = { path = 'missing' }\n[validation]\nenable = true",
            [],
            "[data] validation_sets.web: missing: not a data set, no such folder",
        ),
        (
            "[teacher]\nstrategy = 'difference'\nscores = 'missing'",
            [],
            "[teacher] scores: missing: no such folder; correct the path, or write scores with",
        ),
    ],
)
def test_a_mistake_is_told_without_torch(tmp_path: Path, toml: str, args: list[str], words: str) -> None:
    done = start(WITHOUT_TORCH, "--job.config_file", config(tmp_path, toml), *args)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_folder_in_use_is_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("process 1 on a host\n")
    with (tmp_path / "run.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = start(WITHOUT_TORCH, "--job.dump_folder", str(tmp_path))
    assert done.returncode == 2 and "another run is using this folder (process 1 on a host)" in done.stderr
    done = start(CHECK_ALONE, "--job.dump_folder", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_torch() -> None:
    done = start(WITHOUT_TORCH, "--help")
    assert done.returncode == 0 and "--teacher.strategy" in done.stdout and "--training.seq-len" in done.stdout


@pytest.mark.parametrize(
    ("args", "environment"),
    [
        ([], {}),
        (["--training.seq_len", "64"], {}),
        (["--training.stepz", "3"], {"RANK": "1"}),  # the first rank says it
        (["--modules.enable"], {}),
        (["--teacher.anneal_fraction", "0.1"], {}),
        (["--job.custom_config_module", "mine"], {}),
        (["--data.validation_path", "missing"], {}),
        (["--teacher.scores", "missing"], {}),
    ],
)
def test_what_is_not_decided_here_is_left_to_the_complete_checks(args: list[str], environment: dict[str, str]) -> None:
    done = start(CHECK_ALONE, *args, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left []\n", "")


def test_without_torchrun_it_says_how_to_start() -> None:
    command = [sys.executable, "-m", "titan_attent.train"]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "start it with torchrun" in done.stderr


def test_the_former_sections_are_those_of_the_systems() -> None:
    assert set(FORMER_SECTIONS) == RENAMED.keys()
