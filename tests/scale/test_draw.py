"""A whole draw on one of up to 10^8 ranks: its operations do not grow with the number of ranks."""

from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from paper import paper_config
from scale.synthetic_ranks import SyntheticMesh, SyntheticRanks

from titan_attent.data.plan.order import Pool
from titan_attent.job_config import TeacherConfig
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching import candidates
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.tokens import Tokens

LOCAL, STEP = 1000, 5000
SOURCES = [("web", 0), ("code", 10_000)]
POOL, POOL_EXAMPLES = 1 << 16, 1 << 18  # a power of 4: no walks in the permutation, which take syncs by chance
CASES: dict[str, TeacherConfig] = {
    "random": paper_config(strategy="random", quarantine_after=0),
    "hard": paper_config(strategy="hard", importance="learnability", quarantine_after=1),
    "soft": paper_config(),
    "soft, attainment": paper_config(importance="attainment", normalization="sigmoid", quarantine_after=0),
    "soft, excess loss": paper_config(importance="excess_loss"),
    "threshold": paper_config(strategy="threshold", ratio_schedule="adaptive"),
    "random pools": paper_config(strategy="random", pool_size=POOL, importance="attainment"),
    "soft pools": paper_config(pool_size=POOL),
    "threshold pools": paper_config(strategy="threshold", pool_size=POOL, quarantine_after=0),
}
DOCUMENTS = ("random", "hard", "soft", "threshold")
"""Cases that are drawn of documents, too: of examples that differ in length."""
COLLECTIVES = {"sum": 16, "max": 1, "gather": 3}
"""Maximum numbers, without the exchanges of a pool; one gather is the bitmask, two are newly quarantined examples. With
documents there is one more maximum, of the key after the last selected one. The ranks' keys are equal, so a budget of
tokens ends among equal keys and equal hashes, which takes 4 more sums and a gather.
"""
SYNCS, OPERATORS = 70, 450
BLOCKS = 2


def filled_buffer(num_examples: int, num_ranks: int) -> LossBuffer:
    """A buffer with a first and a last loss of every example, the same on each rank."""
    buffer = LossBuffer(num_examples, mesh=SyntheticMesh(num_ranks))
    generator = torch.Generator().manual_seed(0)
    buffer.first_loss.normal_(8.0, 0.5, generator=generator)
    buffer.loss.normal_(3.0, 0.7, generator=generator).clamp_(min=0.5)
    buffer.first_step.random_(1, 1000, generator=generator)
    buffer.step.random_(1000, STEP, generator=generator)
    buffer.visits.fill_(3)
    return buffer


