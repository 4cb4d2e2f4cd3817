"""Bigram scorers on one of 64, 512 and 4,096 ranks: counts of the rows, operators and collectives of that rank."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from scale.synthetic_ranks import SyntheticMesh, SyntheticRanks
from torch import Tensor

from titan_attent.data.examples import ScoredData
from titan_attent.data.io.reader import Reader
from titan_attent.scores.bigram import NUM_BUCKETS
from titan_attent.scores.stored import StoredScores
from titan_attent.titan.scoring import write_losses
from titan_attent.titan.scoring.pair_bigram import BATCH_SIZE, Bigrams

RANKS = (64, 512, 4096)
NUM_EXAMPLES, SEQ_LEN, VOCAB_SIZE = 10**10, 4, 128_256
COUNTED, BATCHES = 200, 3
"""Number of examples that a rank counts, and of batches that it scores."""


class SyntheticData:
    """Examples computed from their ids; ``batch_sizes`` has the number of rows of every read."""

    seq_len = SEQ_LEN

    def __init__(self, num_examples: int):
        self.num_examples, self.batch_sizes = num_examples, list[int]()
        self.shards = SimpleNamespace(
            index=SimpleNamespace(tokenizer={"vocab_size": VOCAB_SIZE}), fingerprint="f" * 64, path="synthetic"
        )
        self.stored, self.scored = self.shards, ScoredData("f" * 64, SEQ_LEN, num_examples)

    def __len__(self) -> int:
        return self.num_examples

    def read(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        assert int(ids.min()) >= 0 and int(ids.max()) < self.num_examples
        self.batch_sizes.append(len(ids))
        tokens = (ids[:, None] * 31 + torch.arange(SEQ_LEN + 1)) % VOCAB_SIZE
        return {"input": tokens[:, :-1]}, tokens[:, 1:]


class RankCosts:
    """The operations of rank 1 of ``num_ranks`` while it counts and scores."""

    def __init__(self, num_ranks: int, folder: Path):
        mesh: Any = SyntheticMesh(num_ranks)
        counted, scored = SyntheticData(NUM_EXAMPLES), SyntheticData(num_ranks * BATCH_SIZE * BATCHES - 5)
        data: Any = counted
        bigrams = Bigrams(data, num=num_ranks * COUNTED - 3, seed=7, mesh=mesh, reader=Reader(0))
        with SyntheticRanks() as self.counting:
            bigrams.count()
        self.num_counted = int(bigrams.model.labels.sum())
        with (
            SyntheticRanks() as self.scoring,
            mock.patch.object(dist, "broadcast_object_list") as self.broadcasts,
            mock.patch.object(write_losses, "CHUNK_BATCHES", 1),
        ):
            data = scored
            bigrams.score(data, folder)
        self.rows_counted, self.rows_scored = counted.batch_sizes, scored.batch_sizes
        self.num_scored = StoredScores(folder).num_examples


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, RankCosts]:
    folder = tmp_path_factory.mktemp("synthetic")
    return {num_ranks: RankCosts(num_ranks, folder / str(num_ranks)) for num_ranks in RANKS}


def test_a_rank_counts_and_scores_its_share_in_batches(costs: dict[int, RankCosts]) -> None:
    for num_ranks, seen in costs.items():
        assert sum(seen.rows_counted) == -(-(num_ranks * COUNTED - 3) // num_ranks) == COUNTED
        assert max(seen.rows_counted) == BATCH_SIZE and seen.num_counted == COUNTED * SEQ_LEN
        assert seen.rows_scored == [BATCH_SIZE] * BATCHES
        assert seen.num_scored == num_ranks * BATCH_SIZE * BATCHES - 5


def test_the_work_of_a_rank_is_the_same_on_4096_as_on_64(costs: dict[int, RankCosts]) -> None:
    for name in ("counting", "scoring"):
        first, *others = [getattr(seen, name) for seen in costs.values()]
        for other in others:
            assert (other.num_operators, other.syncs) == (first.num_operators, first.syncs)
            assert other.num_range_lookups == first.num_range_lookups <= 1, "a loop over the ranks"
        assert first.num_operators > 0


def test_counting_takes_three_sums_and_scoring_one_gather_per_chunk(costs: dict[int, RankCosts]) -> None:
    for num_ranks, seen in costs.items():
        assert seen.counting.collectives == Counter(sum=3)
        assert seen.scoring.collectives == Counter(gather=BATCHES) and seen.broadcasts.call_count == 1
        # A ring sends each count twice. A chunk has 4 bytes per example, and whether rank 0 could write.
        assert seen.counting.received <= 2 * 4 * (NUM_BUCKETS + 2 * VOCAB_SIZE)
        assert seen.scoring.received < BATCHES * 4 * num_ranks * (BATCH_SIZE + 1)
