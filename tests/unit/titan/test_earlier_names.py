"""States whose names or keys changed, in current checkpoints and in those of earlier versions
(checkpoint_manager.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch.distributed.checkpoint as dcp

from titan_attent.foundations.ledger import Ledger
from titan_attent.titan.checks.toml_checks import check_toml
from titan_attent.titan.launch import parse
from titan_attent.titan.loader import check_geometry
from titan_attent.titan.patches.checkpoint_manager import with_stored_names
from titan_attent.titan.scoring import command

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def ledger(accounts: tuple[Any, ...] = ()) -> Ledger:
    return Ledger(batch_size=4, tokens_per_example=1, accounts=accounts)


def saved(states: dict[str, Any], folder: Path) -> str:
    dcp.save(states, checkpoint_id=folder, no_dist=True)
    return str(folder)


def loaded(path: str) -> Ledger:
    fresh = ledger()
    dcp.load(with_stored_names({"ledger": fresh}, path), checkpoint_id=path, no_dist=True)
    return fresh


def test_todays(tmp_path: Path) -> None:
    of_run = ledger()
    of_run.batch_served(covered_per_trained=1.0)
    assert loaded(saved({"ledger": of_run}, tmp_path / "step-1")).examples_trained == 4


def test_that_of_an_earlier_version_beside_a_teacher(tmp_path: Path) -> None:
    of_run = Ledger(batch_size=4, tokens_per_example=1)  # with the accounts of a teacher
    for _ in range(3):
        of_run.batch_served(covered_per_trained=1.0)
    earlier = {"teacher": {"ledger": of_run.state_dict(), "position": {"round": 0}}}
    found = loaded(saved(earlier, tmp_path / "step-1"))
    assert found.examples_trained == 12 and set(found.seconds) == {"load", "train", "save", "validate"}


def test_without_one_the_run_counts_anew(tmp_path: Path) -> None:
    assert loaded(saved({"train_state": {"step": 3}}, tmp_path / "step-1")).examples_trained == 0


class Kept:
    def __init__(self, value: int):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("name", ["freezing", "modules"])
def test_a_system_that_had_another_name(name: str, tmp_path: Path) -> None:
    path, system = saved({name: Kept(7), "train_state": {"step": 3}}, tmp_path / "step-3"), Kept(0)
    dcp.load(with_stored_names({"freezing": system}, path), checkpoint_id=path, no_dist=True)
    assert system.value == 7


def test_an_identity_of_an_earlier_version_is_todays() -> None:
    check_geometry({"modules.seed": 3, "data.seed": 0}, {"freezing.seed": 3, "data.seed": 0}, where="it")
    with pytest.raises(ValueError, match="freezing.seed is 4 in this run but 3 in the checkpoint"):
        check_geometry({"modules.seed": 3}, {"freezing.seed": 4}, where="it")


def test_sections_that_had_another_name_are_refused_with_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[modules]\npolicy = "mat"\n')
    with pytest.raises(ValueError, match=r"the section \[modules\] was renamed to \[freezing\]; rename it in the TOML"):
        check_toml(str(tmp_path / "a.toml"))
    with pytest.raises(ValueError, match=r"--backward.method: the section \[backward\] was renamed to \[highway\]"):
        parse(["--backward.method", "highway"])


@pytest.mark.parametrize(
    ("key", "value", "successor"),
    [
        ("reference_path", '"a"', "the key is scores now"),
        ("amateur_path", '"a"', "the key is scores now"),
        ("anneal_fraction", "0.1", "the key is full_data_tail now"),
        ("shadow", "true", "the key is dry_run now"),
    ],
)
def test_keys_that_had_another_name_are_refused_with_the_new_one(
    key: str, value: str, successor: str, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text(f"[teacher]\n{key} = {value}\n")
    with pytest.raises(ValueError, match=rf"a.toml: \[teacher\] {key}: {successor}"):
        check_toml(str(tmp_path / "a.toml"))
    for argument in (f"--teacher.{key}", f"--teacher.{key.replace('_', '-')}=1"):
        with pytest.raises(ValueError, match=f"^{argument}: {successor}"):
            parse([argument, "1"])


def test_a_key_that_the_rule_sets_is_refused_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default's value, too, which would otherwise be ignored silently."""
    monkeypatch.setitem(os.environ, "RANK", "0")
    rule = '[teacher]\nstrategy = "difference"\nscores = "s"\n'
    (tmp_path / "a.toml").write_text(rule)
    (tmp_path / "b.toml").write_text(f'{rule}importance = "attainment"\n')
    message = r'\[teacher\] importance = .attainment. with strategy = "difference", which sets importance = '
    for argv in (["b.toml"], ["a.toml", "--teacher.importance", "attainment"]):
        with pytest.raises(ValueError, match=message):
            parse(["--job.config_file", str(tmp_path / argv[0]), *argv[1:]])
    assert parse(["--job.config_file", str(tmp_path / "a.toml")]).teacher.strategy == "difference"
    uniform = parse(["--job.config_file", str(tmp_path / "b.toml"), "--teacher.strategy", "uniform"])
    assert uniform.teacher.strategy == "uniform"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no subcommand is given. Name `pair`"),
        (["--teacher.reference_path", "x"], "no subcommand is given. .* with --output DIR in place of"),
        (["pairs", "--output", "x"], 'pairs is not a subcommand; did you mean "pair"'),
    ],
)
def test_scoring_without_a_subcommand_names_both(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setitem(os.environ, name, "0")
    monkeypatch.setattr(sys, "argv", ["score", *argv])
    with pytest.raises(SystemExit) as end:
        command.score()
    assert end.value.code == 2 and re.search(said, capsys.readouterr().err)


def test_the_former_command_names_its_successor() -> None:
    result = subprocess.run([sys.executable, "-m", "titan_attent.scorers", "--trusted", "x"], capture_output=True)
    assert result.returncode == 2 and b"titan_attent.scorers is `titan_attent.score pair` now" in result.stderr
