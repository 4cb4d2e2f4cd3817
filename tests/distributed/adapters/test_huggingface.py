"""The Hugging Face adapter with the real Trainer, against a plain loop with the same teacher."""

import os
from pathlib import Path
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


def examples() -> list[dict[str, list[int]]]:
    """Half of the rows count upwards, the others are random; some labels do not count."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for i in range(NUM):
        ids = torch.arange(i, i + LENGTH) % VOCAB if i % 2 else torch.randint(VOCAB, (LENGTH,), generator=random)
        labels = ids.clone()
        labels[: i % 5] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def arguments(folder: Path, *, ranks: int, microbatches: int, **more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // (ranks * microbatches),
        gradient_accumulation_steps=microbatches,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        logging_steps=4,
        disable_tqdm=True,
        **more,
    )


def train(mesh: Any, folder: Path, microbatches: int, resume: str | None = None, **more: Any) -> dict[str, Any]:
    """Weights, visits and losses of the buffer after a training by the adapter."""
    from titan_attent.adapters.huggingface import TeachingTrainer

    ranks = 1 if mesh is None else mesh.size()
    if mesh is not None:  # what torchrun sets
        rank = str(mesh.get_local_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # not used: the process group stands
    args = arguments(folder, ranks=ranks, microbatches=microbatches, **more)
    trainer = TeachingTrainer(HARD, model=model(), args=args, train_dataset=examples())
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer.model, trainer.teaching.buffer) | {"log": trainer.state.log_history}


def outcome(learner: Any, buffer: LossBuffer) -> dict[str, Any]:
    buffer.sync()
    visits, losses = (buffer.sharding.as_global(tensor) for tensor in (buffer.visits, buffer.loss))
    whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in (visits, losses)]
    return {"weights": [p.detach().clone() for p in learner.parameters()], "visits": whole[0], "losses": whole[1]}


def plain_loop() -> dict[str, Any]:
    learner, rows = model(), examples()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-2)
    buffer = LossBuffer(NUM)
    teacher = Teacher(buffer, HARD, batch_size=BATCH, total_steps=STEPS, data_seed=42)
    learner.train()
    for step, (ids, weights) in zip(range(1, STEPS + 1), TeachingSampler(teacher), strict=False):
        inputs, labels = (torch.tensor([rows[i][name] for i in ids.tolist()]) for name in ("input_ids", "labels"))
        sums, counts = per_example_cross_entropy(learner(input_ids=inputs).logits[:, :-1], labels[:, 1:])
        (weights @ sums / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        buffer.record(ids, (sums / counts).detach(), step=step)
        teacher.step_done()
    return outcome(learner, buffer)


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float = 1e-6) -> None:
    assert torch.equal(found["visits"], expected["visits"])
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=tolerance)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    outcome = plain_loop()
    assert int(outcome["visits"].sum()) == BATCH * STEPS and len(outcome["visits"].unique()) > 1  # it has selected
    return outcome


@pytest.mark.parametrize("microbatches", [1, 2])
def test_is_the_plain_loop(expected: dict[str, Any], microbatches: int, tmp_path: Path) -> None:
    found = train(None, tmp_path, microbatches)
    assert_same(found, expected)
    assert any("teacher/ratio" in logs for logs in found["log"])


def test_two_ranks_that_accumulate_and_a_resume_on_one(expected: dict[str, Any], tmp_path: Path) -> None:
    for found in run_on_ranks(_train_and_save, 2, tmp_path):
        assert_same(found, expected)
    assert (tmp_path / "checkpoint-9" / "teacher").is_dir()
    assert_same(train(None, tmp_path / "resumed", 1, str(tmp_path / "checkpoint-9")), expected)


def _train_and_save(mesh: Any, folder: Path) -> dict[str, Any]:
    return train(mesh, folder, 2, save_steps=9, save_strategy="steps")


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"max_steps": -1}, list, "set TrainingArguments\\(max_steps"),
        ({"label_smoothing_factor": 0.1}, list, "leave label_smoothing_factor"),
        ({}, iter, "needs a length and an index"),
    ],
)
def test_refusals(change: dict[str, Any], data: Any, message: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from titan_attent.adapters.huggingface import TeachingTrainer

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **({"max_steps": 4} | change))
    with pytest.raises(ValueError, match=message):
        TeachingTrainer(HARD, model=model(), args=args, train_dataset=data(examples()))


def test_checkpoints_that_it_cannot_resume_from(tmp_path: Path) -> None:
    from titan_attent.adapters.huggingface import TeachingTrainer

    trainer = TeachingTrainer(
        HARD, model=model(), args=arguments(tmp_path, ranks=1, microbatches=1), train_dataset=examples()
    )
    with pytest.raises(ValueError, match="was written without a teacher"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="No valid checkpoint"):  # as the Trainer itself, which does not start anew
        trainer.train(resume_from_checkpoint=True)
