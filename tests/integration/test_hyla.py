"""``hyla_attent`` by the ordinary command: uniform is torchtitan's own training of the same model, and a run killed and
resumed on other numbers of processes is the uninterrupted one."""

import shutil
from pathlib import Path

import torch
from launch import kill_when, launch, read_scalars, read_trace, read_weights, run, start, write_config

LOSS = "loss_metrics/global_avg_loss"
MODEL = ("--model.name", "hyla_attent", "--model.flavor", "bench")
STEPS = 7


def arguments(small_run: list[str], dump: Path, *extra: str, ranks: int = 2) -> list[str]:
    settings = ["--job.dump_folder", str(dump), "--training.steps", str(STEPS), "--training.seq_len", "32"]
    settings += ["--training.global_batch_size", "12", "--training.local_batch_size", str(12 // ranks)]
    settings += ["--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.keep_latest_k", "0"]
    return [*small_run, *MODEL, *settings, "--validation.seq_len", "32", *extra]


def test_killed_and_resumed_on_one_and_then_three_processes(small_run: list[str], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    # Adam divides the rounding errors of small gradients by its eps; those of other numbers of ranks differ.
    teacher = ("--teacher.strategy", "hard", "--optimizer.eps", "1e-3")
    run(*arguments(small_run, straight, *teacher))
    shutil.copytree(straight, killed)
    for step in (6, STEPS):
        shutil.rmtree(killed / "checkpoint" / f"step-{step}")
    written = killed / "checkpoint" / "step-6" / ".metadata"
    kill_when(written.exists, start(*arguments(small_run, killed, *teacher, ranks=1), num_processes=1))
    assert not (killed / "checkpoint" / f"step-{STEPS}" / ".metadata").exists()
    output = run(*arguments(small_run, killed, *teacher, ranks=3), num_processes=3)
    assert "Training starts at step 7" in output
    assert read_trace(killed) == read_trace(straight)
    weights, resumed = read_weights(straight, step=STEPS), read_weights(killed, step=STEPS)
    assert resumed.keys() == weights.keys()
    errors = {name: (resumed[name] - weights[name]).abs().max().item() for name in weights}
    assert max(errors.values()) < 1e-6, errors


def test_uniform_equals_stock_torchtitan_bit_for_bit(token_data: dict[str, Path], tmp_path: Path) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    config = ["--job.config_file", str(write_config(tmp_path, data=token_data, dump=ours))]
    run(*arguments(config, ours, "--teacher.strategy", "uniform"))
    run(
        *arguments(config, stock, "--model.name", "stock"),
        *("--job.custom_config_module", "titan_attent.job_config"),
        module="stock_trainer",
        STOCK_DATA=str(token_data["train"]),
        STOCK_TRACE=str(ours / "teacher" / "trace.jsonl"),
        STOCK_FAMILY="hyla",
    )
    losses = read_scalars(ours, LOSS)
    assert sorted(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1]
    assert losses == read_scalars(stock, LOSS)
    weights, expected = read_weights(ours, step=STEPS), read_weights(stock, step=STEPS)
    assert expected and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_labels_in_the_input_of_the_authors_model_are_refused(small_run: list[str], tmp_path: Path) -> None:
    result = launch(*arguments(small_run, tmp_path, "--model.flavor", "reference_fuzzy_logic"), num_processes=1)
    assert result.returncode != 0
    assert "sees later tokens, so a row must have one label, at its end" in result.stderr
