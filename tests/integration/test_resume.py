"""A killed and resumed run equals the uninterrupted run: same examples, bit-identical losses.

Tests every async mode that works on a CPU, and torchrun once (-m exhaustive). test_kills.py kills in every phase,
test_elastic.py resumes on other numbers of ranks, and tests/gpu/test_async_saves.py tests all async modes on a GPU.
"""

from pathlib import Path
from typing import Literal

import pytest
from launch import kill_when, read_scalars, read_trace, run, start, write_config

LOSS = "loss_metrics/global_avg_loss"
CHECKPOINTS = ("--checkpoint.enable", "--checkpoint.interval", "10")


@pytest.fixture(scope="module")
def straight(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run, which saves synchronously; its config.toml is in the parent folder."""
    folder = tmp_path_factory.mktemp("resume")
    config = str(write_config(folder, data=token_data, dump=folder / "straight"))
    run("--job.config_file", config, *CHECKPOINTS)
    return folder / "straight"


@pytest.mark.parametrize(
    ("async_mode", "launcher"),
    [("disabled", "fork"), ("async", "fork"), pytest.param("async", "torchrun", marks=pytest.mark.exhaustive)],
)
def test_kill_and_resume_equals_uninterrupted(
    straight: Path, tmp_path: Path, async_mode: str, launcher: Literal["fork", "torchrun"]
) -> None:
    killed = tmp_path / "killed"
    trace, complete = killed / "teacher" / "trace.jsonl", killed / "checkpoint" / "step-10" / ".metadata"
    args = (
        *("--job.config_file", str(straight.parent / "config.toml"), "--job.dump_folder", str(killed)),
        *(*CHECKPOINTS, "--checkpoint.async_mode", async_mode),
    )
    kill_when(
        lambda: complete.exists() and trace.exists() and trace.read_text().count("\n") >= 11,
        start(*args),
    )
    assert not (killed / "checkpoint" / "step-20").exists()
    output = run(*args, launcher=launcher)

    assert "Training starts at step 11" in output
    assert len(read_trace(straight)) == 20
    assert {line["strategy"] for line in read_trace(straight)} == {"uniform", "soft"}
    assert read_trace(killed) == read_trace(straight)
    losses = read_scalars(straight, LOSS)
    assert sorted(losses) == list(range(1, 21))
    assert read_scalars(killed, LOSS) == losses
    assert len(list((killed / "tb").iterdir())) == 1, "the resumed run must continue in the same TensorBoard folder"
