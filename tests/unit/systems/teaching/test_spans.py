"""The spans of windows, their means and the cut, against plain Python."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.scores.bigram import BigramModel
from titan_attent.systems.teaching.span_masks import shares_by_source
from titan_attent.systems.teaching.spans import BLOCK, SpanMasker, decide_cut, has_boundaries

EOS, VOCAB_SIZE = 10, 11


def windows(seed: int, num: int = 24, length: int = 40, eos_share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Inputs and labels; every other window is of uniform noise, and some labels are ignored."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.7, (num, length + 1)) % EOS
    tokens[::2] = rng.integers(0, EOS, (len(tokens[::2]), length + 1))
    tokens[rng.random(tokens.shape) < eos_share] = EOS
    labels = torch.from_numpy(tokens[:, 1:].copy())
    labels[torch.from_numpy(rng.random(labels.shape) < 0.05)] = IGNORE_INDEX
    return torch.from_numpy(tokens[:, :-1].copy()), labels


def model(inputs: Tensor, labels: Tensor) -> BigramModel:
    model = BigramModel(VOCAB_SIZE)
    model.add(inputs, labels)
    return model


def masker(eos_id: int | None = EOS, cut: float | None = None) -> SpanMasker:
    inputs, labels = windows(0, num=60)
    return SpanMasker(model(inputs, labels), model(inputs[1::2], labels[1::2]), eos_id=eos_id, cut=cut)


def nats(model: BigramModel, before: int, after: int) -> float:
    """The formula of scores/bigram.py."""
    alone = (int(model.labels[after]) + 0.5) / (int(model.labels.sum()) + VOCAB_SIZE / 2)
    pair = int(model.pairs[before * VOCAB_SIZE + after])
    return -math.log((pair + 100 * alone) / (int(model.inputs[before]) + 100))


def spans_of(inputs: list[int], eos_id: int | None) -> list[list[int]]:
    """The positions of each span of a window."""
    spans: list[list[int]] = [[]]
    for position, token in enumerate(inputs):
        begins = position % BLOCK == 0 if eos_id is None else token == eos_id
        if position and begins:
            spans.append([])
        spans[-1].append(position)
    return spans


def means_by_hand(masker: SpanMasker, inputs: Tensor, labels: Tensor) -> list[list[float]]:
    result = []
    for before, after in zip(inputs.tolist(), labels.tolist(), strict=True):
        means = [math.nan] * len(before)
        for span in spans_of(before, masker.eos_id):
            counted = [i for i in span if after[i] != IGNORE_INDEX]
            units = [
                round((nats(masker.amateur, before[i], after[i]) - nats(masker.expert, before[i], after[i])) * 2**20)
                for i in counted
            ]
            for i in counted:
                means[i] = float(Fraction(sum(units), len(units) * 2**20))
        result.append(means)
    return result


@pytest.mark.parametrize(("eos_id", "length"), [(EOS, 40), (None, 2 * BLOCK + 7), (None, BLOCK), (EOS, 1)])
def test_means_are_those_of_plain_python(eos_id: int | None, length: int) -> None:
    inputs, labels = windows(1, length=length)
    judge = masker(eos_id)
    means, expected = judge.means(inputs, labels), torch.tensor(means_by_hand(judge, inputs, labels))
    assert means.dtype == torch.float64
    assert torch.equal(means.isnan(), labels == IGNORE_INDEX)
    torch.testing.assert_close(means.float(), expected, rtol=0, atol=2e-6, equal_nan=True)


def test_a_span_begins_behind_each_eos() -> None:
    """Documents [3 4 eos] [5 eos] [6 7 ...]: the label that is the eos belongs to the document that it ends."""
    inputs = torch.tensor([[3, 4, EOS, 5, EOS, 6, 7]])
    labels = torch.tensor([[4, EOS, 5, EOS, 6, 7, 8]])
    means = masker().means(inputs, labels)[0].tolist()
    assert means[0] == means[1] and means[2] == means[3] and means[4] == means[5] == means[6]
    assert len(set(means)) == 3
    assert has_boundaries(inputs, eos_id=EOS)
    assert not has_boundaries(torch.tensor([[EOS, 3, 4]]), eos_id=EOS), "its first document begins with the window"


@pytest.mark.parametrize("eos_id", [EOS, None])
def test_a_window_is_marked_alike_in_every_batch(eos_id: int | None) -> None:
    inputs, labels = windows(2, num=50, length=200)
    judge = masker(eos_id, cut=0.0)
    marked = judge.mark(inputs, labels.clone())
    for size in (1, 3, 7):
        parts = [judge.mark(*each) for each in zip(inputs.split(size), labels.clone().split(size), strict=True)]
        assert torch.equal(torch.cat(parts), marked)
    masked = (marked != labels).double().mean()
    assert 0.1 < masked < 0.9


@pytest.mark.parametrize("cut", [-0.3, -0.05, 0.0, 0.02])
def test_labels_below_the_cut_are_masked(cut: float) -> None:
    inputs, labels = windows(3)
    judge = masker(cut=cut)
    marked, means = judge.mark(inputs, labels.clone()), judge.means(inputs, labels)
    differences = judge.differences(inputs, labels).tolist()
    for row, (each, label) in enumerate(zip(means.tolist(), labels.tolist(), strict=True)):
        expected = [IGNORE_INDEX if mean < cut else value for mean, value in zip(each, label, strict=True)]
        counted = [i for i, value in enumerate(label) if value != IGNORE_INDEX]
        if all(expected[i] == IGNORE_INDEX for i in counted):
            best = max(counted, key=lambda i: (differences[row][i], -i))
            expected[best] = label[best]
        assert marked[row].tolist() == expected


def test_a_window_never_loses_all_labels() -> None:
    inputs, labels = windows(4)
    labels[3] = IGNORE_INDEX  # no label to keep
    marked = masker(cut=100.0).mark(inputs, labels.clone())
    assert (marked != IGNORE_INDEX).sum(dim=1).tolist() == [int(row != 3) for row in range(len(labels))]
    assert ((marked == labels) | (marked == IGNORE_INDEX)).all()


def test_without_a_cut_labels_are_not_touched() -> None:
    inputs, labels = windows(5)
    assert masker().mark(inputs, labels) is labels


# -- the cut ----------------------------------------------------------------------------------------------------------


def cut_by_hand(data: list[float], trusted: list[float]) -> float | None:
    """The trusted value with the largest (share of the data below) - 2 x (share of the trusted text below)."""
    best, cut = 0.0, None
    for value in sorted(trusted):
        gain = sum(x < value for x in data) / len(data) - 2 * sum(x < value for x in trusted) / len(trusted)
        if gain > best + 1e-12:
            best, cut = gain, value
    return cut if best >= 0.1 else None


@pytest.mark.parametrize("bad", [0.0, 0.05, 0.3, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cut_is_that_of_the_calibrated_schedule(seed: int, bad: float) -> None:
    rng = np.random.default_rng(seed)
    good = rng.normal(0.4, 0.2, 600)
    good[: int(bad * 600)] = rng.normal(-1.5, 0.3, int(bad * 600))
    trusted = rng.normal(0.4, 0.2, 301)
    decision = decide_cut(torch.from_numpy(good), torch.from_numpy(trusted), min_kept=0.0)
    assert decision.cut == cut_by_hand(good.tolist(), trusted.tolist())
    assert (decision.cut is None) == (bad < 0.1) and not decision.is_foreign
    if decision.cut is not None:
        assert decision.requested == pytest.approx(1 - (good < decision.cut).mean()) == pytest.approx(1 - bad, abs=0.06)


@pytest.mark.parametrize("min_kept", [0.3, 0.5, 0.9, 1.0])
def test_no_fewer_labels_are_kept(min_kept: float) -> None:
    """Where trusted text asks for a fifth of the labels, the best of them are kept, as many as the bound says."""
    rng = np.random.default_rng(1)
    data = np.concatenate((rng.normal(-1.5, 0.3, 800), rng.normal(0.4, 0.2, 200)))
    decision = decide_cut(torch.from_numpy(data), torch.from_numpy(rng.normal(0.4, 0.2, 301)), min_kept=min_kept)
    assert decision.requested == pytest.approx(0.2, abs=0.02) and decision.cut is not None
    assert (data >= decision.cut).mean() == pytest.approx(min_kept, abs=0.002)


def test_equal_values_do_not_depend_on_their_order() -> None:
    data, trusted = torch.tensor([0.0] * 50 + [1.0] * 50).double(), torch.tensor([1.0] * 30 + [2.0] * 3).double()
    assert decide_cut(data, trusted).cut == 1.0
    assert decide_cut(data.flip(0), trusted.flip(0)).cut == 1.0


def test_trusted_text_of_another_kind_masks_nothing() -> None:
    rng = np.random.default_rng(0)
    data, trusted = torch.from_numpy(rng.normal(-1, 0.1, 1000)), torch.from_numpy(rng.normal(1, 0.1, 200))
    data[:20] = 3.0
    decision = decide_cut(data, trusted)
    assert decision.cut is None and decision.is_foreign and decision.requested == pytest.approx(0.02)


def test_many_trusted_labels_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_attent.systems.teaching import spans

    rng = np.random.default_rng(0)
    data, trusted = (torch.from_numpy(each) for each in (rng.normal(0, 1, 3000), rng.normal(1.5, 0.5, 2000)))
    exact = decide_cut(data, trusted, min_kept=0.0)
    monkeypatch.setattr(spans, "MAX_CUTS", 100)
    thinned = decide_cut(data, trusted, min_kept=0.0)
    assert exact.cut is not None and thinned.cut is not None
    assert thinned.cut in trusted and abs(thinned.requested - exact.requested) < 0.03


def test_shares_by_source_are_means_over_its_windows() -> None:
    sources = [("web", 0), ("code", 10), ("web", 20), ("books", 30)]
    ids = torch.tensor([0, 9, 10, 19, 25])
    masked = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.6]).double()
    assert shares_by_source(sources, ids, masked) == pytest.approx({"web": 0.3, "code": 0.75})
