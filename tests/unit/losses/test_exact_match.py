"""Exact match against a loop over examples."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.exact_match import ExactMatch, most_likely

SOURCES = [("b", 0), ("a", 3), ("b", 5)]
N, V = 9, 4


def by_hand(batches: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> dict[str, float]:
    """The metrics, from the labels of each example in lists."""
    found: dict[int, list[bool]] = {}
    for logits, labels, ids, index in batches:
        for row, token in product(*map(range, labels.shape)):
            label = int(labels[row, token])
            if label == IGNORE_INDEX:
                continue
            slot = 0 if index is None else int(index[row, token])
            values = logits[row, token].tolist()
            right = values.index(max(values)) == label  # the first of equals
            found.setdefault(int(ids.view(len(labels), -1)[row, slot]), []).append(right)
    matches = {i: all(labels) for i, labels in found.items()}
    tokens = [one for labels in found.values() for one in labels]
    metrics = {"exact_match": sum(matches.values()) / len(matches), "token_accuracy": sum(tokens) / len(tokens)}
    for name in ("a", "b"):
        if own := [match for i, match in matches.items() if (3 <= i < 5) == (name == "a")]:
            metrics[f"exact_match/{name}"] = sum(own) / len(own)
    return metrics


def batch(generator: torch.Generator, *, packed: bool, ids: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows of few distinct logits, so that there are ties; labels are right more often than not; N is no example."""
    rows, length = 3, 6
    logits = torch.randint(0, 3, (rows, length, V), generator=generator).float()
    right = torch.rand(rows, length, generator=generator) < 0.8
    labels = torch.where(right, logits.argmax(-1), torch.randint(V, (rows, length), generator=generator))
    labels[torch.rand(rows, length, generator=generator) < 0.4] = IGNORE_INDEX
    if not packed:
        some = torch.tensor(ids[:rows])
        labels[some >= N] = IGNORE_INDEX
        return logits, labels, some, None
    some = torch.tensor(ids[: 2 * rows]).view(rows, 2)
    index = (torch.arange(length) >= 4).long().expand(rows, -1)
    labels[some.gather(1, index) >= N] = IGNORE_INDEX
    return logits, labels, some, index


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.booleans())
def test_counts_are_those_of_a_loop(seed: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N, generator=generator).tolist()
    size = 6 if packed else 3
    batches = [batch(generator, packed=packed, ids=(order[i : i + size] + [N] * size)) for i in range(0, N, size)]
    if all((labels == IGNORE_INDEX).all() for _, labels, *_ in batches):
        return
    metric = ExactMatch(SOURCES, cp_mesh=None, device=torch.device("cpu"))
    counts = sum(
        (metric.count(most_likely(logits), *one) for logits, *one in batches),
        torch.zeros(metric.num_counts, dtype=torch.float64),
    )
    num_labels = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, *_ in batches)
    assert metric.shares(counts.tolist(), num_labels=num_labels) == pytest.approx(by_hand(batches))


def test_one_source_has_no_metric_of_its_own_and_no_label_no_share() -> None:
    metric = ExactMatch([("default", 0)], cp_mesh=None, device=torch.device("cpu"))
    labels = torch.full((2, 3), IGNORE_INDEX)
    counts = metric.count(torch.zeros(2, 3, dtype=torch.int64), labels, torch.tensor([0, 1]), None)
    shares = metric.shares(counts.tolist(), num_labels=0)
    assert shares.keys() == {"exact_match", "token_accuracy"} and all(map(math.isnan, shares.values()))


def test_ties_go_to_the_smallest_id() -> None:
    assert most_likely(torch.tensor([[[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]])).tolist() == [[1, 0]]
