"""Making scorers by the real command: killed and resumed on another number of ranks, and a run that reads them."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from launch import kill_when, launch, read_trace, run, start, write_config

from titan_attent.data.format import INDEX_FILE
from titan_attent.data.holdout import STRETCH, hold_out
from titan_attent.data.shards import TokenDataset
from titan_attent.scores.reference import ReferenceLosses

SEQ_LEN = ("--training.seq_len", "64", "--validation.seq_len", "64")
STEPS = 10
MODULE = "titan_attent.scorers"


def may_have_children() -> None:
    """Workers of these tests are daemons, which may not."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def arguments(folder: Path, data: dict[str, Path], output: str, *more: str) -> list[str]:
    options = ("--flavor", "scorer_xs", "--steps", str(STEPS), "--batch_size", "8")
    return [
        *("--trusted", str(data["train"]), "--output", str(folder / output), *options),
        *("--job.config_file", str(folder / "config.toml"), *SEQ_LEN, *more),
    ]


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    write_config(folder, data=token_data, dump=folder / "run")
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path, token_data: dict[str, Path]) -> Path:
    """Made on one rank in one go."""
    output = run(*arguments(folder, token_data, "straight"), num_processes=1, module=MODULE, prepare=may_have_children)
    assert "% of the run's" in output and output.index("% of the run's") < output.index("Scorers: train amateur")
    assert f'amateur_path = "{folder / "straight" / "amateur"}"' in output
    return folder / "straight"


def losses(folder: Path) -> torch.Tensor:
    found = ReferenceLosses(folder)
    found.verify_checksum()
    return found.read(0, found.num_examples)


def test_killed_and_resumed_on_another_number_of_ranks(
    folder: Path, straight: Path, token_data: dict[str, Path]
) -> None:
    argv, output = arguments(folder, token_data, "killed"), folder / "killed"
    half = output / "models" / "expert" / "checkpoint" / "step-5" / ".metadata"
    kill_when(half.is_file, start(*argv, module=MODULE, prepare=may_have_children))
    assert not (output / "expert" / "reference.json").exists()
    text = run(*argv, num_processes=1, module=MODULE, prepare=may_have_children)
    assert "Scorers: train amateur" not in text and "Scorers: train expert" in text
    for name in ("amateur", "expert"):
        for part in (name, f"{name}/trusted"):
            torch.testing.assert_close(losses(output / part), losses(straight / part), rtol=1e-3, atol=0)
        assert json.loads((output / name / "cost.json").read_text())["device_seconds"] > 0
    assert losses(straight / "amateur").std() > 0.01
    assert not torch.equal(losses(straight / "amateur"), losses(straight / "expert"))


def test_a_run_selects_from_step_1_on_without_a_forward_pass(folder: Path, straight: Path) -> None:
    settings = {
        **{"strategy": "hard", "importance": "cross_entropy_difference", "ratio_schedule": "calibrated"},
        **{"amateur_path": straight / "amateur", "reference_path": straight / "expert", "trusted_quantile": 0.3},
        **{"anneal_fraction": 0.0, "interval_schedule": "fixed"},
    }
    argv = [word for key, value in settings.items() for word in (f"--teacher.{key}", str(value))]
    ids = []
    for ranks in (1, 2):
        dump = folder / f"taught-{ranks}"
        paths = ("--job.config_file", str(folder / "config.toml"), "--job.dump_folder", str(dump))
        run(*paths, *SEQ_LEN, *argv, "--training.steps", "6", num_processes=ranks)
        trace = read_trace(dump)
        assert [(step["step"], step["round"], step["strategy"]) for step in trace] == [
            (i, 1, "hard") for i in range(1, 7)
        ]
        ids.append([sorted(step["ids"]) for step in trace])
        first = json.loads((dump / "teacher" / "rounds.jsonl").read_text().splitlines()[0])
        assert first["ledger/examples_scored"] == 0 and first["ledger/prepaid_seconds"] > 0
    assert ids[0] == ids[1]
    difference = losses(straight / "amateur") - losses(straight / "expert")
    trusted = losses(straight / "amateur" / "trusted") - losses(straight / "expert" / "trusted")
    cut = trusted.sort().values[int(0.3 * len(trusted))]
    chosen = torch.tensor(ids[0]).flatten()
    assert (difference[chosen] >= cut).all() and first["teacher/selected"] == (difference >= cut).sum() // 8 * 8


@pytest.mark.parametrize(
    "change, message",
    [
        (("--training.seq_len", "128"), "holds the reference losses of other examples"),
        (("--teacher.amateur_path", "nowhere"), "no such folder"),
        (("--teacher.trusted_quantile", "0.0001"), "is not one: score more of them"),
    ],
)
def test_scores_of_other_data_are_refused(folder: Path, straight: Path, change: tuple[str, ...], message: str) -> None:
    paths = ("--teacher.amateur_path", str(straight / "amateur"), "--teacher.reference_path", str(straight / "expert"))
    rule = ("--teacher.importance", "cross_entropy_difference", "--teacher.ratio_schedule", "calibrated")
    config = ("--job.config_file", str(folder / "config.toml"), "--job.dump_folder", str(folder / "refused"))
    result = launch(*config, *SEQ_LEN, *rule, *paths, *change, num_processes=1)
    assert result.returncode != 0 and message in result.stderr
    assert not (folder / "refused").exists()


def test_other_scorers_are_not_overwritten(folder: Path, straight: Path, token_data: dict[str, Path]) -> None:
    argv = arguments(folder, token_data, "straight", "--lr", "0.5")
    result = launch(*argv, num_processes=1, module=MODULE, prepare=may_have_children)
    assert result.returncode != 0 and "holds other scorers: lr was 0.01 and is 0.5" in result.stderr


def test_what_is_held_out_is_not_trained_on(token_data: dict[str, Path], tmp_path: Path) -> None:
    data = TokenDataset(token_data["train"], seq_len=64)
    hold_out(data, train=tmp_path / "train", held_out=tmp_path / "held_out", num_train=10**6, num_held_out=2048)
    train, held_out = (TokenDataset(tmp_path / name, seq_len=64) for name in ("train", "held_out"))
    whole = {tuple(data[i][0]["input"].tolist()) for i in range(len(data))}
    rows = [{tuple(part[i][0]["input"].tolist()) for i in range(len(part))} for part in (train, held_out)]
    assert rows[0] | rows[1] <= whole and not rows[0] & rows[1]
    assert len(train) + len(held_out) == len(data) // STRETCH * STRETCH and len(held_out) == -(-len(data) // 160) * 16
    before = (tmp_path / "train" / INDEX_FILE).stat().st_mtime_ns
    hold_out(data, train=tmp_path / "train", held_out=tmp_path / "held_out", num_train=16, num_held_out=16)
    assert (tmp_path / "train" / INDEX_FILE).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="fewer than the 128"):
        hold_out(
            TokenDataset(token_data["train"], seq_len=512),
            **{"train": tmp_path / "a", "held_out": tmp_path / "b", "num_train": 16, "num_held_out": 16},
        )
