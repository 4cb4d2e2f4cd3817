"""The control: strategy "uniform" is stock torchtitan on the same batches, bit for bit."""

import json
import shutil
from pathlib import Path

import torch
from launch import read_scalars, read_trace, read_weights, run, write_config

LOSS = "loss_metrics/global_avg_loss"


def test_uniform_equals_stock_torchtitan_bit_for_bit(token_data: dict[str, Path], tmp_path: Path) -> None:
    """On data of two sources, whose losses are measured in every second step, the logged ones."""
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    data = {**token_data, "train": shutil.copytree(token_data["train"], tmp_path / "data")}
    index = json.loads((data["train"] / "index.json").read_text())
    index["shards"][0]["source"] = "first"
    (data["train"] / "index.json").write_text(json.dumps(index))
    config = str(write_config(tmp_path, data=data, dump=ours))
    same = ("--job.config_file", config, "--checkpoint.enable", "--training.steps", "12", "--metrics.log_freq", "2")
    run(*same, "--teacher.strategy", "uniform")
    run(
        *same,
        *("--job.dump_folder", str(stock), "--model.name", "stock"),
        *("--job.custom_config_module", "titan_attent.job_config"),  # the TOML's extra sections
        module="stock_trainer",
        STOCK_DATA=str(data["train"]),
        STOCK_TRACE=str(ours / "teacher" / "trace.jsonl"),
    )
    assert all(line["strategy"] == "uniform" for line in read_trace(ours))
    losses = read_scalars(ours, LOSS)
    assert sorted(losses) == [1, *range(2, 13, 2)]
    first, rest = (read_scalars(ours, f"loss_metrics/by_source/{name}") for name in ("first", "default"))
    assert len(first.keys() & rest.keys()) > 3 and first.keys() | rest.keys() == losses.keys()
    assert all(min(first[i], rest[i]) < losses[i] < max(first[i], rest[i]) for i in first.keys() & rest.keys())
    assert losses == read_scalars(stock, LOSS)
    assert read_scalars(ours, "grad_norm") == read_scalars(stock, "grad_norm")
    weights, expected = read_weights(ours, step=12), read_weights(stock, step=12)
    assert expected and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
