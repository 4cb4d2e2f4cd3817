"""Ratios that are shares of tokens, on 1 to 4 ranks, against a sort of all examples and a cumulative sum of tokens.

The ranks are threads of this process: they take turns at a barrier and add up what each brought.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from paper import paper_config
from references import plain_inverse_weights
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.foundations.counter_rng import derive_key, gumbel, hash_ids, stream
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.radix import KEY_OFFSET, ordered_keys
from titan_attent.systems.teaching.schedule import calibrated_ratio, calibrated_share
from titan_attent.systems.teaching.selection import lowest_log_probability, select_top_k
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import choose
from titan_attent.systems.teaching.teacher import Teacher
from titan_attent.systems.teaching.tokens import Tokens

RANKS = (1, 2, 3, 4)
CPU = torch.device("cpu")
SEED = (5, 1, 0)


@pytest.fixture(autouse=True)
def no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.12, the threads of one class take turns at a cached property, so they would never meet in it."""
    for name in ("summary", "metrics", "has_unseen"):
        monkeypatch.setattr(Scores.__dict__[name], "lock", nullcontext(), raising=False)


class Meeting:
    """Where threads exchange tensors: each brings one, and gets those of all."""

    def __init__(self, num_ranks: int):
        self.barrier, self.brought = threading.Barrier(num_ranks, timeout=30), [torch.zeros(0)] * num_ranks

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.brought[rank] = x.clone()
        self.barrier.wait()
        everything = list(self.brought)
        self.barrier.wait()
        return everything


class ThreadSharding(ExampleSharding):
    """The shard of one of several threads."""

    def __init__(self, num_examples: int, *, rank: int, num_ranks: int, meeting: Meeting):
        super().__init__(num_examples)
        self.size, self.rank, self.meeting = num_ranks, rank, meeting
        self.chunk = -(-num_examples // num_ranks)
        self.start, self.stop = self.range_of(rank)

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(dim=0))

    def max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).amax(dim=0))

    def gather(self, x: Tensor, *, async_op: bool = False) -> tuple[Tensor, None]:
        return torch.stack(self.meeting.exchange(self.rank, x)), None


def on_ranks(num_ranks: int, num_examples: int, work: Callable[[ExampleSharding], Any]) -> list[Any]:
    """``work`` of each rank, in their order."""
    meeting = Meeting(num_ranks)
    shards = [
        ThreadSharding(num_examples, rank=rank, num_ranks=num_ranks, meeting=meeting) for rank in range(num_ranks)
    ]
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(work, shards))


def shard_of(values: np.ndarray, sharding: ExampleSharding) -> Tensor:
    return torch.from_numpy(values)[sharding.start : sharding.stop].clone()


def tokens_of(lengths: np.ndarray, sharding: ExampleSharding) -> Tokens:
    return Tokens(shard_of(lengths.astype(np.int32), sharding), int(lengths.sum()))


def candidates_of(lengths: np.ndarray, sharding: ExampleSharding) -> Candidates:
    tokens = tokens_of(lengths, sharding)
    return Candidates(Pool.whole(len(lengths)), owners=sharding, sharding=sharding, device=CPU, tokens=tokens)


