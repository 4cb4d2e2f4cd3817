"""loader.py: passes, scoring pools and validations take turns on the same threads, and read the expected examples."""

import threading
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch

from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.plan.order import Pass, Pool, SelectedSlots
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.shards import TokenDataset
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.loader import TeachingLoader

SEQ_LEN, ROWS, BATCHES, PASSES = 6, 4, 5, 4


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    dtype, entries = np.dtype("<u2"), []
    for number in range(7):
        with ShardWriter(tmp_path / f"shard-{number:05d}.bin", dtype=dtype) as shard:
            shard.append(np.random.default_rng(number).integers(0, 500, 101))
            entries.append(shard.finish())
    info = {"name": "none", "vocab_size": 500, "eos_id": 499}
    write_index(tmp_path, dtype=dtype, shards=entries, num_documents=1, max_token_id=499, tokenizer=info)
    return TokenDataset(tmp_path, seq_len=SEQ_LEN)


class Scoring:
    """Replaces the teacher: before every pass it reads a pool, as a scoring does."""

    batch_size = ROWS

    def __init__(self, num_examples: int):
        self.num_examples, self.round, self.pass_index = num_examples, 0, -1
        self.weights_every = 2
        self.current: Pass | None = None
        self.score: Any = None

    def pool(self) -> Pool:
        return Pool(self.num_examples, order=(1, 0, self.pass_index), size=19)

    def current_pass(self) -> Pass | None:
        return self.current

    def next_pass(self, *, step: int) -> Pass:
        self.pass_index += 1
        self.score(self.pool())
        everything, order = SelectedSlots(self.num_examples), (2, 0, self.pass_index)
        self.current = Pass(
            Pool.whole(self.num_examples), everything, order=order, batch_size=ROWS, num_batches=BATCHES
        )
        return self.current

    def batch_served(self) -> None:
        """Does nothing."""


def check(dataset: TokenDataset, batch: ReadBatch, ids: torch.Tensor) -> None:
    inputs, labels = batch
    assert torch.equal(inputs["example_id"], ids)
    for row, i in enumerate(ids.tolist()):
        tokens = torch.from_numpy(dataset.shards.read(i * SEQ_LEN, i * SEQ_LEN + SEQ_LEN + 1))
        assert torch.equal(inputs["input"][row], tokens[:-1]) and torch.equal(labels[row], tokens[1:])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_run_starts_its_threads_once_and_reads_the_same_with_any_number(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread) or start(thread))
    reader, teacher, pools_read = DataSets().reader(num_workers), Scoring(len(dataset)), []

    def fixed(pool: Pool) -> FixedLoader:
        return FixedLoader(dataset, pool, batch_size=ROWS, dp_rank=0, dp_world_size=1, reader=reader)

    def read_pool(pool: Pool) -> None:
        places = torch.arange(pool.size)
        for batch, expected in zip(fixed(pool), pool.ids(places).split(ROWS), strict=True):
            rows = len(expected)  # the last batch is filled up
            inputs, labels = batch
            whole = {name: tensor[:rows] for name, tensor in inputs.items()}
            check(dataset, (whole, labels[:rows]), expected)
        pools_read.append(pool)

    teacher.score = read_pool
    loader = TeachingLoader(
        dataset,
        datasets=DataSets(),
        geometry={},
        settings={},
        dp_rank=0,
        dp_world_size=1,
        microbatches=1,
        reader=reader,
        pin_memory=False,
    )
    teaching: Any = teacher
    loader.follow(TeachingSampler(teaching))
    batches = iter(loader)
    for step in range(PASSES * BATCHES):
        batch = next(batches)
        assert teacher.current is not None and teacher.pass_index == step // BATCHES
        check(dataset, batch, teacher.current.ids(step % BATCHES, step % BATCHES + 1))
        if step % 3 == 0:  # validations within a pass, one of them not finished
            read_pool(Pool.whole(21))
            next(iter(fixed(Pool.whole(21))))
    assert len(pools_read) == PASSES + -(-PASSES * BATCHES // 3)
    # Threads start when they are needed.
    assert min(num_workers, 1) <= len(started) <= num_workers
    batches.close()
    loader.close()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()
