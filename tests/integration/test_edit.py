"""Edits of checkpoints that torchtitan wrote: it trains from the results, they are scored, and searched."""

import json
import re
from pathlib import Path

import pytest
import torch
from launch import launch, read_weights, run, write_config
from unit.edit.made import load

from titan_attent.edit.command import main
from titan_attent.scores.stored import StoredScores


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks in base/ (steps 1 to 3), and one on one rank, tuned from its last step, in tuned/."""
    folder = tmp_path_factory.mktemp("edit")
    config = write_config(folder, data=token_data, dump=folder / "base")
    common = ["--job.config_file", str(config), "--training.seq_len", "32", "--teacher.strategy", "uniform"]
    checkpoint = ["--checkpoint.enable", "--checkpoint.interval", "1", "--training.steps", "3"]
    run(*common, *checkpoint)
    start = ["--checkpoint.initial_load_path", str(folder / "base" / "checkpoint" / "step-3")]
    tuned = ["--job.dump_folder", str(folder / "tuned"), "--training.steps", "2"]
    run(*common, *checkpoint, *start, *tuned, num_processes=1)
    return folder


def step(folder: Path, name: str, number: int) -> str:
    return str(folder / name / "checkpoint" / f"step-{number}")


def edited(folder: Path, output: str, *words: str) -> dict[str, torch.Tensor]:
    assert main([*words, "--output", str(folder / output)]) == 0
    return load(folder / output)


def test_torchtitan_trains_from_a_result_and_score_scores_it(folder: Path) -> None:
    base, tuned = step(folder, "base", 3), step(folder, "tuned", 2)
    result = edited(folder, "sum", base, "+", "0.5", tuned)
    one, two = read_weights(folder / "base", step=3), read_weights(folder / "tuned", step=2)
    assert result.keys() == one.keys()
    for name, weight in result.items():
        torch.testing.assert_close(weight, one[name] + 0.5 * (two[name] - one[name]))
    common = ["--job.config_file", str(folder / "config.toml"), "--training.seq_len", "32"]
    start = ["--checkpoint.enable", "--checkpoint.initial_load_path", str(folder / "sum")]
    last = ["--job.dump_folder", str(folder / "again"), "--training.steps", "1", "--optimizer.lr", "0"]
    run(*common, *start, *last, "--teacher.strategy", "uniform", num_processes=1)
    loaded = read_weights(folder / "again", step=1)
    assert all(torch.equal(loaded[name], weight) for name, weight in result.items())
    arguments = ["checkpoint", "--output", str(folder / "scores"), *common, *start[1:]]
    run(*arguments, num_processes=1, module="titan_attent.score")
    assert StoredScores(folder / "scores").scoring.checkpoint == str(folder / "sum")


def test_the_mean_of_the_last_of_a_run(folder: Path) -> None:
    result = edited(folder, "mean", "mean", str(folder / "base" / "checkpoint"), "--last", "3")
    steps = [read_weights(folder / "base", step=number) for number in (1, 2, 3)]
    for name, weight in result.items():
        torch.testing.assert_close(weight, sum(one[name] for one in steps) / 3)


def test_a_search_tries_both_arms_on_both_data_sets(folder: Path, token_data: dict[str, Path]) -> None:
    base, tuned = step(folder, "base", 3), step(folder, "tuned", 2)
    data = ["--target", str(token_data["train"]), "--control", str(token_data["validation"])]
    config = ["--job.config_file", str(folder / "config.toml"), "--training.seq_len", "32"]
    options = ["--grid", "0.5", "1", "--budget", "5", "--examples", "13", "--output", str(folder / "search")]
    words = [base, "+", tuned, "-", "0.5", step(folder, "base", 1)]
    run("search", *words, *data, *options, *config, module="titan_attent.edit")
    found = json.loads((folder / "search" / "search.json").read_text())
    assert len(found["trials"]) == 2 * 8 and found["base"]["factors"] == [0, 0]
    two = {(trial["arm"], *trial["factors"]): trial for trial in found["trials"]}
    assert two["vector", 1, 0]["target"] != two["random", 1, 0]["target"]
    assert (folder / "search" / "map.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder / "search" / "table.md").read_text()
    assert table.count("best") == 1 and table.count("\n| ") == 1 + 9
    # The point (1, 0) is the tuned model: its loss is that of its checkpoint, on one rank and by another command.
    # Its configuration has no [validation]: a search reads the control set in any case.
    bare = folder / "bare.toml"
    before, _, after = (folder / "config.toml").read_text().partition("[validation]\n")
    bare.write_text(before + after[after.index("[") :])
    config[config.index("--job.config_file") + 1] = str(bare)
    again = ["search", tuned, "+", base, *data, *options[:-1], str(folder / "search2"), *config]
    output = run(*again, num_processes=1, module="titan_attent.edit")
    other = json.loads((folder / "search2" / "search.json").read_text())
    for loss in ("target", "control"):
        assert other["base"][loss] == pytest.approx(two["vector", 1, 0][loss], rel=1e-5)
        backward = next(one for one in other["trials"] if one["arm"] == "vector" and one["factors"] == [1])
        assert backward[loss] == pytest.approx(found["base"][loss], rel=1e-5)
    assert re.search(r"best: python -m titan_attent.edit .* --output DIR|no coefficients within the budget", output)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--target", ""], "--target is missing"),
        (["--grid", "1", "1"], "--grid: give different finite numbers"),
        (["--budget", "-1"], "--budget -1: it must be at least 0"),
        (["--model.flavor", "tiny"], "is of another model|is of another vocabulary"),
        (["--control", "/nowhere"], "validation_path"),
    ],
)
def test_mistakes_in_a_search(folder: Path, token_data: dict[str, Path], changed: list[str], message: str) -> None:
    data = ["--target", str(token_data["train"]), "--control", str(token_data["validation"])]
    config = ["--job.config_file", str(folder / "config.toml"), "--training.seq_len", "32"]
    words = ["search", step(folder, "base", 3), "+", step(folder, "tuned", 2), *data, "--output", str(folder / "no")]
    result = launch(*words, *config, *changed, num_processes=1, module="titan_attent.edit")
    assert result.returncode and re.search(f"error: .*({message})", result.stderr), result.stderr
    assert not (folder / "no").exists()
