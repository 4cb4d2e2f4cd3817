"""An external system (counting.py) takes part in a run through the interface of the systems alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment, launch, read_scalars, read_trace, read_weights, run

STEPS = 6
COUNTING = ["--job.custom_config_module", "counting", "--counting.enable"]


def arguments(small_run: list[str], dump: Path, *extra: str) -> list[str]:
    short = ["--training.steps", str(STEPS), "--lr_scheduler.total_steps", str(STEPS), "--job.dump_folder", str(dump)]
    return [*small_run, *short, "--checkpoint.enable", "--checkpoint.interval", "4", *extra]


def counted(dump: Path) -> dict[str, int]:
    return json.loads((dump / "counted.json").read_text())


@pytest.fixture(scope="module")
def plain(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    dump = tmp_path_factory.mktemp("plain")
    run(*arguments(small_run, dump), num_processes=2)
    return dump


def test_it_is_called_in_every_step_and_changes_nothing(small_run: list[str], plain: Path, tmp_path: Path) -> None:
    run(*arguments(small_run, tmp_path, *COUNTING), COUNTED=str(tmp_path / "counted.json"))
    seen = counted(tmp_path)
    local = sum(sum(id % 2 for id in line["ids"][:4]) for line in read_trace(tmp_path))
    calls = {"initialised": 1, "begun_at": 0, "microbatches": 6, "backwards": 6, "steps": 6}
    assert seen == calls | {"odd": local, "wrong": 0}
    assert read_scalars(tmp_path, "counting/steps")[STEPS] == STEPS - 1  # torchtitan logs within the step
    assert [line["ids"] for line in read_trace(tmp_path)] == [line["ids"] for line in read_trace(plain)]
    weights, expected = read_weights(tmp_path, step=STEPS), read_weights(plain, step=STEPS)
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)


def test_its_loss_is_what_is_differentiated(small_run: list[str], plain: Path, tmp_path: Path) -> None:
    # All settings from the TOML, as a user would write them.
    toml = Path(small_run[1]).read_text().replace("[job]", '[job]\ncustom_config_module = "counting"')
    config = tmp_path / "counting.toml"
    config.write_text(toml + "[counting]\nenable = true\nfactor = 0.5\n")
    from_toml = ["--job.config_file", str(config), *small_run[2:], "--training.max_norm", "1e9"]
    run(*arguments(from_toml, tmp_path), COUNTED=str(tmp_path / "counted.json"))
    assert read_scalars(tmp_path, "loss_metrics/global_avg_loss")[1] == pytest.approx(
        read_scalars(plain, "loss_metrics/global_avg_loss")[1], rel=1e-6
    )
    assert read_scalars(tmp_path, "grad_norm")[1] == pytest.approx(read_scalars(plain, "grad_norm")[1] / 2, rel=1e-5)


def test_its_initial_weights_are_trained(small_run: list[str], plain: Path, tmp_path: Path) -> None:
    extra = ["--counting.zero_head", "--training.steps", "2"]
    run(*arguments(small_run, tmp_path, *COUNTING, *extra), COUNTED=str(tmp_path / "counted.json"))
    losses = read_scalars(tmp_path, "loss_metrics/global_avg_loss")
    vocab_size = len(read_weights(plain, step=STEPS)["output.weight"])
    assert losses[1] == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert losses[2] != pytest.approx(losses[1], rel=1e-4)


def test_its_state_is_resumed_on_another_number_of_ranks(small_run: list[str], tmp_path: Path) -> None:
    extra = [*COUNTING, "--training.global_batch_size", "8"]
    first = arguments(small_run, tmp_path, *extra, "--training.steps", "4")
    run(*first, COUNTED=str(tmp_path / "counted.json"))
    run(
        *arguments(small_run, tmp_path, *extra),
        num_processes=1,
        COUNTED=str(tmp_path / "counted.json"),
    )
    seen = counted(tmp_path)
    assert (seen["steps"], seen["begun_at"], seen["microbatches"]) == (STEPS, 4, 2 * (STEPS - 4))
    assert seen["initialised"] == 0


def test_a_checkpoint_without_its_state_is_refused(small_run: list[str], plain: Path, tmp_path: Path) -> None:
    os.symlink(plain / "checkpoint", tmp_path / "checkpoint")
    result = launch(*arguments(small_run, tmp_path, *COUNTING), COUNTED="unused")
    assert result.returncode != 0 and "holds no counting state" in result.stderr


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--parallelism.context_parallel_degree", "2"], "[counting] enable = true with context_parallel_degree = 2"),
        (["--training.global_batch_size", "64"], "[counting] enable = true needs three batches"),
        (["--counting.factor", "-1"], "[counting] factor = -1.0 is not above 0"),
        (["--counting.no-enable", "--counting.factor", "-1"], "[counting] factor = -1.0 is not above 0"),
    ],
)
def test_its_refusals_end_the_run_before_it_begins(
    small_run: list[str], tmp_path: Path, mistake: list[str], message: str
) -> None:
    result = launch(*arguments(small_run, tmp_path, *COUNTING, *mistake), COUNTED="unused")
    assert result.returncode != 0 and message in result.stderr


REPORT = """
import sys
from titan_attent.report import main, read_run
from titan_attent.report.teaching import panels_of
assert main([sys.argv[1]]) == 0
print([panel.title for panel in panels_of([read_run(sys.argv[1])])])
"""


def test_its_scalars_and_its_panel_are_in_the_report(small_run: list[str], tmp_path: Path) -> None:
    run(*arguments(small_run, tmp_path, *COUNTING), COUNTED=str(tmp_path / "counted.json"))
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.splitlines()
    assert any(line.split() == ["counting/steps", str(STEPS - 1)] for line in lines)
    assert "steps counted" in lines[-1] and "share of the pool" in lines[-1]
