"""The rows of the first selection: the same sample on any number of ranks, its text from the data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from paper import paper_config

from titan_attent.data.plan.order import Pool
from titan_attent.data.text.shards import TokenDataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.shown import NUM_SAMPLED, TAG, Sampled, markdown, sample, show_first_selection

NUM = 1000
SCORES = np.random.default_rng(0).normal(size=NUM).astype(np.float32)


def draws_of(mesh: Any, pool_size: int = 0) -> Draws:
    """Keeps half by the losses of an amateur."""
    buffer = LossBuffer(NUM, mesh=mesh)
    amateur = torch.from_numpy(SCORES)[buffer.sharding.start : buffer.sharding.stop]
    config = paper_config(strategy="hard", importance="loss", pool_size=pool_size)
    return Draws(buffer, config, batch_size=2, amateur=amateur)


def sampled(mesh: Any, pool_size: int) -> list[Sampled]:
    draws, seen = draws_of(mesh, pool_size), list[Sampled]()
    draws.watch = lambda candidates, scores, weights: seen.extend(sample(candidates, scores.values, weights))
    pool = Pool(NUM, order=(0, 0, 0), start=100, size=pool_size) if pool_size else Pool.whole(NUM)
    draws.draw(pool, step=0, seed=(0, 1, 0), ratio=0.5)
    return seen


@pytest.mark.parametrize("pool_size", [0, 300, 60])
def test_the_sample_is_that_of_one_rank(pool_size: int) -> None:
    (alone,) = run_on_ranks(sampled, 1, pool_size)
    assert len(alone) == min(NUM_SAMPLED, pool_size or NUM)
    pool = Pool(NUM, order=(0, 0, 0), start=100, size=pool_size) if pool_size else Pool.whole(NUM)
    ids = pool.ids(torch.arange(pool.size)).numpy()
    kept = set(ids[np.argsort(-SCORES[ids])[: pool.size // 2]].tolist())
    assert len({row.example_id for row in alone}) == len(alone) and {row.example_id for row in alone} <= set(ids)
    for row in alone:
        assert row.score == SCORES[row.example_id] and row.is_kept == (row.example_id in kept)
    assert [row.score for row in alone] == sorted((row.score for row in alone), reverse=True)
    assert run_on_ranks(sampled, 3, pool_size) == [alone] * 3


def test_the_text_of_the_first_draw_only(token_data: dict[str, Path]) -> None:
    dataset = TokenDataset(token_data["train"], seq_len=16)
    assert len(dataset) >= NUM
    texts: list[str] = []

    def log_text(tag: str, text: Callable[[], str]) -> None:
        assert tag == TAG
        texts.append(text())

    draws = draws_of(None)
    show_first_selection(draws, dataset, log_text)
    for seed in (1, 2):
        draws.draw(Pool.whole(NUM), step=0, seed=(0, seed, 0), ratio=0.5)
    resumed = draws_of(None)
    resumed.load_state_dict(draws.state_dict())
    show_first_selection(resumed, dataset, log_text)
    resumed.draw(Pool.whole(NUM), step=0, seed=(0, 3, 0), ratio=0.5)
    (text,) = texts
    (alone,) = run_on_ranks(sampled, 1, 0)
    assert text == markdown(alone, dataset, pool_size=NUM)
    best, worst = max(alone, key=lambda row: row.score), min(alone, key=lambda row: row.score)
    assert text.index(f"example {best.example_id} of default, score {best.score:.4g}") < text.index("**dropped, lowest")
    assert f"**dropped, lowest scores**: example {worst.example_id} of" in text
    assert text.count("**kept, highest scores**") == text.count("**dropped, lowest scores**") == 2
    # Everything that comes from the data is in blocks of code.
    assert all(line.startswith(("    ", "**", "Of 256")) for line in text.split("\n") if line)
