"""Bigram scorers on 1, 2 and 3 ranks: their counts and losses, against one pass in numpy."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_on_ranks

from titan_attent.data.io.reader import Reader
from titan_attent.data.text.holdout import write_tokens
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.foundations.counter_rng import derive_key, permute, stream
from titan_attent.scores.bigram import SMOOTHING
from titan_attent.scores.stored import StoredScores
from titan_attent.titan.scoring.pair_bigram import BATCH_SIZE, Bigrams, num_counted

SEQ_LEN, SEED = 32, 3
NUM_DATA, NUM_OTHERS = 317, 211
"""Primes: neither the number of ranks nor the batch size divides them."""
COUNTS = ("pairs", "inputs", "labels")
RANKS = (1, 2, 3)


def make(mesh: Any, data: str, others: str, folder: str, num: int) -> list[np.ndarray]:
    """The counts of ``num`` examples of ``data``; the losses of all of ``others`` are written."""
    counted_data, scored = (TokenDataset(path, seq_len=SEQ_LEN) for path in (data, others))
    bigrams = Bigrams(counted_data, num=num, seed=SEED, mesh=mesh, reader=Reader(1))
    bigrams.count()
    counts = [getattr(bigrams.model, name).numpy().copy() for name in COUNTS]
    with mock.patch.object(dist, "broadcast_object_list") if mesh is None else nullcontext():
        bigrams.score(scored, Path(folder))
    bigrams.reader.close()
    return counts


def windows(dataset: TokenDataset) -> np.ndarray:
    """The tokens of every example, int64 [N, L + 1]."""
    tokens = dataset.shards.read(0, dataset.shards.num_tokens)
    return np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[::SEQ_LEN][: len(dataset)]


def counted(data: TokenDataset, num: int) -> list[np.ndarray]:
    """One pass over the first ``num`` of the shuffled order of all examples."""
    sample = permute(torch.arange(num), len(data), derive_key(stream("order"), SEED, 0, 0)).numpy()
    assert len({*sample.tolist()}) == num
    rows, size = windows(data)[sample], data.shards.index.tokenizer["vocab_size"]
    pairs, inputs, labels = np.zeros((size, size), np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
    np.add.at(pairs, (rows[:, :-1], rows[:, 1:]), 1)
    np.add.at(inputs, rows[:, :-1], 1)
    np.add.at(labels, rows[:, 1:], 1)
    return [pairs.ravel(), inputs, labels]


def losses_without(counts: list[np.ndarray], data: TokenDataset, num: int) -> np.ndarray:
    """Losses of the counted data, of each of its counted examples by the counts of the others, fp64 [N]."""
    losses = losses_by(counts, data)
    sample = permute(torch.arange(num), len(data), derive_key(stream("order"), SEED, 0, 0)).tolist()
    for number in sample:
        pairs, inputs, labels = (each.copy() for each in counts)
        row = windows(data)[number]
        np.subtract.at(pairs.reshape(len(inputs), -1), (row[:-1], row[1:]), 1)
        np.subtract.at(inputs, row[:-1], 1)
        np.subtract.at(labels, row[1:], 1)
        losses[number] = losses_by([pairs, inputs, labels], data)[number]
    return losses


def losses_by(counts: list[np.ndarray], data: TokenDataset) -> np.ndarray:
    """From the formula, fp64 [N]."""
    pairs, inputs, labels = counts
    before, after = windows(data)[:, :-1], windows(data)[:, 1:]
    alone = (labels + 0.5) / (labels.sum() + len(labels) / 2)
    seen = pairs.reshape(len(inputs), -1)[before, after]
    return -np.log((seen + SMOOTHING * alone[after]) / (inputs[before] + SMOOTHING)).mean(axis=1)


@pytest.fixture(scope="module")
def data(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Two synthetic data sets, in which a few tokens are frequent."""
    shards = TokenShards(token_data["train"])
    tokenizer = open_tokenizer(shards.tokenizer_info, shards.path)
    rng, folders = np.random.default_rng(0), [tmp_path_factory.mktemp("bigrams") for _ in range(2)]
    for folder, num in zip(folders, (NUM_DATA, NUM_OTHERS), strict=True):
        tokens = rng.zipf(1.3, num * SEQ_LEN + 1) % tokenizer.vocab_size
        write_tokens(folder, [tokens], tokenizer=tokenizer)
    return [TokenDataset(folder, seq_len=SEQ_LEN) for folder in folders]


@pytest.mark.parametrize("num", [2, 203, NUM_DATA])
def test_counts_and_losses_are_those_of_one_pass_on_any_number_of_ranks(
    data: list[TokenDataset], tmp_path: Path, num: int
) -> None:
    """With 2 examples, one of 3 ranks has none; 203 are more than one batch per rank, and the last is not full."""
    counted_data, others = data
    assert (len(counted_data), len(others)) == (NUM_DATA, NUM_OTHERS) and 3 * BATCH_SIZE < 203
    expected, files = counted(counted_data, num), []
    for ranks in RANKS:
        folder = tmp_path / str(ranks)
        paths = [str(path) for path in (counted_data.shards.path, others.shards.path, folder)]
        for counts in run_on_ranks(make, ranks, *paths, num):
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(counts, expected, strict=True))
        found = StoredScores(folder)
        found.verify_checksum()
        np.testing.assert_allclose(found.read(0, NUM_OTHERS).numpy(), losses_by(expected, others), rtol=1e-6)
        files.append([(folder / name).read_bytes() for name in ("losses.bin", "reference.json")])
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("num", [2, 203])
def test_an_example_is_left_out_of_its_own_loss_on_any_number_of_ranks(
    data: list[TokenDataset], tmp_path: Path, num: int
) -> None:
    own, files = data[0], []
    expected = losses_without(counted(own, num), own, num)
    for ranks in RANKS:
        folder = tmp_path / str(ranks)
        run_on_ranks(make, ranks, str(own.shards.path), str(own.shards.path), str(folder), num)
        np.testing.assert_allclose(StoredScores(folder).read(0, NUM_DATA).numpy(), expected, rtol=1e-6)
        files.append((folder / "losses.bin").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("num_trusted", "num_examples", "expected"),
    [(100, 900, 100), (900, 100, 100), (10**9, 10**9, 2**30 // 32), (1, 1, 1)],
)
def test_both_count_equally_many(num_trusted: int, num_examples: int, expected: int) -> None:
    assert num_counted(num_trusted=num_trusted, num_examples=num_examples, tokens_per_example=SEQ_LEN) == expected
