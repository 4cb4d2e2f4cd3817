"""The bigram model against counting in dictionaries."""

import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.scores import bigram
from titan_attent.scores.bigram import SMOOTHING, BigramModel

VOCAB_SIZE = 11


def rows(seed: int, num: int = 40, length: int = 9) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.zipf(1.5, (num, length + 1)) % VOCAB_SIZE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def by_hand(counted: tuple[Tensor, Tensor], inputs: Tensor, labels: Tensor) -> list[float]:
    """The formula of the docstring, token by token; ignored labels count nowhere."""
    seen = [(h, w) for h, w in zip(*(t.flatten().tolist() for t in counted), strict=True) if w != IGNORE_INDEX]
    pairs, before, single = Counter(seen), Counter(h for h, _ in seen), Counter(w for _, w in seen)
    means = []
    for row in zip(inputs.tolist(), labels.tolist(), strict=True):
        nats = []
        for h, w in zip(*row, strict=True):
            if w != IGNORE_INDEX:
                alone = (single[w] + 0.5) / (len(seen) + VOCAB_SIZE / 2)
                nats.append(-math.log((pairs[h, w] + SMOOTHING * alone) / (before[h] + SMOOTHING)))
        means.append(sum(nats) / len(nats))
    return means


@pytest.mark.parametrize("ignored", [False, True])
def test_losses_are_those_of_the_formula(ignored: bool) -> None:
    counted, scored = rows(0), rows(1)
    if ignored:
        counted[1][3:20, 2:5], scored[1][0, 4:] = IGNORE_INDEX, IGNORE_INDEX
    model = BigramModel(VOCAB_SIZE)
    for start in (0, 7):  # in two calls
        stop = 7 if start == 0 else None
        model.add(counted[0][start:stop], counted[1][start:stop])
    losses = model.losses(*scored)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), by_hand(counted, *scored), rtol=1e-6)


@pytest.mark.parametrize("num_buckets", [2**24, 16])
def test_a_counted_row_is_left_out_of_its_own_loss(num_buckets: int) -> None:
    """As if the others alone were counted; hashed pairs too."""
    inputs, labels = rows(0)
    labels[3:20, 2:5], labels[7] = IGNORE_INDEX, IGNORE_INDEX
    with mock.patch.object(bigram, "NUM_BUCKETS", num_buckets):
        model = BigramModel(VOCAB_SIZE)
        model.add(inputs, labels)
        is_counted = torch.arange(len(inputs)) % 3 != 0
        losses = model.losses(inputs, labels, is_counted=is_counted)
        for row in range(len(inputs)):
            others = BigramModel(VOCAB_SIZE)
            keep = (torch.arange(len(inputs)) != row) | ~is_counted
            others.add(inputs[keep], labels[keep])
            expected = others.losses(inputs[row : row + 1], labels[row : row + 1])
            torch.testing.assert_close(losses[row : row + 1], expected, rtol=1e-6, atol=0, equal_nan=True)
        with_itself = model.losses(inputs, labels)
    assert torch.equal(losses[::3].nan_to_num(), with_itself[::3].nan_to_num())
    assert (losses > with_itself)[is_counted & (labels != IGNORE_INDEX).any(dim=1)].all()


def test_probabilities_of_all_labels_add_up_to_one() -> None:
    model = BigramModel(VOCAB_SIZE)
    model.add(*rows(0))
    labels = torch.arange(VOCAB_SIZE)[:, None]
    for token in range(VOCAB_SIZE):
        losses = model.losses(torch.full_like(labels, token), labels)
        assert losses.double().neg().exp().sum() == pytest.approx(1.0, abs=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    model = BigramModel(VOCAB_SIZE)
    model.add(*rows(0))
    inputs, labels = rows(1)
    one_by_one = torch.cat([model.losses(inputs[i : i + 1], labels[i : i + 1]) for i in range(len(inputs))])
    assert torch.equal(model.losses(inputs, labels), one_by_one)


def test_a_large_vocabulary_is_hashed_into_memory_that_does_not_grow() -> None:
    with mock.patch.object(bigram, "NUM_BUCKETS", 64):
        hashed = BigramModel(VOCAB_SIZE)
        assert len(hashed.pairs) == 64 and not hashed.is_exact
        hashed.add(*rows(0))
        losses = hashed.losses(*rows(1))
    exact = BigramModel(VOCAB_SIZE)
    exact.add(*rows(0))
    assert hashed.pairs.sum() == exact.pairs.sum() == rows(0)[0].numel()
    assert (hashed.pairs > 0).sum() < (
        exact.pairs > 0
    ).sum()  # some pairs share a bucket, and their probability is higher
    assert (losses <= exact.losses(*rows(1)) + 1e-6).all() and not torch.equal(losses, exact.losses(*rows(1)))
    assert np.corrcoef(losses, exact.losses(*rows(1)))[0, 1] > 0.8


def test_a_hash_has_the_same_buckets_everywhere() -> None:
    """128,256 ids: the buckets of pairs against the hash by hand, in Python's integers."""

    def mix(z: int) -> int:
        mask = (1 << 64) - 1
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    model = BigramModel(128_256)
    inputs, labels = torch.tensor([[0, 5, 128_255]]), torch.tensor([[7, 5, 128_255]])
    expected = [
        mix(mix(h * 128_256 + w) ^ mix(0x9E3779B97F4A7C15)) % 2**24 for h, w in ((0, 7), (5, 5), (128_255,) * 2)
    ]
    model.add(inputs, labels)
    assert model.pairs.nonzero().flatten().tolist() == sorted(set(expected))


@pytest.mark.parametrize("vocab_size", [2**33, 2**24 + 1, 0, -5])
def test_a_vocabulary_that_no_tokenizer_has_is_refused_before_anything_is_allocated(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"a vocabulary of {vocab_size} ids, .* at most 16777216: write the data"):
        BigramModel(vocab_size)
