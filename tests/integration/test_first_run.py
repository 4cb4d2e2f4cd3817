"""The quickstart's configuration on a machine without a GPU, and the log of its first minutes."""

import json
import re
from pathlib import Path

import titan_attent.titan.patches.compat as compat

import pytest
from launch import launch, read_scalars, read_trace, run

from titan_attent.titan.patches import cpu

pytestmark = pytest.mark.skipif(not compat.IS_CPU, reason="tests the log on a machine without an accelerator")

QUICKSTART = Path(__file__).parents[2] / "train_configs" / "quickstart.toml"
NOISE = (
    *("lspci", "Peak flops", "Peak FLOPS", "A100", "mfu", "HF assets", "hf_assets_path", "NCCL", "nccl"),
    *("DTensor random operators", "DTensor manual_seed", "UserWarning"),
)
LOSS = "loss_metrics/global_avg_loss"


def no_native_bfloat16() -> None:
    """As on a CPU with AVX2 only; ``ONEDNN_MAX_CPU_ISA=AVX2`` does the same from outside."""

    def has_native_bfloat16() -> bool:
        return False

    cpu.has_native_bfloat16 = has_native_bfloat16


@pytest.fixture
def first_run(token_data: dict[str, Path], tmp_path: Path) -> list[str]:
    """The quickstart for three steps of a smaller flavor and batch."""
    return [
        *("--job.config_file", str(QUICKSTART), "--job.dump_folder", str(tmp_path / "run"), "--model.flavor", "bench"),
        *("--data.path", str(token_data["train"]), "--data.validation_path", str(token_data["validation"])),
        *("--data.unit", "window", "--training.seq_len", "128", "--validation.seq_len", "128"),
        *(
            "--training.global_batch_size",
            "8",
            "--training.local_batch_size",
            "4",
            "--training.steps",
            "3",
            "--metrics.log_freq",
            "1",
        ),
        *("--validation.steps", "1"),
        # Without the scorers that the script makes.
        *("--teacher.strategy", "hard", "--teacher.scores", ""),
        *("--teacher.importance", "loss", "--teacher.ratio_schedule", "incremental"),
    ]


def test_a_first_log_says_what_matters_and_nothing_of_gpus(first_run: list[str], tmp_path: Path) -> None:
    result = launch(*first_run, prepare=no_native_bfloat16)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert not [line for line in log.splitlines() for noise in NOISE if noise in line]
    # Both ranks write to this log; in the quickstart torchrun shows only the first.
    steps = re.findall(r"root - INFO - \S*step: +(\d+) .*loss: .*grad_norm: .*memory: .*tps: .*tflops: ", log)
    assert sorted(steps) == ["1", "1", "2", "2", "3", "3"]
    for line in ("Building device mesh", "Applied FSDP", "Training starts at step 1", "Saving a full checkpoint"):
        assert log.count(line) == 2, line
    assert log.count("validate step:  1") == 2
    assert log.count("Warmup steps (30) exceed total steps (3)") == 2, "a warning that is valid on a CPU too"
    (said,) = [line for line in log.splitlines() if "mixed_precision_param" in line]
    assert "INFO" in said and '"float32": this CPU has no instructions for bfloat16' in said

    reference = tmp_path / "reference"
    weights = ("--checkpoint.initial_load_path", str(tmp_path / "run" / "checkpoint" / "step-3"))
    scored = launch(
        *("checkpoint", "--output", str(reference)),
        *first_run,
        *weights,
        module="titan_attent.score",
        prepare=no_native_bfloat16,
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert json.loads((reference / "reference.json").read_text())["precision"] == "float32"


def test_a_precision_that_the_user_wrote_is_kept(first_run: list[str]) -> None:
    written = ("--training.mixed-precision-param=bfloat16", "--training.steps", "1", "--job.print_config")
    result = launch(*first_run, *written, num_processes=1, prepare=no_native_bfloat16)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r'"mixed_precision_param": "(\w+)"', result.stdout) == ["bfloat16"]
    (said,) = [line for line in result.stdout.splitlines() if "mixed_precision_param =" in line]
    assert "WARNING" in said and "is slow here" in said


def test_a_mistake_of_a_newcomer_ends_before_the_first_step(first_run: list[str]) -> None:
    """One mistake each that preflight and torchtitan's sections refuse; tests/unit has the full table."""
    for args, message in (
        (("--training.seq_len", "64"), "[validation] seq_len = 128 is above [training] seq_len = 64"),
        (("--validation.steps", "0"), "validation steps must be positive or -1"),
        (("--metrics.log_freq", "0"), "[metrics] log_freq = 0: it must be a whole number at least 1"),
    ):
        result = launch(*first_run, *args)
        assert result.returncode != 0
        assert result.stderr.count("titan_attent: error: ") == 1 and message in result.stderr
        assert "Traceback" not in result.stderr and "step:" not in result.stdout


def test_one_seed_is_one_run_on_one_two_and_three_processes(small_run: list[str], tmp_path: Path) -> None:
    """Equal initial weights give equal losses up to rounding, and so equal ids in the rounds with a selection."""
    traces, losses = {}, {}
    for num_processes in (1, 2, 3):
        dump = tmp_path / str(num_processes)
        run(
            *small_run,
            *("--job.dump_folder", str(dump), "--training.steps", "14", "--teacher.full_data_tail", "0"),
            *("--training.global_batch_size", "12", "--training.local_batch_size", str(12 // num_processes)),
            *("--teacher.strategy", "hard", "--teacher.initial_ratio", "0.5", "--teacher.final_ratio", "0.5"),
            num_processes=num_processes,
        )
        traces[num_processes], losses[num_processes] = read_trace(dump), read_scalars(dump, LOSS)
    rounds = {line["round"] for line in traces[1] if line["strategy"] == "hard"}
    assert len(rounds) >= 2 and len(traces[1]) == 14
    for num_processes in (2, 3):
        assert traces[num_processes] == traces[1]
        assert losses[num_processes][1] == pytest.approx(losses[1][1], rel=1e-6)
        assert losses[num_processes] == pytest.approx(losses[1], rel=1e-3)
