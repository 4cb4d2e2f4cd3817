"""Scores of whole documents from spans, by a formula instead of a model: chunks, ranks, a scoring that was cut."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.data.io.reader import Reader
from titan_attent.data.plan import forward_rows as plan
from titan_attent.data.plan.forward_rows import ForwardRows
from titan_attent.data.text.document_examples import DocumentDataset, WholeDocuments
from titan_attent.data.text.writer import write_dataset
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.folding import ExampleLosses, finish
from titan_attent.scores.stored import Scoring, StoredScores
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan import user_errors
from titan_attent.titan.scoring import write_documents
from titan_attent.titan.scoring.write_documents import ranges, write_document_losses
from titan_attent.titan.scoring.write_losses import open_on_rank_zero

SEQ_LEN, BATCH_SIZE, NUM_DOCUMENTS = 16, 2, 170
LAYOUTS: dict[str, dict[str, Any]] = {
    "short": {"lengths": (8, SEQ_LEN)},
    "packed": {"lengths": (SEQ_LEN,), "max_examples": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """170 documents of 0 to 60 letters: some without a token beside the eos, some of five spans."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    sizes = [0 if i % 19 == 0 else int(rng.integers(1, 60)) for i in range(NUM_DOCUMENTS)]
    texts = ["".join(rng.choice(list("xyz ab"), size)) for size in sizes]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_dataset([folder / "text.jsonl"], output=folder / "data", tokenizer="train:260", shard_tokens=900)
    return folder / "data"


def nats(inputs: Tensor, labels: Tensor) -> Tensor:
    """A loss for each token, fp32."""
    return (((inputs * 31 + labels.clamp(min=0) * 17) % 97).float() + 1) / 50


def score(input_dict: dict[str, Tensor], labels: Tensor) -> ExampleLosses:
    index, valid = input_dict.get("example_index"), labels != IGNORE_INDEX
    tokens = torch.where(valid, nats(input_dict["input"], labels), 0.0)
    if index is None:
        return finish(tokens, valid, torch.ones(len(labels)))
    index = index + 8 * torch.arange(len(labels))[:, None]
    return finish(tokens, valid, torch.ones(8 * len(labels)), example_index=index)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Blocks of 16 examples, chunks of two batches."""
    with (
        mock.patch.object(plan, "MAX_BLOCK_EXAMPLES", 16),
        mock.patch.object(write_documents, "CHUNK_BATCHES", 2),
        mock.patch.object(user_errors, "wait_for_first_rank"),
    ):
        yield


def write(mesh: DeviceMesh | None, data: str, folder: str, layout: str, cut: int | None) -> int:
    """Score; with ``cut`` stop after that number of chunks. Returns the number of documents that were scored before."""
    sharding = ExampleSharding(NUM_DOCUMENTS, mesh=mesh)
    dataset = DocumentDataset(data, seq_len=SEQ_LEN)
    with small_chunks():
        rows = ForwardRows(dataset, **LAYOUTS[layout], rank=sharding.rank, num_ranks=sharding.size, add_up=sharding.sum)
    scoring = Scoring(
        **dataset.scored._asdict(), model="a formula", precision="float32", checkpoint="", checkpoint_sha256=""
    )
    stock, calls = write_documents._gathered, 0

    def gathered(*args: Any) -> Any:
        nonlocal calls
        if calls == cut:
            raise KeyboardInterrupt
        calls += 1
        return stock(*args)

    writer = ScoresWriter(folder, scoring=scoring)
    with small_chunks(), mock.patch.object(write_documents, "_gathered", gathered), open_on_rank_zero(writer) as start:
        try:
            write_document_losses(
                writer,
                score,
                start=start,
                dataset=dataset,
                forward_rows=rows,
                reader=Reader(0),
                sharding=sharding,
                batch_size=BATCH_SIZE,
            )
        except KeyboardInterrupt:
            assert cut is not None
        else:
            assert cut is None
    return start


def check(data: Path, folder: Path) -> None:
    whole = WholeDocuments(data)
    expected = []
    for i in range(NUM_DOCUMENTS):
        batch, labels = whole.read(torch.tensor([i]))
        valid = labels != IGNORE_INDEX
        expected.append(nats(batch["input"], labels)[valid].double().mean().item() if valid.any() else 0.0)
    stored = StoredScores(folder)
    stored.verify_checksum()
    np.testing.assert_allclose(stored.read(0, NUM_DOCUMENTS).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_scoring_goes_on_on_other_ranks(data: Path, tmp_path: Path, layout: str) -> None:
    """Three chunks on two ranks, two on one, the rest on three."""
    arguments = (str(data), str(tmp_path), layout)
    assert run_on_ranks(write, 2, *arguments, 3) == [0, 0]
    (first,) = run_on_ranks(write, 1, *arguments, 2, apart=True)
    assert 0 < first < NUM_DOCUMENTS
    starts = run_on_ranks(write, 3, *arguments, None)
    assert first < starts[0] < NUM_DOCUMENTS and len(set(starts)) == 1
    check(data, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_writes_the_mean_of_each_document(data: Path, tmp_path: Path, layout: str) -> None:
    assert run_on_ranks(write, 1, str(data), str(tmp_path), layout, None, apart=True) == [0]
    check(data, tmp_path)


@pytest.mark.parametrize(("start", "stop", "size"), [(0, 10, 4), (3, 10, 4), (8, 8, 4), (4, 9, 100)])
def test_chunks_begin_at_multiples(start: int, stop: int, size: int) -> None:
    chunks = list(ranges(start, stop, size=size))
    assert [i for first, last in chunks for i in range(first, last)] == list(range(start, stop))
    assert all(first % size == 0 for first, _ in chunks[1:]) and all(last - first <= size for first, last in chunks)