def lengths_of(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    return {
        "short and long": np.where(rng.random(size) < 0.9, rng.integers(1, 9, size), rng.integers(500, 8193, size)),
        "equal": np.full(size, 37),
        "largest": np.full(size, 2**17),
    }[kind]


def keys_of(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(size + 1)
    scores = {
        "different": rng.normal(0, 1, size),
        "few": rng.integers(0, 4, size),
        "equal": np.zeros(size),
        "mostly -inf": np.where(rng.random(size) < 0.8, -np.inf, rng.normal(0, 1, size)),
    }[kind]
    return ordered_keys(torch.from_numpy(scores.astype(np.float32))).numpy()


def plain_top(keys: Sequence[Any], lengths: np.ndarray, budget: int, ids: np.ndarray) -> tuple[np.ndarray, Any]:
    """Sort all examples; take each while the tokens before it are below the budget. Returns also the next key."""
    hashes = hash_ids(torch.from_numpy(ids), derive_key(stream("ties"), *SEED)).numpy() >> 32
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], -hashes[i], i))
    chosen, num_tokens = np.zeros(len(keys), dtype=bool), 0
    for i in order:
        if num_tokens >= budget:
            return chosen, keys[i]
        chosen[i] = True
        num_tokens += int(lengths[i])
    return chosen, None


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("keys_kind", ["different", "few", "equal", "mostly -inf"])
@pytest.mark.parametrize("lengths_kind", ["short and long", "equal", "largest"])
def test_a_budget_of_tokens_takes_the_best_that_reach_it(num_ranks: int, keys_kind: str, lengths_kind: str) -> None:
    for size in (1, 5, 200):
        lengths, keys = lengths_of(lengths_kind, size), keys_of(keys_kind, size)
        total = int(lengths.sum())
        for budget in sorted({1, total, max(1, total // 3), max(1, total - 1)}):

            def work(
                sharding: ExampleSharding, lengths: np.ndarray = lengths, keys: np.ndarray = keys, budget: int = budget
            ) -> tuple[np.ndarray, int]:
                chosen, threshold = select_top_k(
                    shard_of(keys, sharding),
                    k=budget,
                    sharding=sharding,
                    ids=lambda slots: (slots + sharding.start) * 3,
                    seed=SEED,
                    tokens=tokens_of(lengths, sharding),
                )
                return chosen.numpy(), threshold

            parts = on_ranks(num_ranks, size, work)
            expected, next_key = plain_top(keys.tolist(), lengths, budget, 3 * np.arange(size))
            np.testing.assert_array_equal(np.concatenate([chosen for chosen, _ in parts]), expected)
            assert {threshold for _, threshold in parts} == {-1 if next_key is None else next_key + KEY_OFFSET}
            assert lengths[expected].sum() >= budget and lengths[expected].sum() < budget + lengths.max()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_equal_hashes_go_by_id_until_the_budget_is_filled(num_ranks: int) -> None:
    lengths, keys = lengths_of("short and long", 60), np.zeros(60, dtype=np.int32)
    for num_hashes in (1, 4):
        for budget in (1, 17, int(lengths.sum()) // 2, int(lengths.sum()) - 1):

            def work(sharding: ExampleSharding, budget: int = budget, num_hashes: int = num_hashes) -> np.ndarray:
                return select_top_k(
                    shard_of(keys, sharding),
                    k=budget,
                    sharding=sharding,
                    ids=lambda slots: (slots + sharding.start) % num_hashes,
                    seed=SEED,
                    tokens=tokens_of(lengths, sharding),
                )[0].numpy()

            chosen = np.concatenate(on_ranks(num_ranks, 60, work))
            np.testing.assert_array_equal(chosen, plain_top(keys, lengths, budget, np.arange(60) % num_hashes)[0])


def scores_of(size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    scores = rng.gamma(2, 2, size).astype(np.float32)
    scores[rng.random(size) < 0.1] = np.inf
    scores[rng.random(size) < 0.1] = -np.inf
    return scores


def chosen_on(num_ranks: int, strategy: str, budget: int, *, excluded: np.ndarray | None = None, **more: Any) -> Tensor:
    lengths, scores = lengths_of("short and long", 400), scores_of(400)
    config = paper_config(strategy=strategy, **more)

    def work(sharding: ExampleSharding) -> Tensor:
        given = Scores(shard_of(scores, sharding), sharding=sharding, tokens=tokens_of(lengths, sharding))
        out = None if excluded is None else shard_of(excluded, sharding)
        return choose(
            given if out is None else given.without(out),
            k=budget,
            config=config,
            seed=SEED,
            candidates=candidates_of(lengths, sharding),
            excluded=out,
            at_least=1,
        )

    return torch.cat(on_ranks(num_ranks, 400, work))


STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("random", {}),
    ("hard", {}),
    ("soft", {"min_inclusion_probability": 0.0}),
    ("soft", {"min_inclusion_probability": 0.2}),
    ("threshold", {}),
]


@pytest.mark.parametrize(("strategy", "more"), STRATEGIES)
@pytest.mark.parametrize("is_excluding", [False, True])
def test_every_strategy_reaches_its_share_of_the_tokens_on_any_number_of_ranks(
    strategy: str, more: dict[str, Any], is_excluding: bool
) -> None:
    lengths = lengths_of("short and long", 400)
    excluded = np.random.default_rng(9).random(400) < 0.05 if is_excluding else None
    budget = int(0.3 * lengths.sum())
    alone = chosen_on(1, strategy, budget, excluded=excluded, **more)
    for num_ranks in RANKS[1:]:
        assert torch.equal(chosen_on(num_ranks, strategy, budget, excluded=excluded, **more), alone)
    weights = alone.double().numpy()
    num_tokens = lengths[weights > 0].sum()
    if strategy != "threshold" and not is_excluding:
        assert budget <= num_tokens < budget + lengths.max()
    assert excluded is None or not weights[excluded].any()
    # Weights average 1 over the tokens that are trained, as the loss does.
    assert (weights * lengths).sum() / num_tokens == pytest.approx(1.0, rel=1e-5)
    # And a share of the examples would be another selection.
    assert abs((weights > 0).mean() - num_tokens / lengths.sum()) > 0.02


@pytest.mark.parametrize("minimum", [0.0, 0.2])
def test_a_soft_draw_and_its_weights_are_those_of_a_sort(minimum: float) -> None:
    lengths, scores = lengths_of("short and long", 400), scores_of(400)
    budget = int(0.3 * lengths.sum())
    weights = chosen_on(3, "soft", budget, min_inclusion_probability=minimum, temperature=0.7).numpy()
    ids = torch.arange(400)
    finite = np.sort(scores[np.isfinite(scores)])
    low, high = finite[len(finite) // 100], finite[-1 - len(finite) // 100]
    clipped = np.where(np.isfinite(scores), np.clip(scores, low, high), scores)
    phi = clipped.astype(np.float64) / 0.7
    # The floor is that of as many examples of one token.
    by_token = torch.from_numpy(np.repeat(phi, lengths))
    floor = lowest_log_probability(
        lambda block: by_token[block],
        ends=(float(phi[np.isfinite(phi)].min()), float(phi[np.isfinite(phi)].max())),
        num_infinite=(int((by_token == np.inf).sum()), int((by_token == -np.inf).sum())),
        k=budget,
        minimum=minimum,
        sharding=ExampleSharding(len(by_token)),
        device=CPU,
    )
    assert (floor > phi[np.isfinite(phi)].min()) == (minimum > 0)
    phi = np.where(phi == -np.inf, phi, np.maximum(phi, floor))
    noise = gumbel(ids, derive_key(stream("noise"), *SEED)).numpy()
    unseen = (hash_ids(ids, derive_key(stream("unseen"), *SEED)).numpy().view(np.uint64) >> 20) % 2**23
    keys = [1e9 + float(unseen[i]) if phi[i] == np.inf else float(np.float32(phi[i] + noise[i])) for i in range(400)]
    chosen, kappa = plain_top(keys, lengths, budget, np.arange(400))
    np.testing.assert_array_equal(weights > 0, chosen)
    expected = plain_inverse_weights(phi, chosen, kappa, paper_config().max_weight)
    expected /= (expected * lengths)[chosen].sum() / lengths[chosen].sum()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["random", "hard", "soft"])
def test_examples_of_one_length_are_selected_as_without_tokens(strategy: str) -> None:
    scores, config = scores_of(400), paper_config(strategy=strategy)
    for k in (1, 40, 399, 400):
        selections = []
        for length in (None, 1, 64):
            sharding = ExampleSharding(400)
            tokens = None if length is None else tokens_of(np.full(400, length), sharding)
            candidates = Candidates(Pool.whole(400), owners=sharding, sharding=sharding, device=CPU, tokens=tokens)
            given = Scores(torch.from_numpy(scores), sharding=sharding, tokens=tokens)
            arguments: dict[str, Any] = {"config": config, "seed": SEED, "candidates": candidates, "at_least": 1}
            selections.append(choose(given, k=k * (length or 1), **arguments))
        assert torch.equal(selections[1], selections[0]) and torch.equal(selections[2], selections[0])


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("largest", [9, 2**17])
def test_means_and_effective_sample_sizes_are_those_of_tokens(num_ranks: int, largest: int) -> None:
    rng = np.random.default_rng(largest)
    scores, lengths = scores_of(500), rng.integers(1, largest + 1, 500)
    scores[np.isfinite(scores)] -= 2.0
    edges = torch.tensor([-1.0, 0.0, 0.0, 2.5])

    def work(sharding: ExampleSharding) -> tuple:
        given = Scores(shard_of(scores, sharding), sharding=sharding, tokens=tokens_of(lengths, sharding))
        return given.metrics, given.below(edges)

    results = on_ranks(num_ranks, 500, work)
    assert all(result == results[0] for result in results)
    metrics, below = results[0]
    finite = np.isfinite(scores)
    s, t = scores[finite].astype(np.float64), lengths[finite]
    low, high = np.sort(s)[len(s) // 100], np.sort(s)[-1 - len(s) // 100]
    assert metrics.mean == pytest.approx((s * t).sum() / t.sum(), rel=1e-3)

    def share(values: np.ndarray) -> float:
        return float((values * t).sum() ** 2 / (t.sum() * (values**2 * t).sum()))

    assert metrics.share == pytest.approx(share(s.clip(0)), rel=1e-3)
    assert metrics.clipped_share == pytest.approx(share(s.clip(max(0, low), high)), rel=1e-3)
    assert metrics.shifted_share == pytest.approx(share(s.clip(low, high) - low), rel=1e-3)
    assert (metrics.unseen, metrics.broken) == (lengths[scores == np.inf].sum(), lengths[scores == -np.inf].sum())
    assert below.examples == [int((scores < edge).sum()) for edge in edges.tolist()]
    assert below.tokens == [int(lengths[scores < edge].sum()) for edge in edges.tolist()]
    assert (below.num_examples, below.num_tokens) == (500, lengths.sum())


def test_a_calibrated_cut_compares_documents_and_keeps_a_share_of_their_tokens() -> None:
    rng = np.random.default_rng(0)
    trusted = np.sort(rng.normal(1, 0.3, 200)).astype(np.float32)
    scores = np.where(rng.random(3000) < 0.4, rng.normal(-1, 0.3, 3000), rng.normal(1, 0.3, 3000)).astype(np.float32)
    lengths = np.where(scores < 0, 1000, 10)  # two fifths of the documents have nearly all tokens
    sharding = ExampleSharding(3000)
    below = Scores(torch.from_numpy(scores), sharding=sharding, tokens=tokens_of(lengths, sharding)).below(
        torch.from_numpy(trusted)
    )
    assert calibrated_ratio(below.examples, num_examples=3000) == pytest.approx(0.6, abs=0.03)
    share = calibrated_share(below)
    by_documents = np.sort(scores)[-round(calibrated_ratio(below.examples, num_examples=3000) * 3000)]
    assert share == pytest.approx(lengths[scores >= by_documents].sum() / lengths.sum())
    assert share < 0.02


class Documents:
    """Documents of different lengths, the long ones of small loss."""

    seq_len = 64

    def __init__(self, num: int):
        rng = np.random.default_rng(num)
        self.all = np.where(rng.random(num) < 0.7, rng.integers(1, 9, num), rng.integers(40, 65, num))

    def __len__(self) -> int:
        return len(self.all)

    @property
    def num_pairs(self) -> int:
        return int(self.all.sum())

    @property
    def num_rows(self) -> int:
        return -(-self.num_pairs // self.seq_len)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        return self.all[ids]

    def length_sample(self, size: int) -> np.ndarray:
        return self.all[:size]


BATCH, STEPS = 8, 90


def teacher_of(documents: Documents, **keys: Any) -> tuple[Teacher, TeachingSampler]:
    buffer = LossBuffer(len(documents), flush_every=1)
    packer = Packer(documents, batch_size=BATCH)
    teacher = Teacher(buffer, paper_config(**keys), batch_size=BATCH, total_steps=STEPS, packer=packer)
    return teacher, TeachingSampler(teacher)


def train(teacher: Teacher, sampler: TeachingSampler, documents: Documents) -> list[tuple[int, list[int]]]:
    """(round, ids) of every step; the loss of an example is its length, or less."""
    steps, batches = [], iter(sampler)
    for step in range(1, STEPS + 1):
        ids = next(batches)[0].flatten()
        ids = ids[ids < len(documents)]
        teacher.buffer.record(ids, torch.from_numpy(100.0 / documents.all[ids.numpy()]).float(), step=step)
        teacher.step_done()
        steps.append((teacher.round, ids.tolist()))
    return steps


def test_a_run_selects_its_ratio_of_the_tokens() -> None:
    documents = Documents(1500)
    keys = {"ratio_schedule": "constant", "initial_ratio": 0.25, "interval_schedule": "fixed", "full_data_tail": 0.0}
    teacher, sampler = teacher_of(documents, strategy="hard", importance="loss", quarantine_after=0, **keys)
    train(teacher, sampler, documents)
    chosen = teacher.draws.weights.numpy() > 0
    num_tokens, metrics = documents.all[chosen].sum(), teacher.decision_metrics()
    batch = teacher.amounts.batch
    assert 0.25 * documents.num_pairs - batch <= num_tokens < 0.25 * documents.num_pairs + 64
    assert metrics["teacher/ratio"] == num_tokens / documents.num_pairs
    assert metrics["teacher/selected"] == chosen.sum() > 0.4 * len(documents), "the shortest are selected"
    assert teacher.draws.num_counted_selected == num_tokens


@pytest.mark.parametrize("max_repeats", [3.0, 6.0])
def test_max_repeats_bounds_the_tokens_trained_per_token_selected(max_repeats: float) -> None:
    documents = Documents(1500)
    keys = {"ratio_schedule": "adaptive", "initial_ratio": 0.01, "final_ratio": 1.0, "interval_schedule": "fixed"}
    keys |= {"max_repeats": max_repeats, "warmup_passes": 1, "full_data_tail": 0.0, "quarantine_after": 0}
    teacher, sampler = teacher_of(documents, strategy="hard", importance="loss", **keys)
    steps = train(teacher, sampler, documents)
    num_selecting = sum(round > 0 for round, _ in steps)
    num_trained = sum(documents.all[i] for _, ids in steps for i in ids)
    selected = teacher.draws.weights.numpy() > 0
    num_selected = documents.all[selected].sum()
    assert num_selected < 0.9 * documents.num_pairs and num_selecting > 30
    assert 0.8 * max_repeats <= num_trained / num_selected <= max_repeats
    # By examples the bound would be another one: the selected documents are short.
    assert selected.mean() > 1.2 * num_selected / documents.num_pairs


def test_pools_and_packing_are_refused() -> None:
    with pytest.raises(ValueError, match="pool_size = 300 with a packer"):
        teacher_of(Documents(1500), strategy="hard", pool_size=300)


def test_a_state_holds_the_selected_tokens_and_no_lengths() -> None:
    documents = Documents(1500)
    keys = {"strategy": "hard", "ratio_schedule": "constant", "initial_ratio": 0.25, "full_data_tail": 0.0}
    teacher, sampler = teacher_of(documents, **keys)
    train(teacher, sampler, documents)
    state = teacher.state_dict()
    assert set(state["draws"]["counts"]) == {"num_draws", "num_ever_chosen", "num_selected", "num_counted_selected"}
    other, _ = teacher_of(documents, **keys)
    other.load_state_dict(state)
    assert other.metrics()["teacher/repeats"] == teacher.metrics()["teacher/repeats"]
    assert other.draws.num_counted_selected == teacher.draws.num_counted_selected < documents.num_pairs
