"""Images through the real command: uniform is stock training, a resume is no difference, a trunk gets a new head."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import kill_when, launch, read_scalars, read_trace, read_weights, run, start

from titan_attent.data.images import write_images

LOSS = "loss_metrics/global_avg_loss"
STEPS, SAVED, BATCH = 14, 8, 12
TOLERANCE = 2e-6
"""Of fp32 losses whose sums run in another order."""
CONFIG = """
[job]
dump_folder = "{dump}"
[model]
name = "vit_attent"
flavor = "tiny"
[data]
path = "{data}"
validation_path = "{data}"
num_workers = 2
[teacher]
strategy = "soft"
importance = "loss"
ratio_schedule = "constant"
initial_ratio = 0.5
trace = true
[training]
local_batch_size = 6
global_batch_size = 12
steps = {steps}
mixed_precision_param = "float32"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 2
[metrics]
log_freq = 1
enable_tensorboard = true
[validation]
enable = false
[checkpoint]
enable = true
interval = {saved}
last_save_model_only = false
[activation_checkpoint]
mode = "none"
[debug]
seed = 0
"""
RANDOM = (
    *("--vision.padding", "1", "--vision.flip", "0.5", "--vision.crop_scale", "0.6", "--vision.jitter", "0.2"),
    *("--vision.drop_path", "0.3", "--vision.mixup", "0.5", "--vision.cutmix", "1.0"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 6 classes: images.npz, and the shards of it."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 48)
    images = (rng.integers(0, 256, (48, 8, 8)) // 2 + labels[:, None, None] * 20).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    write_images([folder / "images.npz"], output=folder / "shards", grayscale=True)
    np.savez(folder / "fewer.npz", images=images[labels < 5], labels=labels[labels < 5])
    write_images([folder / "fewer.npz"], output=folder / "fewer", grayscale=True)
    return folder


def config(folder: Path, data: Path, *, dump: Path) -> list[str]:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(dump=dump, data=data / "shards", steps=STEPS, saved=SAVED))
    return ["--job.config_file", str(path)]


def test_uniform_equals_stock_training_bit_for_bit(data: Path, tmp_path: Path) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    arguments = config(tmp_path, data, dump=ours)
    run(*arguments, "--teacher.strategy", "uniform")
    run(
        *(*arguments, "--job.dump_folder", str(stock), "--model.name", "stock"),
        *("--job.custom_config_module", "titan_attent.job_config"),
        module="stock_images",
        STOCK_DATA=str(data / "images.npz"),
        STOCK_INDEX=str(data / "shards" / "index.json"),
        STOCK_TRACE=str(ours / "teacher" / "trace.jsonl"),
    )
    losses = read_scalars(ours, LOSS)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == read_scalars(stock, LOSS)
    assert read_scalars(ours, "grad_norm") == read_scalars(stock, "grad_norm")
    weights, expected = read_weights(ours, step=STEPS), read_weights(stock, step=STEPS)
    assert expected and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_killed_and_resumed_on_other_ranks_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """With everything random that there is: equal losses mean equal pixels, mixtures and blocks left out."""
    arguments = [*config(tmp_path, data, dump=tmp_path / "unused"), *RANDOM]

    def of(dump: Path, ranks: int) -> list[str]:
        local = str(BATCH // ranks)
        return [*arguments, "--job.dump_folder", str(dump), "--training.local_batch_size", local]

    whole = tmp_path / "whole"
    run(*of(whole, 1), num_processes=1)
    expected, trace = read_scalars(whole, LOSS), read_trace(whole)
    assert [line["step"] for line in trace] == list(range(1, STEPS + 1))
    assert trace[SAVED]["strategy"] == "soft"
    for written_by, resumed_by in ((2, 1), (1, 3)):
        dump = tmp_path / f"{written_by}-{resumed_by}"
        if written_by == 1:
            shutil.copytree(whole, dump)
            shutil.rmtree(dump / "checkpoint" / f"step-{STEPS}")
        else:
            metadata = dump / "checkpoint" / f"step-{SAVED}" / ".metadata"
            kill_when(metadata.exists, start(*of(dump, written_by), num_processes=written_by))
        output = run(*of(dump, resumed_by), num_processes=resumed_by)
        assert f"Training starts at step {SAVED + 1}" in output
        assert read_trace(dump) == trace
        losses = read_scalars(dump, LOSS)
        assert losses == {step: pytest.approx(loss, rel=TOLERANCE) for step, loss in expected.items()}


def test_a_trunk_gets_a_new_head_and_scores(data: Path, tmp_path: Path) -> None:
    """Masked autoencoding, then its trunk under a classifier, whose losses another run is taught by."""
    arguments = config(tmp_path, data, dump=tmp_path / "mae")
    run(
        *arguments,
        "--model.name",
        "mae_attent",
        "--training.steps",
        "3",
        "--training.local_batch_size",
        "12",
        num_processes=1,
    )
    weights, checkpoint = read_weights(tmp_path / "mae", step=3), tmp_path / "mae" / "checkpoint" / "step-3"
    fine = [
        *(*arguments, "--job.dump_folder", str(tmp_path / "vit"), "--training.steps", "2"),
        *("--training.local_batch_size", "12", "--checkpoint.initial_load_path", str(checkpoint)),
        *("--vision.new_head", "--optimizer.lr", "0"),
    ]
    refused = launch(*fine, "--model.flavor", "xs", "--vision.patch_size", "2", num_processes=1)
    assert refused.returncode != 0 and "has another trunk: " in refused.stderr
    assert "with a new head" in run(*fine, num_processes=1)
    started = read_weights(tmp_path / "vit", step=2)
    trunk = {name for name in started if not name.startswith("output.")}
    assert len(trunk) > 40 and all(torch.equal(started[name], weights[name]) for name in trunk)

    losses = tmp_path / "losses"
    run(
        *("checkpoint", "--output", str(losses), *arguments),
        *("--checkpoint.initial_load_path", str(tmp_path / "vit" / "checkpoint" / "step-2")),
        module="titan_attent.score",
    )
    taught = (*arguments, "--job.dump_folder", str(tmp_path / "taught"), "--teacher.scores", str(losses))
    run(*taught, "--teacher.importance", "excess_loss", "--training.steps", "6")
    assert read_scalars(tmp_path / "taught", "throughput(ips)")[6] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vision.patch_size", "3"], "[vision] image_size = 8: patches of patch_size = 3 do not fill it"),
        (["--parallelism.tensor_parallel_degree", "2"], "vit_attent runs under FSDP2, HSDP and DDP. Set it to 1"),
        (
            ["--freezing.policy", "mat"],
            '[freezing] with vit_attent: it is for text, and vit_attent trains on images. Set policy = "off"',
        ),
        (["--vision.new_head"], "new_head = true needs a checkpoint for the trunk"),
        (["--vision.flip", "2"], "[vision] flip = 2.0"),
        (["--model.name", "mae_attent", "--vision.mixup", "1"], "mae_attent has no classes"),
        (["--data.validation_path", "nowhere", "--validation.enable"], "[data] validation_path: nowhere"),
        (
            ["--data.validation_path", "DATA/fewer", "--validation.enable"],
            "has the classes 0, 1, 2, 3, 4, but data.path has",
        ),
    ],
)
def test_mistakes_are_told_before_the_start(arguments: list[str], message: str, data: Path, tmp_path: Path) -> None:
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    result = launch(*config(tmp_path, data, dump=tmp_path / "dump"), *arguments)
    assert result.returncode != 0 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
