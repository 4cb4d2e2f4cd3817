"""mixture.py: a source has its share of the tokens over any stretch of batches, on any number of ranks, after a resume
and with changed proportions; within a source, every example once before one comes again."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.plan.mixture import Mixture, Source
from titan_attent.data.plan.order import Pass, Pool, SelectedSlots
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.proportions import UNITS, Point, Proportions, rows_of_batch
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.data.plan.source import SourceExamples, SourceIds, digest_of, spans_by_name

NAMES = ("web", "code", "books", "forum")
SPANS = [("web", 0), ("code", 700), ("books", 900), ("web", 1000), ("forum", 1300)]
NUM, BATCH, SEQ_LEN, SEED = 1311, 12, 64, 7
SHARES = (0.5, 0.3, 0.15, 0.05)
LATER = (0.1, 0.2, 0.3, 0.4)
SOURCE_OF = np.array([NAMES.index([name for name, first in SPANS if first <= i][-1]) for i in range(NUM)])


def proportions(*points: tuple[int, tuple[float, ...]]) -> Proportions:
    return Proportions(NAMES, tuple(tuple(Point(step, p[i]) for step, p in points) for i in range(len(NAMES))))


CONSTANT = proportions((0, SHARES))
ANNEALED = proportions((600, SHARES), (1400, LATER))


def windows(given: Proportions, **more: Any) -> Mixture:
    spans = spans_by_name(SPANS, num_examples=NUM)
    sources = [Source(name, spans[name], SEQ_LEN * sum(b - a for a, b in spans[name])) for name in given.names]
    more = {"batch_size": BATCH, "seed": SEED} | more
    return Mixture(sources, given, num_examples=NUM, seq_len=SEQ_LEN, **more)


def sampler(mixture: Mixture, *, rank: int = 0, num_ranks: int = 1, microbatches: int = 1) -> TeachingSampler:
    plan = Shuffled(NUM, batch_size=mixture.batch_size, seed=SEED)
    return TeachingSampler(plan, rank=rank, num_ranks=num_ranks, microbatches=microbatches, mixture=mixture)


def batches(of: TeachingSampler, num: int) -> np.ndarray:
    """int64 [num, rows of this rank], or [num, rows, M]; as iterating the sampler, but many batches at a time."""
    parts: list[np.ndarray] = []
    while num:
        current, start = of.current_pass(), of.consumed
        stop = min(start + num, current.num_batches)
        ids = current.ids(start, stop, of.local_rows()).numpy()
        parts.append(ids.reshape(stop - start, -1, *ids.shape[1:]))
        for _ in range(stop - start):
            of.batch_consumed()
        num -= stop - start
    return np.concatenate(parts) if parts else np.zeros((0, BATCH), dtype=np.int64)


def test_many_batches_at_a_time_are_those_of_the_iterator() -> None:
    parts = [ids for ids, _ in islice(sampler(windows(ANNEALED), rank=1, num_ranks=2, microbatches=3), 90)]
    whole = batches(sampler(windows(ANNEALED), rank=1, num_ranks=2, microbatches=3), 30)
    assert np.array_equal(torch.stack(parts).view(30, -1).numpy(), whole)


def share_at(points: list[tuple[int, tuple[float, ...]]], step: int) -> np.ndarray:
    """The proportions at a step, by numpy's own interpolation."""
    steps = [s for s, _ in points]
    return np.array([np.interp(step, steps, [p[i] for _, p in points]) for i in range(len(NAMES))])


def distance(ids: np.ndarray, exact: np.ndarray, *, window: int) -> float:
    """The largest difference in rows of any source between what any ``window`` batches hold and its exact share."""
    counts = np.array([np.bincount(SOURCE_OF[batch], minlength=len(NAMES)) for batch in ids])
    lack = np.concatenate((np.zeros((1, len(NAMES))), np.cumsum(counts - ids.shape[1] * exact, axis=0)))
    return float(np.abs(lack[window:] - lack[:-window]).max())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_thousand_batches_are_exact_across_a_resume_and_a_changed_schedule(ranks: int) -> None:
    """Acceptance: within one batch; it is within two rows. Half way the run resumes on other ranks, with a schedule."""
    first = [sampler(windows(CONSTANT), rank=rank, num_ranks=ranks) for rank in range(ranks)]
    ids = np.concatenate([batches(one, 1100) for one in first], axis=1)
    states = [one.state_dict() for one in first]
    assert all(state == states[0] for state in states)
    others = {1: 3, 2: 1, 3: 2}[ranks]
    again = [sampler(windows(ANNEALED), rank=rank, num_ranks=others, microbatches=2) for rank in range(others)]
    for one in again:
        one.load_state_dict(states[0])
    ids = np.concatenate((ids, np.concatenate([batches(one, 1100) for one in again], axis=1)))
    exact = np.array([SHARES] * 1100 + [share_at([(600, SHARES), (1400, LATER)], s) for s in range(1101, 2201)])
    for window in (1, 10, 1000):
        assert distance(ids, exact, window=window) < 2
    assert ids.shape == (2200, BATCH) and set(np.unique(ids)) <= set(range(NUM))


