"""The control: strategy "uniform" is stock torchtitan on the same batches, bit for bit."""

from pathlib import Path

import torch
from launch import read_scalars, read_trace, read_weights, run, write_config

LOSS = "loss_metrics/global_avg_loss"


def test_uniform_equals_stock_torchtitan_bit_for_bit(token_data: dict[str, Path], tmp_path: Path) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    config = str(write_config(tmp_path, data=token_data, dump=ours))
    run("--job.config_file", config, "--teacher.strategy", "uniform", "--checkpoint.enable", "--training.steps", "12")
    run(
        *("--job.config_file", config, "--checkpoint.enable", "--training.steps", "12"),
        *("--job.dump_folder", str(stock), "--model.name", "stock"),
        *("--job.custom_config_module", "titan_attent.job_config"),  # the TOML's extra sections
        module="stock_trainer",
        STOCK_DATA=str(token_data["train"]),
        STOCK_TRACE=str(ours / "teacher" / "trace.jsonl"),
    )
    assert all(line["strategy"] == "uniform" for line in read_trace(ours))
    losses = read_scalars(ours, LOSS)
    assert sorted(losses) == list(range(1, 13))
    assert losses == read_scalars(stock, LOSS)
    assert read_scalars(ours, "grad_norm") == read_scalars(stock, "grad_norm")
    weights, expected = read_weights(ours, step=12), read_weights(stock, step=12)
    assert expected and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
