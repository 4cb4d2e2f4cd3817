"""What changes between a run and its resume: the new learning rate and schedule count from the first resumed step."""

from pathlib import Path
from typing import Any

import pytest
from launch import read_checkpoint, read_scalars, run


def test_an_extended_run_with_another_rate(small_run: list[str], tmp_path: Path) -> None:
    arguments = [
        *(*small_run, "--job.dump_folder", str(tmp_path / "run"), "--lr_scheduler.warmup_steps", "1"),
        *("--checkpoint.enable", "--checkpoint.interval", "4", "--training.steps", "4", "--training.max_norm", "1.0"),
        *("--teacher.strategy", "uniform", "--teacher.importance", "attainment"),
        *("--teacher.ratio_schedule", "adaptive"),
    ]
    run(*arguments, num_processes=1)
    changed = ["--training.steps", "8", "--optimizer.lr", "5e-4", "--training.max_norm", "0.5"]
    output = run(*arguments, *changed, "--optimizer.weight_decay", "0.2", "--optimizer.beta1", "0.8", num_processes=1)
    # torchtitan's schedule: step n of N has (N + 1 - n) / (N - 1) of the rate.
    rates = read_scalars(tmp_path / "run", "lr")
    assert [rates[step] for step in (4, 5, 8)] == pytest.approx([1e-3 / 3, 5e-4 * 4 / 7, 5e-4 / 7])
    for line in (
        "the learning rate of step 5 is 0.000285714 instead of 0,",
        "[optimizer] learning rate 0.0005 instead of 0.001",
        "[optimizer] betas 0.8, 0.95 instead of 0.9, 0.95",
        "[optimizer] weight decay 0.2 instead of 0.1",
        "Resuming with [training] steps = 8 instead of 4, which the checkpoint",
        "Resuming with [training] max_norm = 0.5 instead of 1.0, which the checkpoint",
    ):
        assert output.count(line) == 1, line
    assert output.count("Resuming with") == 2
    groups: Any = read_checkpoint(tmp_path / "run", step=8)["optimizer"]
    assert {value for name, value in groups.items() if name.endswith(".weight_decay")} == {0.2}
