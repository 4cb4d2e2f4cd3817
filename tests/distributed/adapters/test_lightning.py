"""The Lightning adapter with the real Trainer, against a plain loop with the same teacher."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed.spawn import run_on_ranks

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.teacher import Teacher

NUM, LENGTH, VOCAB, BATCH, STEPS = 48, 12, 32, 8, 16
HARD = TeacherConfig(strategy="hard", importance="loss", initial_ratio=0.5, final_ratio=0.5, full_data_tail=0.0)


def examples() -> list[dict[str, torch.Tensor]]:
    """Half of the rows count upwards, the others are random."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for i in range(NUM):
        ids = torch.arange(i, i + LENGTH + 1) % VOCAB
        ids = ids if i % 2 else torch.randint(VOCAB, (LENGTH + 1,), generator=random)
        rows.append({"input": ids[:-1], "labels": ids[1:]})
    return rows


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB))


def train(
    mesh: Any, folder: Path, microbatches: int, resume: str | None = None, save_every: int | None = None
) -> dict[str, Any]:
    """Weights, visits and losses of the buffer after a training by the adapter."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from titan_attent.adapters.lightning import TeachingCallback

    ranks = 1 if mesh is None else mesh.size()
    teaching = TeachingCallback(HARD, examples(), batch_size=BATCH, max_steps=STEPS)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return teaching.loss(self.model(batch["input"]), batch["labels"], batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-1)

    strategy: Any = "auto"
    if mesh is not None:
        rank = str(mesh.get_local_rank())  # what torchrun sets; the process group stands
        os.environ.update(
            RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="test")
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    saves = [ModelCheckpoint(dirpath=folder, every_n_train_steps=save_every, save_top_k=-1)] if save_every else []
    trainer = lightning.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=STEPS, callbacks=[teaching, *saves],
        accumulate_grad_batches=microbatches, use_distributed_sampler=False, logger=False,
        enable_checkpointing=bool(saves), enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, teaching.dataloader(), ckpt_path=resume)
    assert trainer.global_step == STEPS
    assert teaching.teaching is not None
    return outcome(module, teaching.teaching.buffer)


def outcome(learner: torch.nn.Module, buffer: LossBuffer) -> dict[str, Any]:
    buffer.sync()
    shards = [buffer.sharding.as_global(tensor) for tensor in (buffer.visits, buffer.loss)]
    visits, losses = (shard.full_tensor() if hasattr(shard, "full_tensor") else shard for shard in shards)
    return {"weights": [p.detach().clone() for p in learner.parameters()], "visits": visits, "losses": losses}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    learner, rows = model(), examples()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-1)
    buffer = LossBuffer(NUM)
    teacher = Teacher(buffer, HARD, batch_size=BATCH, total_steps=STEPS)
    for step, (ids, weights) in zip(range(1, STEPS + 1), TeachingSampler(teacher), strict=False):
        inputs, labels = (torch.stack([rows[i][name] for i in ids.tolist()]) for name in ("input", "labels"))
        sums, counts = per_example_cross_entropy(learner(inputs), labels)
        (weights @ sums / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        buffer.record(ids, (sums / counts).detach(), step=step)
        teacher.step_done()
    found = outcome(learner, buffer)
    assert int(found["visits"].sum()) == BATCH * STEPS and len(found["visits"].unique()) > 1  # it has selected
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found["visits"], expected["visits"])
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_is_the_plain_loop(expected: dict[str, Any], microbatches: int, tmp_path: Path) -> None:
    assert_same(train(None, tmp_path, microbatches), expected)


def test_two_ranks_that_accumulate_and_a_resume_on_one(expected: dict[str, Any], tmp_path: Path) -> None:
    for found in run_on_ranks(train, 2, tmp_path, 2, None, 9):
        assert_same(found, expected)
    (saved,) = tmp_path.glob("*step=9.ckpt")
    assert_same(train(None, tmp_path / "resumed", 2, str(saved)), expected)
    with pytest.raises(ValueError, match="the checkpoint accumulates 2 batches, this Trainer 1"):
        train(None, tmp_path / "accumulated", 1, str(saved))


def test_other_max_steps() -> None:
    from titan_attent.adapters.lightning import TeachingCallback

    teaching = TeachingCallback(HARD, examples(), batch_size=BATCH, max_steps=STEPS)
    with pytest.raises(ValueError, match="max_steps is 16 for the teacher and 3 for the Trainer"):
        teaching.setup(SimpleNamespace(max_steps=3), None, "fit")
