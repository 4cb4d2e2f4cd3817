"""A killed run, resumed under torchrun, is the uninterrupted run: same examples, same losses to the last digit.

test_kills.py kills in every phase, test_elastic.py resumes on other numbers of ranks; neither does so under torchrun.
"""

from pathlib import Path

from launch import read_scalars, read_trace, run, run_until_killed, write_config

LOSS = "loss_metrics/global_avg_loss"
CHECKPOINTS = ("--checkpoint.enable", "--checkpoint.interval", "10")


def test_kill_and_resume_equals_uninterrupted(token_data: dict[str, Path], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    config = str(write_config(tmp_path, data=token_data, dump=straight))
    run("--job.config_file", config, *CHECKPOINTS)

    args = ("--job.config_file", config, "--job.dump_folder", str(killed), *CHECKPOINTS)
    run_until_killed(*args, trace=killed / "teacher" / "trace.jsonl", step=11)
    assert not (killed / "checkpoint" / "step-20").exists()
    output = run(*args, launcher="torchrun")

    assert "Training starts at step 11" in output
    assert len(read_trace(straight)) == 20
    assert {line["strategy"] for line in read_trace(straight)} == {"uniform", "soft"}
    assert read_trace(killed) == read_trace(straight)
    losses = read_scalars(straight, LOSS)
    assert sorted(losses) == list(range(1, 21))
    assert read_scalars(killed, LOSS) == losses
    assert len(list((killed / "tb").iterdir())) == 1, "the resumed run must go on in the same TensorBoard folder"
