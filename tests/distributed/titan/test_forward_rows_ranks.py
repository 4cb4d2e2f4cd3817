"""Scoring and validating documents in rows that they share, or in short rows, on one, two and three ranks.

The reference is one rank with a row of ``seq_len`` for each document. The validation data also have answers with a
mask, about half of which the model gives: exact match is compared with a loop over the examples.
"""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.parallel_world import Settings, config_of, full, plain_model, spec_of, teaching_of
from distributed.spawn import run_on_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from titan_attent.data.plan.order import Pool
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.writer import write_dataset
from titan_attent.titan import measured_sets as measured_sets_module
from titan_attent.titan import trainer as trainer_module
from titan_attent.titan.measured_sets import sample
from titan_attent.titan.trainer import TeachingTrainer

ROWS, VALIDATED = 6, 8
"""Rows of a global batch; the number of batches whose examples are validated."""
LENGTHS: Settings = {"training.seq_len": 64, "validation.seq_len": 64}
SHORT: Settings = {"model.flavor": "cell of 2"}
PACKED: Settings = {"model.flavor": "flex of 2", "data.document_mask": True}
TP, PP, CP = ({f"parallelism.{name}_parallel_degree": 2} for name in ("tensor", "pipeline", "context"))
COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager"}
WHOLE = "in whole rows"
CELLS: dict[int, dict[str, Settings]] = {
    1: {"short": SHORT, "packed": PACKED, f"short {WHOLE}": SHORT, f"packed {WHOLE}": PACKED},
    2: {
        "short": SHORT,
        "packed": PACKED,
        "short, compiled": SHORT | COMPILED,
        "short, TP": SHORT | TP,
        "packed, PP": PACKED | PP,
        "whole, PP": SHORT | PP,
        "whole, CP": SHORT | CP,
    },
    3: {"short": SHORT, "packed": PACKED},
}


