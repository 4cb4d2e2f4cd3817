"""find.py: which scorers a folder holds, for each layout, and which of them a run reads."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titan_attent.scores.find import PAIR_FILE, find_scorers
from titan_attent.scores.stored import Scoring, StoredScores
from titan_attent.scores.writer import ScoresWriter
from titan_attent.systems.teaching.checks import folders_of_scores
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.rule import with_rule

SCORING = Scoring(
    data_fingerprint="data",
    seq_len=16,
    num_examples=4,
    model="llama3_attent tiny",
    precision="float32",
    checkpoint="/run/checkpoint/step-3",
    checkpoint_sha256="beef",
)


FACTS: Any = SimpleNamespace(open_scores=StoredScores)


def write(folder: Path, role: str = "", **fields: Any) -> Path:
    with ScoresWriter(folder, scoring=replace(SCORING, role=role, **fields)) as writer:
        writer.append(torch.arange(4.0))
        writer.finish()
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for role in ("amateur", "expert"):
        write(tmp_path / "pair" / role, role)
    return tmp_path / "pair"


def test_a_pair(pair: Path) -> None:
    assert find_scorers(pair) == {"amateur": pair / "amateur", "expert": pair / "expert"}
    assert find_scorers(str(pair)) == find_scorers(pair)
    shutil.rmtree(pair / "amateur")
    assert find_scorers(pair) == {"expert": pair / "expert"}


@pytest.mark.parametrize("role", ["amateur", "expert", ""])
def test_the_folder_of_one_scorer(tmp_path: Path, role: str) -> None:
    """Without a role it counts as the expert, which excess_loss reads."""
    folder = write(tmp_path / "losses", role)
    assert find_scorers(folder) == {role or "expert": folder}


def test_one_scorer_of_a_pair_of_an_earlier_version(tmp_path: Path) -> None:
    """Its file names no role: the checkpoint's folder does."""
    folder = write(tmp_path / "losses", checkpoint="/s/models/amateur/checkpoint/step-300")
    assert find_scorers(folder) == {"amateur": folder}


def test_folders_that_hold_no_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder; correct the path, or write scores with"):
        find_scorers(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a folder of scores, no reference.json in it"):
        find_scorers(tmp_path)
    (tmp_path / PAIR_FILE).write_text("{}")
    with pytest.raises(ValueError, match="its scores are not finished: run the same .* command again to resume"):
        find_scorers(tmp_path)


@pytest.mark.parametrize(
    ("teacher", "read"),
    [
        ({"strategy": "difference"}, {"amateur", "expert"}),
        ({"strategy": "hard", "importance": "excess_loss"}, {"amateur", "expert"}),
        ({"strategy": "hard", "importance": "attainment"}, {"amateur"}),
        ({"strategy": "hard", "importance": "attainment", "scoring": "amateur"}, {"amateur"}),
        ({"strategy": "uniform"}, set()),
        ({"strategy": "uniform", "importance": "excess_loss"}, set()),
    ],
)
def test_a_run_reads_those_that_its_rule_uses(pair: Path, teacher: dict[str, str], read: set[str]) -> None:
    config = with_rule(TeacherConfig(scores=str(pair), **teacher))
    assert folders_of_scores(config, FACTS) == {role: str(pair / role) for role in sorted(read)}


@pytest.mark.parametrize(
    ("one", "teacher", "message"),
    [
        ("expert", {"strategy": "difference"}, 'importance = "cross_entropy_difference" needs those of the amateur'),
        ("amateur", {"strategy": "difference"}, 'importance = "cross_entropy_difference" needs those of the expert'),
        ("amateur", {"strategy": "hard", "importance": "excess_loss"}, 'importance = "excess_loss" needs those of the'),
        ("expert", {"strategy": "hard", "scoring": "amateur"}, 'scoring = "amateur" needs those of the amateur'),
        ("expert", {"strategy": "hard"}, 'which importance = "attainment" does not read. Name the folder of the ama'),
    ],
)
def test_a_scorer_that_is_missing_is_named(pair: Path, one: str, teacher: dict[str, str], message: str) -> None:
    for folder in (pair / one, pair):
        if folder == pair:
            shutil.rmtree(pair / ("expert" if one == "amateur" else "amateur"))
        with pytest.raises(ValueError, match=message):
            folders_of_scores(with_rule(TeacherConfig(scores=str(folder), **teacher)), FACTS)


def test_one_scorer_alone_may_be_named(pair: Path) -> None:
    """excess_loss with an expert, without the amateur that a pair would bring."""
    config = TeacherConfig(strategy="hard", importance="excess_loss", scores=str(pair / "expert"))
    assert folders_of_scores(config, FACTS) == {"expert": str(pair / "expert")}
