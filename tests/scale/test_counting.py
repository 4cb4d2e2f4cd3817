"""Bigram scorers as one of 64, 512 and 4,096 ranks sees them: what it counts, scores and exchanges, counted."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from scale.made_up import MadeUpMesh, MadeUpRanks
from torch import Tensor

from titan_attent.data.io.reader import Reader
from titan_attent.scores.bigram import NUM_BUCKETS
from titan_attent.scores.reference import ReferenceLosses
from titan_attent.titan.scoring import write_losses
from titan_attent.titan.scoring.pair_bigram import BATCH_SIZE, Bigrams

RANKS = (64, 512, 4096)
NUM_EXAMPLES, SEQ_LEN, VOCAB_SIZE = 10**10, 4, 128_256
COUNTED, BATCHES = 200, 3
"""Examples that a rank counts; batches that it scores."""


class MadeUpData:
    """Examples that come from their numbers; keeps how many were asked for at once."""

    seq_len = SEQ_LEN

    def __init__(self, num_examples: int):
        self.num_examples, self.asked = num_examples, list[int]()
        self.shards = SimpleNamespace(
            index=SimpleNamespace(tokenizer={"vocab_size": VOCAB_SIZE}), fingerprint="f" * 64, path="made/up"
        )

    def __len__(self) -> int:
        return self.num_examples

    def read(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        assert int(ids.min()) >= 0 and int(ids.max()) < self.num_examples
        self.asked.append(len(ids))
        tokens = (ids[:, None] * 31 + torch.arange(SEQ_LEN + 1)) % VOCAB_SIZE
        return {"input": tokens[:, :-1]}, tokens[:, 1:]


class Made:
    """What counting and scoring asked of rank 1 of ``num_ranks``."""

    def __init__(self, num_ranks: int, folder: Path):
        mesh: Any = MadeUpMesh(num_ranks)
        made_of, scored = MadeUpData(NUM_EXAMPLES), MadeUpData(num_ranks * BATCH_SIZE * BATCHES - 5)
        data: Any = made_of
        bigrams = Bigrams(data, num=num_ranks * COUNTED - 3, seed=7, mesh=mesh, reader=Reader(0))
        with MadeUpRanks() as self.counting:
            bigrams.count()
        self.num_counted = int(bigrams.model.labels.sum())
        with (
            MadeUpRanks() as self.scoring,
            mock.patch.object(dist, "broadcast_object_list") as self.broadcasts,
            mock.patch.object(write_losses, "CHUNK_BATCHES", 1),
        ):
            data = scored
            bigrams.score(data, folder)
        self.rows_counted, self.rows_scored = made_of.asked, scored.asked
        self.num_scored = ReferenceLosses(folder).num_examples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    folder = tmp_path_factory.mktemp("made-up")
    return {num_ranks: Made(num_ranks, folder / str(num_ranks)) for num_ranks in RANKS}


def test_a_rank_counts_and_scores_its_share_in_batches(made: dict[int, Made]) -> None:
    for num_ranks, seen in made.items():
        assert sum(seen.rows_counted) == -(-(num_ranks * COUNTED - 3) // num_ranks) == COUNTED
        assert max(seen.rows_counted) == BATCH_SIZE and seen.num_counted == COUNTED * SEQ_LEN
        assert seen.rows_scored == [BATCH_SIZE] * BATCHES
        assert seen.num_scored == num_ranks * BATCH_SIZE * BATCHES - 5


def test_the_work_of_a_rank_is_the_same_on_4096_as_on_64(made: dict[int, Made]) -> None:
    for name in ("counting", "scoring"):
        first, *others = [getattr(seen, name) for seen in made.values()]
        for other in others:
            assert (other.num_operators, other.syncs) == (first.num_operators, first.syncs)
            assert other.ranks_asked_for == first.ranks_asked_for <= 1, "a loop over the ranks"
        assert first.num_operators > 0


def test_a_model_is_three_sums_and_a_chunk_of_losses_one_gather(made: dict[int, Made]) -> None:
    for num_ranks, seen in made.items():
        assert seen.counting.collectives == Counter(sum=3)
        assert seen.scoring.collectives == Counter(gather=BATCHES) and seen.broadcasts.call_count == 1
        # A ring brings each count twice; a chunk brings 4 bytes per example, and whether rank 0 could write.
        assert seen.counting.received <= 2 * 4 * (NUM_BUCKETS + 2 * VOCAB_SIZE)
        assert seen.scoring.received < BATCHES * 4 * num_ranks * (BATCH_SIZE + 1)
