"""audit.py against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.records import NEVER, Records
from titan_attent.systems.teaching.audit import SelectionAudit, Sources, audit_scores, audit_selection
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.statistics import Scores


def everything(size: int) -> Candidates:
    sharding = ExampleSharding(size)
    return Candidates(Pool.whole(size), owners=sharding, sharding=sharding, device=torch.device("cpu"))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 50, 1000]), st.floats(0, 1))
def test_the_audit_is_that_of_numpy(seed, size, share_infinite):
    generator = np.random.default_rng(seed)
    scores = generator.gamma(2.0, 1.5, size).astype(np.float32)
    infinite = generator.random(size) < share_infinite
    scores[infinite] = generator.choice([np.inf, -np.inf], infinite.sum())
    finite = scores[~infinite].astype(np.float64)
    squares = (finite**2).sum()
    sharding = ExampleSharding(size)
    assert audit_scores(Scores(torch.from_numpy(scores), sharding=sharding)) == pytest.approx(
        {
            "teacher/importance_mean": finite.mean() if len(finite) else 0.0,
            "teacher/importance_p99": np.sort(finite)[-max(1, len(finite) // 100)] if len(finite) else 0.0,
            "teacher/effective_sample_size": finite.sum() ** 2 / (len(finite) * squares) if squares > 0 else 1.0,
        },
        rel=1e-3,  # sums of scores are taken in 2^-15 of the largest
    )

    steps = np.where(infinite, NEVER, generator.integers(0, 99, size)).astype(np.int32)
    last_draw = generator.integers(-1, 4, size).astype(np.int32)
    weights = (generator.random(size) * (generator.random(size) < 0.5)).astype(np.float32)
    chosen, aged = weights > 0, 120 - steps[~infinite]
    records = Records(sharding, *(torch.from_numpy(x) for x in (scores, steps, scores, steps, steps)))
    choice = audit_selection(
        everything(size),
        weights=torch.from_numpy(weights),
        records=records,
        last_draw=torch.from_numpy(last_draw),
        draw=4,
        step=120,
    )
    assert choice.num_new == (chosen & (last_draw == NEVER)).sum()
    assert choice.scalars == pytest.approx(
        {
            "teacher/loss_age": aged.mean() if len(aged) else 0.0,
            "teacher/overlap": (chosen & (last_draw == 3)).sum() / max(1, chosen.sum()),
            "teacher/max_weight": weights.max(),
        }
    )


def test_the_first_draw_overlaps_with_none():
    records = Records(ExampleSharding(3), torch.zeros(3), *[torch.zeros(3, dtype=torch.int32)] * 4)
    never = torch.full((3,), NEVER, dtype=torch.int32)
    choice = audit_selection(everything(3), weights=torch.ones(3), records=records, last_draw=never, draw=0, step=1)
    assert choice.scalars["teacher/overlap"] == 0.0 and choice.num_new == 3


def test_importance_p99_takes_negative_scores_and_leaves_infinities_out():
    scores = torch.cat((torch.full((50,), float("inf")), -torch.arange(1.0, 301.0), torch.full((9,), float("-inf"))))
    result = audit_scores(Scores(scores, sharding=ExampleSharding(359)))
    assert result["teacher/importance_p99"] == -3.0
    assert result["teacher/importance_mean"] == pytest.approx(-150.5, rel=1e-4)


def choose(weights: torch.Tensor, *, sources: Sources = ()) -> SelectionAudit:
    never = torch.full((len(weights),), NEVER, dtype=torch.int32)
    records = Records(ExampleSharding(len(weights)), weights, *[never] * 4)
    kept = {"weights": weights, "records": records, "last_draw": never, "draw": 0, "step": 1}
    return audit_selection(everything(len(weights)), **kept, sources=sources)


def test_inclusion_by_source_merges_the_spans_of_a_source():
    sources = [("web", 0), ("code", 10), ("web", 14), ("books", 90)]  # no candidate is a book
    weights = torch.zeros(50)
    weights[[0, 9, 11, 14, 49]] = torch.tensor([2.0, 0.5, 1.0, 1.0, 0.1])
    audit = choose(weights, sources=sources).scalars
    assert {name: share for name, share in audit.items() if "inclusion" in name} == {
        "teacher/inclusion/web": 4 / 46,
        "teacher/inclusion/code": 1 / 4,
    }
    assert not any("inclusion" in name for name in choose(weights, sources=[("web", 0), ("web", 9)]).scalars)


def test_the_digest_differs_where_one_choice_or_one_bit_of_one_weight_does():
    generator = torch.Generator().manual_seed(0)
    for weights in (torch.ones(200), torch.rand(200, generator=generator)):
        weights[::3] = 0.0
        seen = [choose(weights).digest]
        assert choose(weights.clone()).digest == seen[0] and -(2**63) <= seen[0] < 2**63
        for slot in range(200):
            for bit in (0, 1, 22, 23, 30):
                other = weights.clone()
                other.view(torch.int32)[slot] ^= 1 << bit
                seen.append(choose(other.nan_to_num(posinf=3e38)).digest)
        exchanged = weights.clone()
        exchanged[[0, 1]] = weights[[1, 0]]  # one for another
        seen.append(choose(exchanged).digest)
        assert len(set(seen)) == len(seen)
