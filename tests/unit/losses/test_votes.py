"""Votes over the rows of an input, against a count of answers in plain Python."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.votes import InputVotes, majority_is_right

L = 3


def batch(seed: int, *, m: int, groups: int) -> tuple[Tensor, Tensor]:
    """Few distinct answers, so that there are ties; labels that depend on the row, and rows without an answer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (groups * m, L), generator=generator)
    labels[:, 0] = IGNORE_INDEX
    predicted = torch.randint(2, (groups * m, L), generator=generator)
    as_asked = torch.rand(groups * m, generator=generator) < 0.4
    predicted[as_asked] = labels[as_asked].clamp(min=0)
    labels[-m:] = IGNORE_INDEX  # padding
    return predicted, labels


def by_hand(predicted: Tensor, labels: Tensor, *, m: int) -> list[tuple[float, bool]]:
    """(share of right rows, vote) of each input that exists."""
    found = []
    for first in range(0, len(labels) - m, m):
        answers = []
        for row in range(first, first + m):
            pairs = [(p, y) for p, y in zip(predicted[row].tolist(), labels[row].tolist(), strict=True) if y >= 0]
            answers.append((all(p == y for p, y in pairs), *(p for p, _ in pairs)))
        votes = Counter(answers)
        most_right, most_wrong = (
            max((num for (right, *_), num in votes.items() if right == wanted), default=0) for wanted in (True, False)
        )
        found.append((sum(right for right, *_ in answers) / m, most_right > most_wrong))
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 6))
def test_votes_are_those_of_a_count(seed: int, m: int, groups: int) -> None:
    predicted, labels = batch(seed, m=m, groups=groups)
    shares, votes = majority_is_right(predicted, labels, group_size=m)
    expected = by_hand(predicted, labels, m=m)
    assert list(zip(shares.tolist(), votes.tolist(), strict=True))[:-1] == expected


def test_a_tie_is_wrong_and_right_answers_that_differ_are_two() -> None:
    labels = torch.tensor([[0], [1], [0], [1]])
    shares, votes = majority_is_right(torch.tensor([[0], [1], [2], [3]]), labels, group_size=4)
    assert shares.tolist() == [0.5] and votes.tolist() == [False]  # one each
    _, votes = majority_is_right(torch.tensor([[0], [2], [0], [3]]), labels, group_size=4)
    assert votes.tolist() == [True]
    _, votes = majority_is_right(torch.tensor([[0], [1], [0], [1]]), labels, group_size=4)
    assert votes.tolist() == [True]
    _, votes = majority_is_right(torch.tensor([[0], [2], [2], [1]]), labels, group_size=4)
    assert votes.tolist() == [False]


def test_the_metrics_of_a_validation_in_two_batches_and_of_the_next_one() -> None:
    m, groups = 2, 21
    predicted, labels = batch(7, m=m, groups=groups)
    generator = torch.Generator().manual_seed(1)
    losses, counts = torch.rand(groups * m, generator=generator), (labels != IGNORE_INDEX).sum(dim=1).float()
    inputs = InputVotes(group_size=m, num_groups=groups, gather=None, add_up=None, device=torch.device("cpu"))
    expected = by_hand(predicted, labels, m=m)
    means = losses.view(-1, m).mean(dim=1)[:-1].double().numpy()
    for _ in range(2):
        for rows in torch.arange(groups * m).split(24):
            inputs.add(predicted[rows], labels[rows], losses[rows], counts[rows])
        assert inputs.take() == pytest.approx(
            {
                "exact_match_vote": sum(vote for _, vote in expected) / len(expected),
                "input_loss_p95": np.sort(means)[18:] @ [0.95, 0.05],  # of 20: at 0.95 x 19 = 18.05
                "input_loss_worst": means.max(),
                "input_match_p95": np.quantile([share for share, _ in expected], 0.05),
                "input_match_worst": min(share for share, _ in expected),
            },
            rel=1e-6,
        )


def test_without_inputs_there_is_no_number() -> None:
    inputs = InputVotes(group_size=2, num_groups=1, gather=None, add_up=None, device=torch.device("cpu"))
    assert all(map(math.isnan, inputs.take().values()))