def write_documents(folder: Path, tokenizer: Path) -> Path:
    """60 documents of a few tokens to two windows of 64."""
    source = (Path(json.__file__).parent / "scanner.py").read_text()
    rng, lines = np.random.default_rng(3), []
    for _ in range(60):
        start, size = int(rng.integers(0, 1500)), int(rng.choice([3, 20, 40, 60, 90, 350]))
        lines.append(json.dumps({"text": source[start : start + size]}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    write_dataset([folder / "documents.jsonl"], output=folder / "data", tokenizer=str(tokenizer))
    return folder / "data"


def write_answers(folder: Path, documents: Path) -> Path:
    """The first 30 of these documents, all of whose tokens count, and 30 prompts with one to three tokens that the
    model says next. One of these is changed in every other; in every tenth none counts."""
    shards, model, rng = TokenShards(documents), plain_model(SHORT | LENGTHS), np.random.default_rng(4)
    eos_id = shards.tokenizer_info["eos_id"]
    target = folder / "answers"
    target.mkdir()
    shutil.copy(documents / "tokenizer.tiktoken", target)
    ends = shards.document_ends(0, 0, 30).tolist()
    stream = np.fromfile(documents / shards.index.shards[0].file, dtype=shards.dtype)
    entries = []
    with ShardWriter(target / "shard-00000.bin", dtype=shards.dtype, source="text", mask=True) as shard:
        for start, end in zip([0, *ends], ends, strict=False):
            shard.append_document(stream[start:end])
        entries.append(shard.finish())
    with ShardWriter(target / "shard-00001.bin", dtype=shards.dtype, source="answers", mask=True) as shard:
        for i in range(30):
            prompt, length = rng.integers(eos_id, size=int(rng.integers(2, 55))), 1 + i % 3
            tokens = prompt.tolist()
            for _ in range(length):
                with torch.no_grad():
                    tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            if i % 2:
                tokens[len(prompt) + i % length] = (tokens[len(prompt) + i % length] + 1) % eos_id
            counts = np.arange(len(tokens) + 1) >= len(prompt)
            counts[-1] = False
            shard.append_document(np.array([*tokens, eos_id]), counts & (i % 10 > 0))
        entries.append(shard.finish())
    info = shards.tokenizer_info
    write_index(target, dtype=shards.dtype, shards=entries, num_documents=60, max_token_id=eos_id, tokenizer=info)
    return target


def matches_by_hand(answers: Path) -> dict[str, float]:
    """The metrics of exact match over the examples that a run validates, one at a time."""
    model, dataset = plain_model(SHORT | LENGTHS), DocumentDataset(answers, seq_len=64)
    (_, second) = (first for _, first in dataset.sources)
    found: dict[str, list[bool]] = {"text": [], "answers": []}
    tokens: list[bool] = []
    for i in sample(dataset, num_examples=VALIDATED * ROWS).ids(torch.arange(VALIDATED * ROWS)).tolist():
        inputs, labels = dataset.read(torch.tensor([i]))
        with torch.no_grad():
            best = model(inputs["input"])[0].argmax(-1).tolist()
        right = [said == label for said, label in zip(best, labels[0].tolist(), strict=True) if label != -100]
        tokens += right
        if right:
            found["text" if i < second else "answers"].append(all(right))
    matches = found["text"] + found["answers"]
    shares = {f"/{name}": np.mean(found[name]) for name in found} | {"": np.mean(matches)}
    metrics = {f"validation_metrics/exact_match{name}": float(share) for name, share in shares.items()}
    return metrics | {"validation_metrics/token_accuracy": float(np.mean(tokens))}


def measure(settings: Settings, *, data: str, folder: str) -> dict[str, Any]:
    """Losses in the buffer, validation loss, and tokens that a forward pass over everything reads."""
    trainer = TeachingTrainer(config_of(settings, data=data, folder=folder))
    try:
        weights = plain_model(settings).state_dict()
        options = StateDictOptions(full_state_dict=True, strict=False)
        for part in trainer.model_parts:
            named = {name.replace("_orig_mod.", ""): name for name in part.state_dict()}
            own = {named.get(name, name): value.clone() for name, value in weights.items()}
            set_model_state_dict(part, own, options=options)
        teaching = teaching_of(trainer)
        assert teaching is not None
        num_tokens, stock = 0, trainer.forward

        def counted(batches: Any, loss: Any) -> Any:
            nonlocal num_tokens
            for batch, seen in stock(batches, loss):
                num_tokens += batch.labels.numel()
                yield batch, seen

        object.__setattr__(teaching.run, "forward", counted)
        teaching.score_examples(0, Pool.whole(len(trainer.loader.dataset)))
        teaching.buffer.sync()
        logged: list[dict[str, float]] = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
        trainer.validator.validate(trainer.model_parts, 1)
        state = {name: full(tensor) for name, tensor in teaching.buffer.state_dict().items()}
        return {"buffer": state, "validation": logged[-1], "tokens": num_tokens}
    finally:
        trainer.close()


def measure_cells(mesh: Any, size: int, data: str, answers: str, folder: str) -> dict[str, dict[str, Any]]:
    """Every cell in turn, in one process group."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(size)
    results = {}
    for name, own in CELLS[size].items():
        settings: Settings = {
            **{"data.unit": "document", "teacher.scoring": "forward", "teacher.warmup_passes": 0},
            **{"validation.enable": True, "validation.steps": VALIDATED},
            **{"data.exact_match": True, "data.validation_path": answers},
            **{"training.global_batch_size": ROWS, "training.local_batch_size": rows_of(size, name)},
            **{"validation.local_batch_size": rows_of(size, name)},
            **LENGTHS,
        } | own
        spec_of(config_of(settings, data=data, folder="").model.name)
        with ExitStack() as patches:
            if name.endswith(WHOLE):
                patches.enter_context(mock.patch.object(trainer_module, "forward_rows_of", lambda *args: None))
                builder = mock.patch.object(measured_sets_module, "build_forward_rows", lambda *args, **kwargs: None)
                patches.enter_context(builder)
            results[name] = measure(settings, data=data, folder=f"{folder}/{size} {name}")
    return results


def rows_of(size: int, name: str) -> int:
    """The rows of a rank in a batch of ``ROWS``."""
    peers = 2 if name[-2:] in ("TP", "PP", "CP") else 1
    return ROWS * peers // size


@pytest.fixture(scope="module")
def measured(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("rows")
    data = write_documents(folder, token_data["train"] / "tokenizer.tiktoken")
    answers = write_answers(folder, data)
    return {
        size: run_on_ranks(measure_cells, size, size, str(data), str(answers), str(folder), timeout=400.0, apart=True)
        for size in CELLS
    } | {0: (DocumentDataset(data, seq_len=64), matches_by_hand(answers))}


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size, cells in CELLS.items() for name in cells if not name.endswith(WHOLE)]
)
def test_scores_and_validation_are_those_of_whole_rows(measured: dict[int, Any], size: int, name: str) -> None:
    dataset, matches = measured[0]
    whole = measured[1][0][f"{'packed' if 'packed' in name else 'short'} {WHOLE}"]
    num_whole_tokens = whole["tokens"] * rows_of(size, name) // ROWS  # as many batches, each of them on the ranks
    if name.endswith("CP"):  # each rank has half of every row
        num_whole_tokens //= 2
    for rank in measured[size]:
        ours = rank[name]
        assert ours["buffer"].keys() == whole["buffer"].keys()
        for key, value in whole["buffer"].items():
            np.testing.assert_allclose(ours["buffer"][key], value, rtol=2e-5, atol=1e-6, err_msg=key)
        assert len(ours["buffer"]["loss"]) == len(dataset) and (ours["buffer"]["step"] == 0).all()
        key = "validation_metrics/loss"
        assert ours["validation"][key] == pytest.approx(whole["validation"][key], rel=1e-6)
        for run in (ours, whole):
            assert {key: run["validation"][key] for key in matches} == pytest.approx(matches, rel=1e-12)
        if name.startswith("whole"):
            assert ours["tokens"] == num_whole_tokens
        else:
            assert ours["tokens"] < 0.75 * num_whole_tokens


def test_about_half_of_the_answers_are_the_models(measured: dict[int, Any]) -> None:
    """The comparison above would notice an example too many or too few."""
    _, matches = measured[0]
    assert 0.3 < matches["validation_metrics/exact_match/answers"] < 0.7
    assert matches["validation_metrics/exact_match/text"] < 0.2 < 1 - matches["validation_metrics/token_accuracy"]
