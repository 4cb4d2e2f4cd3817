"""A family of models from outside of the package (mixer.py): trained with a teacher, saved, resumed, refused."""

import shutil
from pathlib import Path

import pytest
from launch import launch, read_scalars, read_trace, read_weights, run

MIXER = ("--job.custom_config_module", "mixer", "--model.name", "mixer_attent", "--model.flavor", "small")
STEPS = 5


def arguments(small_run: list[str], dump: Path, *extra: str) -> list[str]:
    settings = ["--job.dump_folder", str(dump), "--training.steps", str(STEPS), "--training.seq_len", "64"]
    # Adam divides the rounding errors of small gradients by its eps; those of other numbers of ranks differ.
    settings += [
        "--optimizer.eps",
        "1e-3",
        "--checkpoint.enable",
        "--checkpoint.interval",
        "3",
        "--checkpoint.keep_latest_k",
        "0",
    ]
    return [*small_run, *MIXER, *settings, "--validation.seq_len", "64", "--teacher.strategy", "hard", *extra]


def test_it_trains_on_two_processes_and_is_resumed_on_one(small_run: list[str], tmp_path: Path) -> None:
    run(*arguments(small_run, tmp_path))
    trace, weights = read_trace(tmp_path), read_weights(tmp_path, step=STEPS)
    losses = read_scalars(tmp_path, "loss_metrics/global_avg_loss")
    assert sorted(losses) == [*range(1, STEPS + 1)] and losses[STEPS] < losses[1]
    shutil.rmtree(tmp_path / "checkpoint" / f"step-{STEPS}")
    run(*arguments(small_run, tmp_path, "--training.local_batch_size", "8"), num_processes=1)
    assert read_trace(tmp_path) == trace
    resumed = read_weights(tmp_path, step=STEPS)
    assert resumed.keys() == weights.keys()
    assert all((resumed[name] - weights[name]).abs().max() < 1e-6 for name in weights)


def test_systems_that_count_flops_take_a_model_without_heads(small_run: list[str], tmp_path: Path) -> None:
    highway = ("--highway.method", "highway", "--highway.cut", "block", "--teacher.strategy", "uniform")
    run(*arguments(small_run, tmp_path, *highway, "--training.steps", "1"), num_processes=1)


@pytest.mark.parametrize("key", ["tensor", "context"])
def test_what_it_lacks_is_refused(small_run: list[str], tmp_path: Path, key: str) -> None:
    degree = (f"--parallelism.{key}_parallel_degree", "2")
    result = launch(*arguments(small_run, tmp_path, *degree), num_processes=2)
    assert result.returncode != 0
    assert f"[parallelism] {key}_parallel_degree = 2: the mixer runs under FSDP2, HSDP and DDP" in result.stderr
