"""The ledger of a run that chooses no examples, in checkpoints of today and of before (checkpoint_manager.py)."""

from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch.distributed.checkpoint as dcp

from titan_attent.foundations.ledger import Ledger
from titan_attent.titan.patches.checkpoint_manager import with_earlier_ledger

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def ledger(accounts: tuple[Any, ...] = ()) -> Ledger:
    return Ledger(batch_size=4, tokens_per_example=1, accounts=accounts)


def saved(states: dict[str, Any], folder: Path) -> str:
    dcp.save(states, checkpoint_id=folder, no_dist=True)
    return str(folder)


def loaded(path: str) -> Ledger:
    fresh = ledger()
    dcp.load(with_earlier_ledger({"ledger": fresh}, path), checkpoint_id=path, no_dist=True)
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
