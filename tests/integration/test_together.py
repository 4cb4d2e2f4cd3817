"""The teacher, freezing and Highway backpropagation in one run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import read_scalars, read_trace, read_weights, run

from titan_attent.foundations.ledger import RUN_ACCOUNTS, TEACHING_ACCOUNTS

STEPS, SAVED = 24, 12
TEACHER = ["--teacher.strategy", "hard", "--teacher.importance", "attainment", "--teacher.full_data_tail", "0"]
FREEZING = [
    *("--freezing.policy", "prefix", "--freezing.warmup_steps", "6", "--freezing.interval", "5"),
    *("--freezing.probe_groups", "3", "--freezing.probe_examples", "2"),
]
HIGHWAY = [
    "--highway.method",
    "highway",
    "--highway.cut",
    "block",
    "--highway.iterations",
    "1",
    "--highway.exact_fraction",
    "0.25",
]


def train(small_run: list[str], dump: Path, *extra: str, num_processes: int = 2) -> Path:
    run(
        *(*small_run, "--model.flavor", "bench", "--job.dump_folder", str(dump), "--training.global_batch_size", "16"),
        *("--training.steps", str(STEPS), "--lr_scheduler.total_steps", str(STEPS)),
        *("--checkpoint.enable", "--checkpoint.interval", str(SAVED)),
        *(*TEACHER, *FREEZING, *HIGHWAY, *extra),
        num_processes=num_processes,
    )
    return dump


def decisions(dump: Path) -> list[tuple[int, list[str]]]:
    lines = (dump / "freezing" / "decisions.jsonl").read_text().splitlines()
    return [(record["step"], record["frozen"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_run, tmp_path_factory.mktemp("together") / "run")


def test_each_system_takes_part(whole: Path) -> None:
    assert {line["strategy"] for line in read_trace(whole)} == {"uniform", "hard"}
    assert [step for step, _ in decisions(whole)] == [6, 11, 16, 21]
    assert all("tok_embeddings" in frozen for _, frozen in decisions(whole))
    assert list(read_scalars(whole, "highway/exact").values())[-1] == 1
    assert list(read_scalars(whole, "highway/exact").values())[0] == 0
    assert read_scalars(whole, "freezing/saved_weight_flops")[STEPS] > 0


def test_the_ledger_accounts_for_every_second(whole: Path) -> None:
    wall = read_scalars(whole, "ledger/wall_seconds")[STEPS]
    accounts = {
        name: read_scalars(whole, f"ledger/{name}_seconds")[STEPS]
        for name in (*RUN_ACCOUNTS, *(account.name for account in TEACHING_ACCOUNTS), "probe")
    }
    assert 0.95 * wall < sum(accounts.values()) <= wall
    assert accounts["probe"] > 0 and accounts["train"] > accounts["probe"]


def test_killed_and_resumed_on_one_rank_is_uninterrupted(small_run: list[str], whole: Path, tmp_path: Path) -> None:
    """The checkpoint is between two decisions, and within a pass over a selection."""
    dump = tmp_path / "resumed"
    shutil.copytree(whole, dump)
    shutil.rmtree(dump / "checkpoint" / f"step-{STEPS}")
    train(small_run, dump, num_processes=1)
    assert [line["ids"] for line in read_trace(dump)] == [line["ids"] for line in read_trace(whole)]
    assert decisions(dump) == decisions(whole)
    ours, theirs = (read_weights(folder, step=STEPS) for folder in (dump, whole))
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert torch.allclose(weights, theirs[name], atol=2e-4), name
