"""An external system (beside.py) with a frozen second model, or with three-dimensional columns.

The gradient norm of a step in one process is compared with torchtitan's bare models, and then with every parallelism.
"""

from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from beside import write_targets
from launch import launch, read_scalars, read_trace, read_weights, run
from torch.nn import functional as F
from torchtitan.models.llama3 import Transformer

from titan_attent.data.text.shards import TokenDataset
from titan_attent.titan.train_spec import attent_spec

SEQ_LEN, STEPS, NUM_LAYERS = 64, 4, 2
BESIDE = ["--job.custom_config_module", "beside", "--model.flavor", "scorer_s", "--training.max_norm", "1e9"]
BATCH = ["--training.global_batch_size", "8"]


def arguments(small_run: list[str], dump: Path, *extra: str, steps: int = STEPS) -> list[str]:
    length = [
        "--training.steps",
        str(steps),
        "--lr_scheduler.total_steps",
        str(STEPS),
        "--lr_scheduler.warmup_steps",
        "0",
    ]
    kept = ["--checkpoint.enable", "--checkpoint.interval", "2", "--job.dump_folder", str(dump)]
    return [*small_run, *length, *kept, *BESIDE, *BATCH, "--teacher.strategy", "uniform", *extra]


@pytest.fixture(scope="module")
def frozen(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights of step 2 are those of the frozen model."""
    dump = tmp_path_factory.mktemp("frozen")
    run(*arguments(small_run, dump, "--optimizer.lr", "0.05", "--debug.seed", "3", steps=2), num_processes=1)
    return dump


@pytest.fixture(scope="module")
def extras(small_run: list[str], frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    data = dataset_of(small_run)
    targets = tmp_path_factory.mktemp("targets") / "targets.pt"
    vocab_size = data.shards.index.tokenizer["vocab_size"]
    write_targets(targets, num_examples=len(data), seq_len=SEQ_LEN, vocab_size=vocab_size)
    return {
        "model": ["--beside.checkpoint", str(frozen / "checkpoint" / "step-2")],
        "columns": ["--beside.targets", str(targets)],
    }


def dataset_of(small_run: list[str]) -> TokenDataset:
    config = Path(small_run[1]).read_text()
    path = config.split('path = "')[1].split('"')[0]
    return TokenDataset(path, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def alone(
    small_run: list[str], extras: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of each variant on one process."""
    dumps = {name: tmp_path_factory.mktemp(name) for name in extras}
    for name, extra in extras.items():
        trace = ["--teacher.trace", "--checkpoint.keep_latest_k", "0"]
        run(*arguments(small_run, dumps[name], "--training.local_batch_size", "8", *trace, *extra), num_processes=1)
    return dumps


def bare_model(data: TokenDataset) -> Transformer:
    args: Any = attent_spec("llama3_attent", data=str(data.shards.path)).model_args["scorer_s"]
    args.max_seq_len = SEQ_LEN
    model = Transformer(args)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model


def weights_at(dump: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in read_weights(dump, step=step).items() if "." in name}


@pytest.mark.parametrize("variant", ["model", "columns"])
def test_the_term_is_differentiated(
    variant: str, small_run: list[str], extras: dict[str, list[str]], alone: dict[str, Path], frozen: Path
) -> None:
    """The gradient norm of step 3 against bare models with the weights of step 2 on the traced examples."""
    data = dataset_of(small_run)
    model, other = bare_model(data), bare_model(data)
    names = model.state_dict().keys()
    model.load_state_dict({name: w for name, w in weights_at(alone[variant], 2).items() if name in names})
    ids = torch.tensor(read_trace(alone[variant])[2]["ids"])
    inputs, labels = data.batch(ids)
    logits = model(inputs)
    if variant == "model":
        other.load_state_dict({name: w for name, w in weights_at(frozen, 2).items() if name in names})
        with torch.no_grad():
            towards = other(inputs)
        term = (logits - towards).square().mean(dim=-1).sum()
    else:
        targets = torch.load(extras["columns"][1])
        top_ids, top_logits = targets["ids"][ids].long(), targets["logits"][ids].float()
        term = (logits.gather(-1, top_ids) - top_logits).square().mean(dim=-1).sum()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    ((loss + term) / labels.numel()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert read_scalars(alone[variant], "grad_norm")[3] == pytest.approx(norm, rel=1e-4)
    assert read_scalars(alone[variant], "loss_metrics/global_avg_loss")[3] == pytest.approx(
        loss.item() / labels.numel(), rel=1e-5
    )


CELLS = {
    "FSDP2": ["--training.local_batch_size", "4"],
    "TP": ["--training.local_batch_size", "8", "--parallelism.tensor_parallel_degree", "2"],
    "PP": ["--training.local_batch_size", "8", "--parallelism.pipeline_parallel_degree", "2"],
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", ["model", "columns"])
def test_every_parallelism_trains_the_same(
    variant: str,
    cell: str,
    small_run: list[str],
    extras: dict[str, list[str]],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Each resumes the checkpoint of the run on one process, so this also tests another number of ranks."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-2").symlink_to(alone[variant] / "checkpoint" / "step-2")
    run(*arguments(small_run, tmp_path, *CELLS[cell], *extras[variant]))
    for tag in ("loss_metrics/global_avg_loss", "grad_norm"):
        found, expected = read_scalars(tmp_path, tag), read_scalars(alone[variant], tag)
        np.testing.assert_allclose([found[3], found[4]], [expected[3], expected[4]], rtol=2e-4, err_msg=tag)


def test_a_checkpoint_of_another_model_is_refused_before_the_start(
    small_run: list[str], extras: dict[str, list[str]], tmp_path: Path
) -> None:
    other = ["--model.flavor", "scorer_xs", "--training.local_batch_size", "8"]
    result = launch(*arguments(small_run, tmp_path, *extras["model"], *other), num_processes=1)
    assert result.returncode != 0 and "is of another model" in result.stderr
    assert not (tmp_path / "checkpoint").exists()