def draws_of(config: TeacherConfig, *, num_examples: int, num_ranks: int, of_documents: bool = False) -> Draws:
    buffer = filled_buffer(num_examples, num_ranks)
    expert = buffer.loss * 0.9 + 0.5 if config.importance == "excess_loss" else None
    tokens = None
    if of_documents:
        local = torch.randint(1, 8193, (LOCAL,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
        tokens = Tokens(local, int(local.sum()) * num_ranks)
    sizes: dict[str, Any] = {"batch_size": num_ranks, "tokens": tokens}
    return Draws(buffer, config, expert=expert, chance_loss=8.0, sources=SOURCES, **sizes)


def second_draw(config: TeacherConfig, num_ranks: int, *, of_documents: bool = False) -> SyntheticRanks:
    """The counts of a second draw, and of the gather of its selection to all ranks."""
    num_examples = POOL_EXAMPLES if config.pool_size else LOCAL * num_ranks
    draws = draws_of(config, num_examples=num_examples, num_ranks=num_ranks, of_documents=of_documents)
    pool = Pool.whole(LOCAL * num_ranks)
    if config.pool_size:
        pool = Pool(POOL_EXAMPLES, order=(0, 0, 1), start=POOL, size=POOL)
    ratio = None if config.ratio_schedule == "adaptive" else 0.5
    # So small that a pool has several blocks.
    with mock.patch.object(candidates, "_BLOCK", POOL // BLOCKS):
        with SyntheticRanks():
            draws.draw(pool, step=STEP, seed=(0, 1, 0), ratio=ratio)
        with SyntheticRanks() as counted:
            draws.draw(pool, step=STEP + 10, seed=(0, 2, 0), ratio=ratio)
            draws.selected()
    return counted


@pytest.mark.parametrize(
    ("name", "of_documents"), [*((name, False) for name in CASES), *((name, True) for name in DOCUMENTS)]
)
def test_a_draw_does_as_much_on_4096_ranks_as_on_64(name: str, of_documents: bool) -> None:
    config = CASES[name]
    on_64, on_512, on_4096 = (
        second_draw(config, num_ranks, of_documents=of_documents) for num_ranks in (64, 512, 4096)
    )
    assert on_64.collectives == on_512.collectives == on_4096.collectives
    assert on_64.syncs == on_512.syncs == on_4096.syncs
    assert on_64.num_operators == on_512.num_operators == on_4096.num_operators
    assert on_4096.num_range_lookups == 0
    exchanges = BLOCKS if config.pool_size else 0
    assert on_4096.collectives["max"] <= COLLECTIVES["max"] + of_documents
    assert on_4096.collectives["sum"] <= COLLECTIVES["sum"] + exchanges + 4 * of_documents
    assert on_4096.collectives["gather"] <= COLLECTIVES["gather"] + exchanges + of_documents
    assert sum(on_4096.syncs.values()) <= SYNCS + 3 * exchanges + 40 * of_documents
    # The order of a pool is six rounds of a hash.
    assert on_4096.num_operators <= OPERATORS + 250 * exchanges + 150 * of_documents


@pytest.mark.parametrize("num_ranks", [64, 4096])
@pytest.mark.parametrize(
    ("name", "of_documents"),
    [*((name, False) for name in ("random", "soft", "threshold", "soft pools")), *((name, True) for name in DOCUMENTS)],
)
def test_a_rank_receives_the_bitmask_of_a_draw_and_little_more(name: str, of_documents: bool, num_ranks: int) -> None:
    config = CASES[name]
    counted = second_draw(config, num_ranks, of_documents=of_documents)
    size, values = (POOL, 12) if config.pool_size else (LOCAL * num_ranks, 0)
    # The histogram of the floor is sent twice; four bytes per value are sent to the owner of a slot and back, twice.
    # Of documents, equal hashes take 8 bytes per rank, and nothing more per example.
    ties = 8 * num_ranks + 20_000 if of_documents else 0
    assert counted.received <= size / 8 + num_ranks + 2 * (1 << 19) + 128_000 + 3 * 4 * values * size + ties


def exact_share(scores: torch.Tensor) -> tuple[Fraction, Fraction]:
    """Mean and effective sample size of fp32 scores, in rational numbers."""
    exact = [Fraction(score) for score in scores.tolist()]
    total, squares = sum(exact), sum(score * score for score in exact)
    return total / len(exact), total * total / (len(exact) * squares)


@pytest.mark.parametrize("num_examples", [10**10, 10**11])
def test_sums_are_exact_at_any_number_of_examples(num_examples: int) -> None:
    """Means and shares over 10^11 examples, with losses of the largest possible step, equal those of this rank."""
    num_ranks = num_examples // LOCAL
    config = paper_config(strategy="threshold", quarantine_after=0, ratio_schedule="adaptive", initial_ratio=0.01)
    draws = draws_of(config, num_examples=num_examples, num_ranks=num_ranks)
    draws.buffer.loss.copy_(torch.rand(LOCAL, generator=torch.Generator().manual_seed(1)) ** 4 * 9)
    with SyntheticRanks():
        ratio, _ = draws.draw(Pool.whole(num_examples), step=2_147_000_000, seed=(0, 1, 0), ratio=None)
    mean, share = exact_share(draws.buffer.loss)
    audit: dict[str, Any] = draws.audit
    assert audit["teacher/importance_mean"] == pytest.approx(float(mean), rel=1e-4)
    assert audit["teacher/effective_sample_size"] == pytest.approx(float(share), rel=1e-3) and share < 0.5
    assert ratio == pytest.approx(float(share) ** 2, rel=0.05)  # of the clipped scores
    assert audit["teacher/fallback"] == 0.0
    assert audit["teacher/loss_age"] == float(2_147_000_000 - Fraction(int(draws.buffer.step.sum()), LOCAL))
    chosen = np.flatnonzero(draws.weights.numpy())
    assert draws.num_selected == len(chosen) * num_ranks
    assert draws.weights[chosen].mean(dtype=torch.float64) == pytest.approx(1.0, abs=1e-6)
    assert audit["teacher/never_selected"] == pytest.approx(1 - len(chosen) / LOCAL)
