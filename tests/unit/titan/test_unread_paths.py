"""titan/checks/unread_paths.py and dump_folder.py: paths that are not read, and a folder that holds another run."""

import copy
import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from distributed.parallel_world import config_of
from torchtitan.config import JobConfig

from titan_attent.data.run_record import RunRecord, write_run_record
from titan_attent.titan import launch
from titan_attent.titan.checks.dump_folder import check_dump_folder
from titan_attent.titan.checks.unread_paths import check_unread_paths
from titan_attent.titan.settings import configured_of


def parse(*argv: str, toml: str = "", folder: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    monkeypatch.setenv("RANK", "0")
    (folder / "run.toml").write_text(toml)
    return launch.parse(["--job.config_file", str(folder / "run.toml"), *argv])


REFUSED = {
    '[training]\ndataset = "c4_test"': r"\[training\] dataset: not read, since titan_attent reads \[data\] path",
    '[training]\ndataset_path = "x"\n[validation]\ndataset = "y"': r"\[training\] dataset_path, \[validation\] dataset",
    '[model]\nhf_assets_path = "tok"': r"\[model\] hf_assets_path: not read, since the tokenizer is the one that wrote",
    '[data]\nvalidation_path = "v"': r"\[data\] validation_path = v would not be read: set enable = true",
    '[data]\nvalidation_path = "v"\n[validation]\nfreq = 3': "validation_path = v would not be read",
}
ACCEPTED = [
    "",
    '[data]\npath = "d"',
    '[data]\nvalidation_path = ""',
    '[data]\nvalidation_path = "v"\n[validation]\nenable = true',
    '[data]\nvalidation_path = "v"\n[validation]\nenable = false',
    '[model]\nhf_assets_path = "tok"\n[checkpoint]\nenable = true\ninitial_load_in_hf = true',
]


@pytest.mark.parametrize("toml", REFUSED)
def test_a_path_that_is_not_read_is_refused(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=REFUSED[toml]):
        parse(toml=toml, folder=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("toml", ACCEPTED)
def test_a_path_that_is_read_passes(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(toml=toml, folder=tmp_path, monkeypatch=monkeypatch)


def test_the_command_line_counts_like_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ("--data.validation_path", "v")
    for rest in (["--validation.no-enable"], ["--validation.enable"]):
        parse(*path, *rest, folder=tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match="would not be read"):
        parse(*path, folder=tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=r"\[training\] dataset_path: not read"):
        parse("--training.dataset_path=x", folder=tmp_path, monkeypatch=monkeypatch)
    check_unread_paths(parse(folder=tmp_path, monkeypatch=monkeypatch), ())


# -- a folder that holds another run ----------------------------------------------------------------------------------

SETTING = {"model": "llama3_attent 10M", "optimizer.lr": 0.25}


def check(config: JobConfig, **setting: Any) -> None:
    check_dump_folder(config, setting=SETTING | setting)


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    """A run whose record lies in its folder."""
    config = config_of({"teacher.strategy": "hard"}, data="d", folder=str(tmp_path))
    write_run_record(tmp_path / "teacher", RunRecord(setting=SETTING, configured=configured_of(config)), losses=())
    return config


def test_the_same_run_may_start_again(config: JobConfig) -> None:
    check(config)
    again = copy.deepcopy(config)
    again.data.num_workers, again.data.path, again.teacher.trace = 7, "elsewhere/d", True
    check(again)


def test_another_run_is_refused(config: JobConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run: optimizer.lr was 0.25 and is 0.5 .*name another folder"):
        check(config, **{"optimizer.lr": 0.5})
    other = copy.deepcopy(config)
    other.teacher.strategy = "uniform"
    with pytest.raises(ValueError, match="holds another run: teacher.strategy was hard and is default"):
        check(other)
    other.job.dump_folder = str(tmp_path / "another")
    check(other, **{"optimizer.lr": 0.5})


def test_a_resume_and_a_record_of_before_pass(config: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-3" / ".metadata").touch()
    config.checkpoint.enable = True
    check(config, **{"optimizer.lr": 0.5})  # resume_checks.py and the resumed schedule know better
    config.checkpoint.enable = False
    with pytest.raises(ValueError, match="holds another run"):
        check(config, **{"optimizer.lr": 0.5})
    record = tmp_path / "teacher" / "data.json"
    without = {key: value for key, value in json.loads(record.read_text()).items() if key != "configured"}
    record.write_text(json.dumps(without))
    config.teacher.strategy = "uniform"
    check(config)
    record.write_text("{")
    check(config, **{"optimizer.lr": 0.5})
