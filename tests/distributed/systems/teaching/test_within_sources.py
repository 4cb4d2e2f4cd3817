"""A teacher under a mixture: it selects within each source, the proportions hold, on 1, 2 and 3 ranks and resumed."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.spawn import run_on_ranks
from paper import paper_config

from titan_attent.data.plan.mixture import Mixture, Source
from titan_attent.data.plan.proportions import Point, Proportions
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.plan.source import spans_by_name
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.teacher import Teacher

NUM, BATCH, STEPS, CUT = 120, 12, 44, 25
SOURCES = [("a", 0), ("b", 50), ("a", 70), ("c", 100)]
NAMES, SHARES = ("a", "b", "c"), (0.5, 0.25, 0.25)
SOURCE_OF = np.repeat([0, 1, 0, 2], [50, 20, 30, 20])
BASE = {"full_data_tail": 0.0, "quarantine_after": 0, "max_interval": 1, "final_ratio": 0.5}
CASES = {
    "random": paper_config(strategy="random", **BASE),
    "hard": paper_config(strategy="hard", **BASE),
    "soft": paper_config(strategy="soft", **BASE),
    "threshold": paper_config(strategy="threshold", **BASE),
    "quarantine": paper_config(strategy="hard", **BASE | {"quarantine_after": 1}),
    "adaptive": paper_config(strategy="soft", **BASE | {"ratio_schedule": "adaptive", "max_repeats": 100.0}),
    "calibrated": paper_config(
        **BASE | {"strategy": "hard", "importance": "cross_entropy_difference", "ratio_schedule": "calibrated"},
        warmup_passes=0,
        max_repeats=100.0,
    ),
}
# Of a source "good" or "bad" examples; only in b do many differ from trusted text.
GOOD = (np.arange(NUM) * 7 % 10 > np.where(SOURCE_OF == 1, 5, 1)).astype(np.float32)


def loss_of(ids: torch.Tensor, step: int) -> torch.Tensor:
    """Losses of c are far above all others: among all examples it would be selected whole."""
    base = ((ids * 7919 + step * 104_729) % 10_007).float() / 2000
    return base + torch.from_numpy(4.0 * (SOURCE_OF[ids.numpy()] == 2)).float()


def build(mesh: Any, name: str, *, within: bool = True) -> tuple[Teacher, TeachingSampler]:
    config, buffer = CASES[name], LossBuffer(NUM, mesh=mesh, flush_every=4)
    sharding, more = buffer.sharding, dict[str, Any]()
    if name == "calibrated":
        local = torch.from_numpy(GOOD[sharding.start : sharding.stop])
        noise = torch.arange(sharding.start, sharding.stop).float() / 1000
        more = {
            "expert": torch.zeros_like(local),
            "amateur": local * 2 + noise,
            "trusted": [2.0 + i / 400 for i in range(40)],
        }
    shares = dict(zip(NAMES, SHARES, strict=True)) if within else None
    teacher = Teacher(
        buffer, config, batch_size=BATCH, total_steps=STEPS, data_seed=3, sources=SOURCES, within=shares, **more
    )
    spans = spans_by_name(SOURCES, num_examples=NUM)
    sources = [Source(one, spans[one], int((i == SOURCE_OF).sum())) for i, one in enumerate(NAMES)]
    proportions = Proportions(NAMES, tuple((Point(0, share),) for share in SHARES))
    of = "trained" if within else "candidates"
    mixture = Mixture(sources, proportions, num_examples=NUM, batch_size=BATCH, seq_len=1, seed=3, of=of)
    return teacher, TeachingSampler(teacher, rank=sharding.rank, num_ranks=sharding.size, mixture=mixture)


def train(teacher: Teacher, sampler: TeachingSampler, *, stop: int) -> list[dict[str, Any]]:
    steps, stream = [], iter(sampler)
    for step in range(sampler.step + 1, stop + 1):
        ids, weights = next(stream)
        teacher.buffer.record(ids, loss_of(ids, step), step=step)
        teacher.step_done()
        steps.append({"ids": ids.numpy(), "weights": weights.numpy(), "digest": teacher.draws.digest})
    return steps


def chosen_in(draws: Draws) -> np.ndarray:
    return (draws.selected().contains(np.arange(NUM)) if draws.num_draws else np.ones(NUM, dtype=bool)).copy()


def world(mesh: Any, folder: str) -> dict[str, Any]:
    num_ranks, results = 1 if mesh is None else mesh.size(), dict[str, Any]()
    for name in CASES if num_ranks < 3 else ():
        teacher, sampler = build(mesh, name)
        steps = train(teacher, sampler, stop=STEPS)
        results[name] = (steps, chosen_in(teacher.draws), teacher.draws.audit)
    if num_ranks == 2:
        teacher, sampler = build(mesh, "soft")
        train(teacher, sampler, stop=CUT)
        dcp.save({"teacher": teacher, "sampler": sampler}, checkpoint_id=folder)
    else:
        teacher, sampler = build(mesh, "soft")
        dcp.load({"teacher": teacher, "sampler": sampler}, checkpoint_id=folder)
        results["resumed"] = train(teacher, sampler, stop=STEPS)
    return results


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("within") / "checkpoint")
    return {num_ranks: run_on_ranks(world, num_ranks, folder, timeout=300) for num_ranks in (2, 1, 3)}


def joined(parts: list[list[dict[str, Any]]], key: str) -> np.ndarray:
    return np.concatenate([np.stack([step[key] for step in part]) for part in parts], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_does(worlds: dict[int, Any], name: str) -> None:
    (one,), two = ([rank[name][0] for rank in worlds[size]] for size in (1, 2))
    assert np.array_equal(joined([one], "ids"), joined(two, "ids"))
    assert joined([one], "weights").tobytes() == joined(two, "weights").tobytes()
    assert [step["digest"] for step in one] == [step["digest"] for step in two[0]]


def test_a_run_of_two_ranks_resumes_on_one_and_on_three(worlds: dict[int, Any]) -> None:
    whole = joined([rank["soft"][0] for rank in worlds[2]], "ids")[CUT:]
    for size in (1, 3):
        assert np.array_equal(joined([rank["resumed"] for rank in worlds[size]], "ids"), whole)


@pytest.mark.parametrize("name", CASES)
def test_the_proportions_hold_after_choosing(worlds: dict[int, Any], name: str) -> None:
    ids = joined([worlds[1][0][name][0]], "ids")
    counts = np.array([np.bincount(SOURCE_OF[batch], minlength=3) for batch in ids])
    assert np.abs(np.cumsum(counts - BATCH * np.array(SHARES), axis=0)).max() < 2


def test_each_source_gives_its_share_by_the_schedule(worlds: dict[int, Any]) -> None:
    for name in ("random", "hard", "soft"):
        _, chosen, audit = worlds[1][0][name]
        ratios = [chosen[i == SOURCE_OF].mean() for i in range(3)]
        assert max(ratios) - min(ratios) < 0.05 and 0.3 < audit["teacher/ratio"] < 0.6
        assert audit["teacher/inclusion/c"] == pytest.approx(ratios[2])


def test_the_highest_losses_of_each_source_are_selected() -> None:
    """By a sort of each source's last losses, where all have one."""
    teacher, _ = build(None, "hard")
    ids = torch.arange(NUM)
    teacher.buffer.record(ids, losses := loss_of(ids, 5), step=5)
    teacher.draws.draw(teacher.rounds._pool(), step=5, seed=(0, 1, 0), ratio=0.4)
    expected = np.zeros(NUM, dtype=bool)
    for source in range(3):
        own = np.flatnonzero(source == SOURCE_OF)
        expected[own[np.argsort(-losses.numpy()[own])][: round(0.4 * len(own))]] = True
    assert np.array_equal(chosen_in(teacher.draws), expected)
    among_all, _ = build(None, "hard", within=False)
    among_all.buffer.record(ids, losses, step=5)
    among_all.draws.draw(among_all.rounds._pool(), step=5, seed=(0, 1, 0), ratio=0.4)
    assert chosen_in(among_all.draws)[SOURCE_OF == 2].mean() > 0.9


def test_the_scores_decide_the_ratio_of_each_source(worlds: dict[int, Any]) -> None:
    """Bad examples are left out of b, which has many, and of the others the few that they have, or none."""
    _, chosen, audit = worlds[1][0]["calibrated"]
    in_b = SOURCE_OF == 1
    assert not chosen[in_b & (GOOD == 0)].any() and chosen[in_b & (GOOD == 1)].all()
    assert audit["teacher/inclusion/b"] < 0.5 < 0.75 < audit["teacher/inclusion/a"]


def test_where_the_proportions_are_of_the_candidates_the_teacher_selects_among_all() -> None:
    teacher, sampler = build(None, "hard", within=False)
    ids = joined([train(teacher, sampler, stop=STEPS)], "ids")[NUM // BATCH + 1 :]
    shares = np.bincount(SOURCE_OF[ids.flatten()], minlength=3) / ids.size
    assert shares[2] > 1.3 * SHARES[2] and shares[0] < SHARES[0]