def test_the_order_is_the_same_on_any_number_of_ranks_and_after_a_resume() -> None:
    whole = batches(sampler(windows(ANNEALED)), 520)
    for ranks, microbatches in ((2, 1), (3, 2)):
        parts = [sampler(windows(ANNEALED), rank=r, num_ranks=ranks, microbatches=microbatches) for r in range(ranks)]
        assert np.array_equal(np.concatenate([batches(part, 400) for part in parts], axis=1), whole[:400])
    for done in (0, 1, 255, 256, 257, 400):
        before, after = sampler(windows(ANNEALED)), sampler(windows(ANNEALED), num_ranks=2)
        assert np.array_equal(batches(before, done), whole[:done]) if done else True
        after.load_state_dict(before.state_dict())
        assert np.array_equal(batches(after, 100), whole[done : done + 100, : BATCH // 2])
        assert len(str(before.state_dict())) < 1500, "the state does not grow with the data"


def test_within_a_source_every_example_comes_once_before_one_comes_again() -> None:
    mixture = windows(CONSTANT)
    ids = batches(sampler(mixture), 300).flatten()
    for number, source in enumerate(mixture.sources):
        own, size = ids[SOURCE_OF[ids] == number], int((number == SOURCE_OF).sum())
        for end in (len(own) // 3, len(own)):  # rows are shuffled within a batch, so passes overlap within one
            counts = np.bincount(own[:end], minlength=NUM)[number == SOURCE_OF]
            assert counts.max() - counts.min() <= 1 + (end < len(own))
        metrics = mixture.metrics()
        assert metrics[f"mixture/epochs/{source.name}"] == pytest.approx(len(own) / size)
        assert metrics[f"mixture/left/{source.name}"] == pytest.approx(1 - ((len(own) - 1) % size + 1) / size)
        assert metrics[f"mixture/share/{source.name}"] == pytest.approx(SHARES[number], abs=2 / len(ids))
        assert metrics[f"mixture/proportion/{source.name}"] == pytest.approx(SHARES[number])


def test_the_sources_of_a_batch_are_spread_over_its_rows() -> None:
    sources = SOURCE_OF[batches(sampler(windows(CONSTANT)), 500)]
    per_row = np.array([np.bincount(column, minlength=4) / 500 for column in sources.T])
    assert np.abs(per_row - np.array(SHARES)).max() < 0.08


def test_a_source_without_a_proportion_is_not_trained_and_one_that_is_added_begins_anew() -> None:
    only = proportions((0, (1.0, 0.0, 0.0, 0.0)))
    one = sampler(windows(only))
    assert (SOURCE_OF[batches(one, 90)] == 0).all()
    state = one.state_dict()
    state["mixture"] = state["mixture"].replace('"books"', '"another"')
    again = sampler(windows(CONSTANT))
    again.load_state_dict(state)
    assert set(np.unique(SOURCE_OF[batches(again, 90)])) == {0, 1, 2, 3}


def test_a_run_without_a_mixture_resumes_with_one_and_back() -> None:
    plain = TeachingSampler(Shuffled(NUM, batch_size=BATCH, seed=SEED))
    batches(plain, 150)
    mixed = sampler(windows(CONSTANT))
    mixed.load_state_dict(plain.state_dict())
    assert np.bincount(SOURCE_OF[batches(mixed, 50).flatten()], minlength=4).tolist() == [300, 180, 90, 30]
    state = mixed.state_dict()
    assert state["step"] == 200
    plain.load_state_dict(state)
    assert batches(plain, 1).shape == (1, BATCH)


# -- what a teacher selects -------------------------------------------------------------------------------------------


def chosen_of(seed: int, *, share: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).random(NUM) < share


def selection(chosen: np.ndarray) -> SelectedSlots:
    return SelectedSlots(NUM, bitmask=np.packbits(chosen, bitorder="little"))


def selected_pass(chosen: np.ndarray, *, num_batches: int, index: int = 0) -> Pass:
    key = (SEED, 1, index)
    return Pass(Pool.whole(NUM), selection(chosen), order=key, batch_size=BATCH, num_batches=num_batches, round=1)


def train(mixture: Mixture, base: Pass, step: int) -> np.ndarray:
    found, done = [], 0
    while done < base.num_batches:
        stretch = mixture.stretch(base, step=step + done, consumed=done)
        found.append(stretch.ids(done, stretch.num_batches).view(-1, BATCH).numpy())
        assert np.array_equal(stretch.sources(done, stretch.num_batches), SOURCE_OF[found[-1].flatten()])
        for _ in range(stretch.num_batches - done):
            mixture.batch_served()
        done = stretch.num_batches
    return np.concatenate(found)


def test_the_proportions_hold_after_choosing_and_a_source_goes_on_where_it_was() -> None:
    """Two passes over one selection, then one over another: only then do its sources begin anew."""
    mixture, first, other = windows(CONSTANT), chosen_of(1), chosen_of(2)
    ids = np.concatenate([train(mixture, selected_pass(first, num_batches=40, index=i), 40 * i) for i in (0, 1)])
    ids = np.concatenate((ids, train(mixture, selected_pass(other, num_batches=40), 80)))
    assert first[ids[:80]].all() and other[ids[80:]].all()
    assert distance(ids, np.array([SHARES] * 120), window=30) < 2
    web = ids[:80][SOURCE_OF[ids[:80]] == 0]
    counts = np.bincount(web, minlength=NUM)[first & (SOURCE_OF == 0)]
    assert len(web) > len(counts) and (counts.min(), counts.max()) == (1, 2)
    for source in range(4):  # of the other selection, each example once before one comes again
        own = ids[80:][SOURCE_OF[ids[80:]] == source]
        counts = np.bincount(own, minlength=NUM)[other & (source == SOURCE_OF)]
        assert counts.max() - counts.min() <= 1


def test_what_is_left_out_of_a_source_lowers_its_share_where_the_proportions_are_of_the_candidates() -> None:
    chosen = chosen_of(3, share=0.9)
    chosen[(SOURCE_OF == 0) & (np.arange(NUM) % 4 > 0)] = False
    sizes = [int((i == SOURCE_OF).sum()) for i in range(4)]
    kept = [Fraction(int(chosen[i == SOURCE_OF].sum()), sizes[i]) for i in range(4)]
    left = np.array([float(Fraction(p) * share) for p, share in zip(SHARES, kept, strict=True)])
    mixture = windows(CONSTANT, of="candidates")
    ids = train(mixture, selected_pass(chosen, num_batches=300), 0)
    assert distance(ids, np.array([left / left.sum()] * 300), window=200) < 2
    chosen[SOURCE_OF == 2] = False
    ids = train(mixture, selected_pass(chosen, num_batches=30), 300)
    assert chosen[ids].all()
    with pytest.raises(ValueError, match="nothing to train"):
        train(windows(proportions((0, (0.0, 0.0, 1.0, 0.0))), of="candidates"), selected_pass(chosen, num_batches=3), 0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_the_ids_of_a_source_are_those_selected_in_its_spans(seed: int, share: float) -> None:
    chosen = chosen_of(seed, share=share)
    for name, spans in spans_by_name(SPANS, num_examples=NUM).items():
        own = np.flatnonzero(chosen & (NAMES.index(name) == SOURCE_OF))
        source = SourceIds(spans, selection(chosen))
        assert source.size == len(own)
        np.testing.assert_array_equal(source.ids(np.arange(len(own))), own)
        other = chosen.copy()
        flipped = seed % NUM
        other[flipped] = not other[flipped]
        same = digest_of(spans, selection(chosen)) == digest_of(spans, selection(other))
        assert same == (SOURCE_OF[flipped] != NAMES.index(name))


# -- documents --------------------------------------------------------------------------------------------------------


class Documents:
    """Lengths by a formula; those of "code" are short, and "forum" has a few only."""

    seq_len = SEQ_LEN

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.all = np.minimum(SEQ_LEN, 1 + rng.geometric(np.where(SOURCE_OF == 1, 0.3, 0.04))).astype(np.int64)

    def __len__(self) -> int:
        return NUM

    @property
    def num_pairs(self) -> int:
        return int(self.all.sum())

    @property
    def num_rows(self) -> int:
        return -(-self.num_pairs // SEQ_LEN)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        return self.all[ids]

    def length_sample(self, size: int) -> np.ndarray:
        return self.all[:size]


def documents(given: Proportions, packing: str = "best_fit") -> Mixture:
    examples, sources = Documents(), []
    for name, spans in spans_by_name(SPANS, num_examples=NUM).items():
        tokens = int(examples.all[NAMES.index(name) == SOURCE_OF].sum())
        own = SourceExamples(examples, spans, num_tokens=tokens)
        sources.append(Source(name, spans, tokens, Packer(own, batch_size=1, max_examples=16, packing=packing)))
    return Mixture(sources, given, num_examples=NUM, batch_size=BATCH, seq_len=SEQ_LEN, seed=SEED)


def test_documents_have_their_shares_in_tokens() -> None:
    """A row is packed from one source; windows of a source hold more or fewer tokens, and tokens are what counts."""
    mixture, examples = documents(CONSTANT), Documents()
    one = sampler(mixture)
    rows = batches(one, 200)
    exists = rows < NUM
    lengths = np.where(exists, examples.all[np.where(exists, rows, 0)], 0)
    assert lengths.sum(axis=2).max() <= SEQ_LEN and exists[:, :, 0].all()
    source = SOURCE_OF[rows[:, :, 0]]
    assert (np.where(exists, SOURCE_OF[np.where(exists, rows, 0)], source[:, :, None]) == source[:, :, None]).all()
    tokens = np.array(
        [np.bincount(s, weights=n, minlength=4) for s, n in zip(source, lengths.sum(axis=2), strict=True)]
    )
    lack = np.cumsum(tokens - tokens.sum(axis=1, keepdims=True) * np.array(SHARES), axis=0)
    # Tokens are counted by block, so within a block a few windows' worth may differ.
    assert np.abs(lack[50:] - lack[:-50]).max() < BATCH * SEQ_LEN
    totals = [progress.tokens for progress in mixture.progress]
    np.testing.assert_allclose(totals, tokens.sum(axis=0), rtol=0.01)
    np.testing.assert_allclose(np.array(totals) / sum(totals), SHARES, atol=2 / (200 * BATCH))
    forum = rows[source == 3]
    counts = Counter(forum[forum < NUM].tolist())
    assert (
        set(counts) == set(np.flatnonzero(SOURCE_OF == 3).tolist()) and max(counts.values()) - min(counts.values()) <= 1
    )


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_documents_are_the_same_on_any_number_of_ranks_and_after_a_resume(packing: str) -> None:
    whole = batches(sampler(documents(ANNEALED, packing)), 60)
    parts = [sampler(documents(ANNEALED, packing), rank=rank, num_ranks=3) for rank in range(3)]
    assert np.array_equal(np.concatenate([batches(part, 30) for part in parts], axis=1), whole[:30])
    before, after = sampler(documents(ANNEALED, packing)), sampler(documents(ANNEALED, packing), num_ranks=2)
    batches(before, 30)
    after.load_state_dict(before.state_dict())
    assert np.array_equal(batches(after, 30), whole[30:, : BATCH // 2])
    stretch = after.mixture.stretch(Shuffled(NUM, batch_size=BATCH, seed=0).next_pass(step=0), step=60, consumed=0)  # type: ignore[union-attr]
    skipped = stretch.skipped(0, 8)
    assert (skipped is None) == (packing == "best_fit") and (skipped is None or skipped.any())


def test_a_source_whose_documents_are_empty_may_come_first() -> None:
    """It has no example, and so no packer; the rows of the others are those of a mixture without it."""
    mixture = documents(CONSTANT)
    names, points = ("empty", *NAMES), ((Point(0, 0.0),), *CONSTANT.points)
    sources = [Source("empty", (), 0), *mixture.sources]
    size = {"num_examples": NUM, "batch_size": BATCH, "seq_len": SEQ_LEN}
    other = Mixture(sources, Proportions(names, points), seed=SEED, **size)
    assert np.array_equal(batches(sampler(other), 20), batches(sampler(mixture), 20))


# -- the rows of a batch ----------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[list[int]], list[int]]:
    """(rows of a batch, weights of some steps, tokens of a row) of up to 6 sources."""
    num = draw(st.integers(1, 6))
    size = draw(st.integers(num, 40))
    steps = draw(st.lists(st.lists(st.integers(0, 9), min_size=num, max_size=num).filter(any), min_size=1, max_size=60))
    return size, steps, draw(st.lists(st.integers(50, 64), min_size=num, max_size=num))


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_no_source_ever_lacks_or_exceeds_two_rows(given: tuple[int, list[list[int]], list[int]]) -> None:
    """Whatever the proportions of each step, as long as a batch has a row for each source."""
    size, steps, prices = given
    deficits = [0] * len(prices)
    for weights in steps:
        shares = [UNITS * weight // sum(weights) for weight in weights]
        shares[shares.index(max(shares))] += UNITS - sum(shares)
        rows = rows_of_batch(deficits, shares, prices, batch_size=size)
        assert sum(rows) == size and min(rows) >= 0
        tokens = [num * price for num, price in zip(rows, prices, strict=True)]
        deficits = [d + s * sum(tokens) - UNITS * t for d, s, t in zip(deficits, shares, tokens, strict=True)]
        assert sum(deficits) == 0
        assert max(abs(d) / (UNITS * p) for d, p in zip(deficits, prices, strict=True)) < 2
