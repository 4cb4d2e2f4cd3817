"""The teacher over 1, 2 and 3 processes: equal ids and weights, resumable anywhere, and those of a plain teacher."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.spawn import run_on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import paper_config
from references import plain_inverse_weights

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.foundations.counter_rng import derive_key, gumbel, hash_ids, permute, stream
from titan_attent.job_config import TeacherConfig
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.window import LossWindow
from titan_attent.systems.teaching.teacher import Teacher

NUM_EXAMPLES, BATCH, NUM_STEPS, DATA_SEED = 101, 12, 48, 9
BLOCK = 17  # of a scoring: two or more in every pool, the last one padded
WARMUP_END, ANNEAL_START = 8, 42  # 101 // 12 batches; the last eighth of 48 steps

CASES = {
    "uniform": paper_config(strategy="uniform"),
    "random": paper_config(strategy="random", max_interval=3),
    "hard": paper_config(strategy="hard", interval_schedule="fixed", initial_interval=2, ratio_schedule="constant"),
    "soft": paper_config(),
    "soft without floor": paper_config(min_inclusion_probability=0, temperature=0.5, initial_ratio=0.2, max_interval=3),
    "soft, sigmoid": paper_config(min_inclusion_probability=0, normalization="sigmoid", final_ratio=1.0, seed=3),
    "threshold": paper_config(strategy="threshold", initial_interval=2),
    "learnability": paper_config(
        strategy="hard",
        importance="learnability",
        scoring="forward",
        ratio_schedule="adaptive",
        initial_ratio=0.2,
        max_repeats=100.0,
    ),
    "soft, scored once": paper_config(
        scoring="forward_once", weighting="none", warmup_passes=2, min_inclusion_probability=0
    ),
    "soft from the start": paper_config(min_inclusion_probability=0, warmup_passes=0, initial_ratio=0.15),
    "pools": paper_config(strategy="hard", scoring="forward", warmup_passes=0, pool_size=30, max_interval=1),
    "soft pools": paper_config(pool_size=47, min_inclusion_probability=0, full_data_tail=0.3),
    "pools, threshold": paper_config(strategy="threshold", pool_size=40, initial_interval=2, quarantine_after=1),
    "quarantine": paper_config(strategy="hard", quarantine_after=1, max_interval=1),
    "weights by loss": paper_config(strategy="random", weighting="loss", quarantine_after=0),
    "pools, dry run": paper_config(strategy="hard", pool_size=30, dry_run=True),
}
# In the warm-up, at its end; in a pass of a selection, at its end; where the anneal tail starts, in it.
# And in the second pass over one selection.
# And where pools have selections that the quarantine has not counted yet.
CUTS = {
    "soft": (3, 8, 10, 12, 42, 45),
    "hard": (14,),
    "soft pools": (9, 21, 40),
    "quarantine": (30,),
    "pools, threshold": (29,),
}
RESUMED = [(name, cut) for name, cuts in CUTS.items() for cut in cuts]
# By the number of ranks: 3 ranks are sharded differently from 2, by the same code. "soft" and "soft pools" run on 2 in
# microbatches and from checkpoints.
ON_THREE = ("random", "soft", "soft pools")
CASES_ON = {1: tuple(CASES), 2: tuple(name for name in CASES if name not in ON_THREE), 3: ON_THREE}
RESUMED_ON = {1: RESUMED, 2: RESUMED, 3: [("soft", 10), ("soft pools", 21)]}
# To the end but from these, which others of their case follow: into the pass, and the round, after the cut.
STOPS = {("soft", 3): 15, ("soft", 8): 20, ("soft", 10): 22, ("soft pools", 9): 21, ("soft pools", 21): 33}


def loss_of(ids: torch.Tensor, step: int) -> torch.Tensor:
    """A float32 loss that depends on (id, step) alone; now and then it is not finite, for two examples always."""
    losses = ((ids * 7919 + step * 104_729) % 10_007).float() / 2000
    return losses.masked_fill(((ids + step) % 37 == 0) | (ids == 50) | (ids == 77), float("nan"))


def score_of(ids: torch.Tensor, step: int) -> torch.Tensor:
    return loss_of(ids, step + 1000)


def train(teacher: Teacher, sampler: TeachingSampler, *, stop: int = NUM_STEPS) -> Iterator[dict]:
    """Steps with the losses of ``loss_of``: this rank's ids and weights, and the teacher's metrics after each."""
    stream = iter(sampler)
    for step in range(sampler.step + 1, stop + 1):
        ids, weights = zip(*itertools.islice(stream, sampler.microbatches), strict=True)
        for part in ids:
            teacher.buffer.record(part, loss_of(part, step), step=step)
        teacher.step_done()
        timed = ("second", "overhead", "break_even")
        metrics = {name: x for name, x in teacher.metrics().items() if not any(word in name for word in timed)}
        statistics = teacher.loss_statistics(step).numpy()
        yield {
            "ids": torch.cat(ids).numpy(),
            "weights": torch.cat(weights).numpy(),
            "statistics": statistics,
            "metrics": metrics,
            "digest": teacher.draws.digest,
            "draws": teacher.draws.num_draws,
        }


def build(mesh, config: TeacherConfig, *, microbatches: int = 1) -> tuple[Teacher, TeachingSampler]:
    window = LossWindow(flush_every=3, batch_size=BATCH, temperature=1.0) if config.weighting == "loss" else None
    buffer = LossBuffer(NUM_EXAMPLES, mesh=mesh, flush_every=3, window=window)
    sharding = buffer.sharding

    def score(step: int, pool: Pool) -> None:
        """Blocks of slots, rank after rank, padded at the end, as the trainer's forward pass."""
        for start in range(0, pool.size, BLOCK * sharding.size):
            places = start + BLOCK * sharding.rank + torch.arange(BLOCK)
            ids = pool.ids(places.clamp(max=pool.size - 1)).masked_fill(places >= pool.size, NUM_EXAMPLES)
            buffer.record(ids, score_of(ids, step), step=step, trained=False)

    teacher = Teacher(buffer, config, batch_size=BATCH, total_steps=NUM_STEPS, data_seed=DATA_SEED, score=score)
    return teacher, TeachingSampler(teacher, rank=sharding.rank, num_ranks=sharding.size, microbatches=microbatches)


def buffer_of(teacher: Teacher) -> dict[str, np.ndarray]:
    buffer = teacher.buffer
    buffer.sync()
    return {name: getattr(buffer, name).numpy() for name in ("loss", "step", "first_loss", "first_step", "visits")}


def world(mesh, folder: str) -> dict:
    """All runs of one number of ranks; three ranks also write the checkpoints that every number of ranks resumes."""
    results: dict = {"whole": {}, "resumed": {}}
    num_ranks = 1 if mesh is None else mesh.size()
    for name in CASES_ON[num_ranks]:
        teacher, sampler = build(mesh, CASES[name])
        results["whole"][name] = (list(train(teacher, sampler)), buffer_of(teacher))
    results["microbatches"] = list(train(*build(mesh, CASES["soft"], microbatches=2)))
    for name, cuts in CUTS.items() if num_ranks == 3 else ():
        teacher, sampler = build(mesh, CASES[name], microbatches=2)
        for step, _ in enumerate(train(teacher, sampler, stop=max(cuts)), start=1):
            if step in cuts:
                dcp.save({"teacher": teacher, "sampler": sampler}, checkpoint_id=f"{folder}/{name}/{step}")
    for name, cut in RESUMED_ON[num_ranks]:
        teacher, sampler = build(mesh, CASES[name])
        dcp.load({"teacher": teacher, "sampler": sampler}, checkpoint_id=f"{folder}/{name}/{cut}")
        loaded = {key: value for key, value in teacher.metrics().items() if key.startswith("teacher/")}
        steps = list(train(teacher, sampler, stop=STOPS.get((name, cut), NUM_STEPS)))
        results["resumed"][name, cut] = (loaded, steps, buffer_of(teacher))
    return results


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    folder = str(tmp_path_factory.mktemp("teacher"))
    return {num_ranks: run_on_ranks(world, num_ranks, folder, timeout=300) for num_ranks in (3, 2, 1)}


def joined(parts: list[list[dict]], name: str) -> np.ndarray:
    """[steps, BATCH] in global order: the ranks' blocks side by side."""
    return np.concatenate([np.stack([step[name] for step in part]) for part in parts], axis=1)


def assert_runs_equal(parts: list[list[dict]], expected: list[dict], where: str) -> None:
    np.testing.assert_array_equal(joined(parts, "ids"), joined([expected], "ids"), err_msg=where)
    assert joined(parts, "weights").tobytes() == joined([expected], "weights").tobytes(), where
    for part in parts:
        for step, (got, want) in enumerate(zip(part, expected, strict=True)):
            np.testing.assert_array_equal(got["statistics"], want["statistics"], err_msg=f"{where}, step {step}")
            assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-6), f"{where}, step {step}"


# -- a plain teacher ----------------------------------------------------------------------------------------------


def tail_of(config: TeacherConfig) -> float:
    """The share of the steps in the tail: an eighth by default, without scores on disk."""
    return 0.125 if config.full_data_tail < 0 else config.full_data_tail


class PlainTeacher:
    """One process, dictionaries, sorts: the whole run as the design describes it. No floor."""

    def __init__(self, config: TeacherConfig):
        self.config, self.step = config, 0
        self.size = config.pool_size or NUM_EXAMPLES
        self.orders, self.left = itertools.count(), torch.zeros(0, dtype=torch.int64)
        self.taken: np.ndarray = np.zeros(NUM_EXAMPLES, dtype=bool)
        self.streaks: dict[int, tuple[int, float]] = {}
        self.tail_start = NUM_STEPS - int(tail_of(config) * NUM_STEPS)
        self.first: dict[int, tuple[float, int]] = {}
        self.last: dict[int, tuple[float, int]] = {}
        self.visited: set[int] = set()

    def record(self, ids: torch.Tensor, losses: torch.Tensor) -> None:
        for i, loss in zip(ids.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                self.first.setdefault(i, (loss, self.step))
                self.last[i] = (loss, self.step)

    def run(self) -> Iterator[dict]:
        covered = 0.0
        for round, index, draw in self.passes():
            if draw:
                selected, weights = draw(round, index)
            if draw and not self.config.dry_run:
                size, pool_size = int(selected.sum()), self.size
                key = derive_key(stream("order"), DATA_SEED, round, index)
                order = self.pool[selected][permute(torch.arange(size), size, key)]
            else:  # everything, in the order of the span
                order = self.pool if draw else self.stretch(None)
                size = pool_size = len(order)
                weights = np.ones(NUM_EXAMPLES)
            for batch in order[: size // BATCH * BATCH].view(-1, BATCH):
                if self.step == NUM_STEPS or (self.step == self.tail_start and self.may_select and not self.in_tail):
                    break
                self.step += 1
                self.visited |= set(batch.tolist())
                self.record(batch, loss_of(batch, self.step))
                covered += BATCH * pool_size / size
                chosen = int(selected.sum()) if draw else size
                ratio = chosen / self.size if draw else 1.0
                metrics = {"teacher/round": round, "teacher/ratio": ratio, "teacher/selected": chosen}
                metrics |= {"ledger/examples_trained": BATCH * self.step, "ledger/examples_covered": covered}
                if draw and self.config.quarantine_after:
                    metrics["teacher/quarantined"] = len(self.set_aside())
                yield {"ids": batch.numpy(), "weights": weights[batch.numpy()], "metrics": metrics}

    def stretch(self, size: int | None) -> torch.Tensor:
        """The next ids of the shuffled orders, which are numbered from 0; all remaining ones for None."""
        if len(self.left) < (size or BATCH):
            key = derive_key(stream("order"), DATA_SEED, 0, next(self.orders))
            self.left = permute(torch.arange(NUM_EXAMPLES), NUM_EXAMPLES, key)
        taken, self.left = self.left.split([size or len(self.left), len(self.left) - (size or len(self.left))])
        return taken

    def set_aside(self) -> set[int]:
        after = self.config.quarantine_after
        return {i for i, (streak, _) in self.streaks.items() if after and streak >= after}

    @property
    def may_select(self) -> bool:
        return self.config.strategy != "uniform"

    def passes(self) -> Iterator[tuple]:
        """(round, index, how to draw) of every pass."""
        config, index = self.config, itertools.count()
        self.in_tail = False
        warmup_steps = config.warmup_passes * (NUM_EXAMPLES // BATCH)
        while self.step < NUM_STEPS and (not self.may_select or self.step < min(warmup_steps, self.tail_start)):
            yield 0, next(index), None
        for round in itertools.count(1):
            if self.step >= self.tail_start:
                break
            self.pool = self.stretch(self.size) if config.pool_size else torch.arange(NUM_EXAMPLES)
            if config.scoring == "forward" or (config.scoring == "forward_once" and round == 1):
                self.record(self.pool, score_of(self.pool, self.step))
            progress = (self.step - warmup_steps) / (NUM_STEPS - warmup_steps)
            self.ratio = config.initial_ratio
            if config.ratio_schedule == "incremental":
                self.ratio += (config.final_ratio - config.initial_ratio) * progress
            if config.ratio_schedule == "adaptive":
                known = np.array([score for score in self.scores() if np.isfinite(score)], dtype=np.float64)
                share = known.sum() ** 2 / (len(known) * (known**2).sum())
                self.ratio = min(config.final_ratio, max(config.initial_ratio, share**2))
            interval = config.initial_interval
            if config.interval_schedule == "incremental":
                interval += round_half_even((config.max_interval - config.initial_interval) * progress)
            for pass_index in range(1 if config.dry_run else interval):
                if self.step < self.tail_start:
                    yield round, pass_index, self.draw
        self.in_tail = True
        for pass_index in itertools.count():
            if self.step >= NUM_STEPS:
                return
            yield round, pass_index, None

    def draw(self, round: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 0 or self.config.strategy in ("soft", "threshold"):
            self.drawn = self.draw_anew(round, index)
        return self.drawn

    def scores(self) -> np.ndarray:
        """float32, +inf where never trained, -inf where no loss was ever finite."""
        scores = np.array([-np.inf if i in self.visited else np.inf for i in range(NUM_EXAMPLES)], dtype=np.float32)
        known = sorted(self.last)
        last, steps = np.array([self.last[i] for i in known]).reshape(-1, 2).T
        first, first_steps = np.array([self.first[i] for i in known]).reshape(-1, 2).T
        scores[known] = last
        twice = steps > first_steps
        if self.config.importance == "learnability" and twice.any():
            span = np.log(steps[twice]) - np.log(first_steps[twice])
            fall = (first - last)[twice].astype(np.float32) / span.astype(np.float32)
            median = np.sort(fall)[(len(fall) - 1) // 2]
            if median > 0:
                gate = np.ones(len(known), dtype=np.float32)
                gate[twice] = np.clip(fall / median, 0, 1)
                scores[known] *= gate
        return scores

    def draw_anew(self, round: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(chosen [pool], weights by id)."""
        scores = self.scores().astype(np.float64)[self.pool]
        excluded = np.isin(self.pool.numpy(), self.watch(scores))
        scores[excluded] = -np.inf
        chosen, weights = self.choose(scores, round, index)
        chosen, by_id = chosen & ~excluded, np.zeros(NUM_EXAMPLES)
        if chosen.sum() < BATCH:
            chosen[:], weights[:] = True, 1.0
        by_id[self.pool[chosen]] = weights[chosen] / weights[chosen].mean()
        self.taken[self.pool] = by_id[self.pool] > 0
        return chosen, by_id

    def watch(self, scores: np.ndarray) -> list[int]:
        """Count streaks of useless selections; returns the quarantined examples."""
        if self.config.quarantine_after and np.isfinite(scores).any():
            finite = np.sort(scores[np.isfinite(scores)])[::-1]
            lowest = finite[max(1, int(0.01 * len(finite))) - 1]
            for i, score in zip(self.pool.tolist(), scores.tolist(), strict=True):
                if not self.taken[i] or i in self.set_aside():
                    continue
                loss = self.last.get(i, (0.0, 0))[0]
                streak, start = self.streaks.get(i, (0, 0.0))
                goes_on = streak > 0 and loss > 0.95 * start
                high = np.isfinite(score) and score >= lowest
                self.streaks[i] = ((streak + 1, start) if goes_on else (1, loss)) if high else (0, start)
        return sorted(self.set_aside())

    def choose(self, scores: np.ndarray, round: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        config, ids, num = self.config, self.pool, self.size
        k = max(BATCH, int(round_half_even(self.ratio * num) / BATCH) * BATCH)
        seed = (config.seed, round, index)
        unseen_order = (hash_ids(ids, derive_key(stream("unseen"), *seed)).numpy().view(np.uint64) >> 20) % 2**23
        coins = (hash_ids(ids, derive_key(stream("noise"), *seed)).numpy().view(np.uint64) >> 32).astype(float)
        if config.strategy == "threshold":
            below = scores < scores[np.isfinite(scores)].mean()
            chosen = ~below | (coins >= 2**31)
            return chosen, np.where(below, 2.0, 1.0)
        unseen = scores == np.inf
        if config.strategy == "random":
            scores, unseen = coins, np.zeros(num, dtype=bool)
        if config.strategy == "soft":
            phi = (-np.logaddexp(0, -scores) if config.normalization == "sigmoid" else scores) / config.temperature
            phi[np.isinf(scores)] = scores[np.isinf(scores)]
            scores = (phi + gumbel(ids, derive_key(stream("noise"), *seed)).numpy()).astype(np.float32)
        # Unseen first in their random order, then by score; ties by a separate hash.
        tie = -((hash_ids(ids, derive_key(stream("ties"), *seed)).numpy() >> 32) + 0.0)
        order = [-float(unseen_order[i]) if unseen[i] else -scores[i] for i in range(num)]
        rank = sorted(range(num), key=lambda i: (not unseen[i], order[i], tie[i], i))
        chosen = np.isin(np.arange(num), rank[:k])
        weights = np.ones(num)
        if config.strategy == "soft" and config.weighting == "inverse_probability":
            kappa = float(scores[rank[k]]) if k < num else -np.inf
            if kappa < np.inf:  # else all that was drawn is unseen
                weights = plain_inverse_weights(phi, chosen, kappa, config.max_weight)
        return chosen, weights


def round_half_even(x: float) -> int:
    return int(np.rint(x))


PLAIN = [name for name, config in CASES.items() if config.strategy != "soft" or not config.min_inclusion_probability]


@pytest.mark.parametrize("name", PLAIN)
def test_the_run_is_that_of_a_plain_teacher(worlds, name):
    steps, _ = worlds[1][0]["whole"][name]
    expected = list(PlainTeacher(CASES[name]).run())
    np.testing.assert_array_equal(joined([steps], "ids"), joined([expected], "ids"))
    np.testing.assert_allclose(joined([steps], "weights"), joined([expected], "weights"), rtol=1e-5)
    for got, want in zip(steps, expected, strict=True):
        assert {key: got["metrics"][key] for key in want["metrics"]} == pytest.approx(want["metrics"])


# -- ranks, microbatches, checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, num_ranks", [(name, ranks) for ranks in (2, 3) for name in CASES_ON[ranks]])
def test_any_number_of_ranks_trains_the_same_examples_in_the_same_order(worlds, name, num_ranks):
    (expected, buffer), ranks = worlds[1][0]["whole"][name], worlds[num_ranks]
    assert_runs_equal([rank["whole"][name][0] for rank in ranks], expected, f"{name} on {num_ranks} ranks")
    digests = [step["digest"] for step in expected]
    assert all([step["digest"] for step in rank["whole"][name][0]] == digests for rank in ranks)
    assert len(set(digests) - {0}) == expected[-1]["draws"]  # 0 before the first
    for field, values in buffer.items():
        whole = np.concatenate([rank["whole"][name][1][field] for rank in ranks])
        np.testing.assert_array_equal(whole, values, err_msg=field)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_microbatches_change_nothing(worlds, num_ranks):
    expected, _ = worlds[1][0]["whole"]["soft"]
    assert_runs_equal([rank["microbatches"] for rank in worlds[num_ranks]], expected, f"on {num_ranks} ranks")


@pytest.mark.parametrize("name, cut, num_ranks", [(*at, ranks) for ranks, cuts in RESUMED_ON.items() for at in cuts])
def test_a_checkpoint_of_three_ranks_goes_on_as_if_uninterrupted(worlds, name, cut, num_ranks):
    (expected, buffer), ranks = worlds[1][0]["whole"][name], worlds[num_ranks]
    resumed = [rank["resumed"][name, cut] for rank in ranks]
    where = f"{name} from step {cut} on {num_ranks} ranks"
    for metrics, _, _ in resumed:
        before = expected[cut - 1]["metrics"]
        assert metrics == pytest.approx({key: before[key] for key in before if key.startswith("teacher/")}), where
    stop = STOPS.get((name, cut), NUM_STEPS)
    assert_runs_equal([steps for _, steps, _ in resumed], expected[cut:stop], where)
    for field, values in buffer.items() if stop == NUM_STEPS else ():
        np.testing.assert_array_equal(np.concatenate([state[field] for _, _, state in resumed]), values, err_msg=where)


def test_the_runs_reach_every_phase(worlds):
    for name, config in CASES.items():
        steps, _ = worlds[1][0]["whole"][name]
        is_weighted = config.strategy == "threshold" or (config.strategy == "soft" and config.weighting != "none")
        start = NUM_STEPS - int(tail_of(config) * NUM_STEPS)
        rounds = [step["metrics"]["teacher/round"] for step in steps]
        assert rounds == sorted(rounds)
        if config.strategy != "uniform":
            assert len(set(rounds[:start])) >= 4 and len(set(rounds[start:])) == 1, name
            assert rounds[start] == rounds[start - 1] + 1
        weighted = joined([steps], "weights").std(axis=1) > 0
        assert weighted[WARMUP_END:start].any() == is_weighted, name
        assert not weighted[start:].any()
        if name in ("quarantine", "pools, threshold"):
            assert steps[start - 1]["metrics"]["teacher/quarantined"] >= 2
        if name == "weights by loss":
            statistics = joined([steps], "statistics")
            assert (statistics[:8] == (0, np.inf, 1)).all() and (statistics[start:] == (0, np.inf, 1)).all()
            assert (statistics[WARMUP_END:start, 0] < statistics[WARMUP_END:start, 1]).all()


# -- rounds and passes --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["random", "hard", "soft"]),
    st.integers(1, 60),
    st.integers(1, 10),
    st.integers(1, 60),
    st.integers(0, 2),
    st.sampled_from([0, 0.125, 0.25, 0.5, 1]),
    st.floats(0.01, 1),
    st.tuples(st.integers(1, 3), st.integers(0, 2)),
)
def test_passes_tile_the_steps(strategy, num_examples, batch_size, total_steps, warmup_passes, tail, ratio, interval):
    batch_size = min(batch_size, num_examples)
    config = paper_config(
        strategy=strategy,
        warmup_passes=warmup_passes,
        full_data_tail=tail,
        initial_ratio=ratio,
        initial_interval=interval[0],
        max_interval=sum(interval),
    )
    teacher = Teacher(LossBuffer(num_examples), config, batch_size=batch_size, total_steps=total_steps)
    full, step, passes = num_examples // batch_size, 0, []
    tail_start = total_steps - int(tail * total_steps)
    while step < total_steps:
        one = teacher.next_pass(step=step)
        assert teacher.current_pass() is one and one.num_batches >= 1
        ids = one.ids(0, one.num_batches).tolist()
        assert len(set(ids)) == len(ids) == one.num_batches * batch_size
        left = tail_start - step if step < tail_start else full
        if step >= tail_start or step < warmup_passes * full:
            assert one.strategy == "uniform" and not one.weighted and len(one.selected) == num_examples
            assert one.num_batches == min(full, left)
            assert (one.round == 0) == (step < tail_start)
        else:
            assert one.strategy == strategy and one.round >= 1
            k = len(one.selected)
            assert k % batch_size == 0 and batch_size <= k <= num_examples
            assert one.num_batches == min(k // batch_size, left)
        passes.append((one.round, teacher.pass_index, teacher.rounds.interval))
        step += one.num_batches
    rounds = {round: [p for p in passes if p[0] == round] for round, _, _ in passes}
    assert list(rounds) == sorted(rounds)
    for round, members in rounds.items():
        assert [index for _, index, _ in members] == list(range(len(members)))
        if 0 < round < passes[-1][0] - 1:  # the last selected round may be cut short by the tail
            assert len(members) == members[0][2] and interval[0] <= len(members) <= sum(interval)


def test_uniform_is_full_passes_for_ever():
    teacher = Teacher(LossBuffer(25), paper_config(strategy="uniform"), batch_size=4, total_steps=40)
    passes = [teacher.next_pass(step=6 * index) for index in range(12)]
    assert [(p.round, p.num_batches, len(p.selected)) for p in passes] == [(0, 6, 25)] * 12
    assert len({tuple(p.ids(0, 6).tolist()) for p in passes}) == 12


def selections(config: TeacherConfig, *, losses: torch.Tensor, data_seed: int = 0) -> list[frozenset[int]]:
    """The ids of the first four selected passes when every example has one known loss."""
    size = len(losses)
    teacher = Teacher(LossBuffer(size), config, batch_size=8, total_steps=1000, data_seed=data_seed)
    teacher.buffer.record(torch.arange(size), losses, step=1)
    passes, step = [], teacher.plan.warmup_steps
    while len(passes) < 4:
        passes.append(teacher.next_pass(step=step))
        step += passes[-1].num_batches
    return [frozenset(p.ids(0, p.num_batches).tolist()) for p in passes]


RISING = torch.arange(80).float() / 10
HALF = {"ratio_schedule": "constant", "interval_schedule": "fixed", "initial_interval": 2, "max_interval": 2}


def test_random_ignores_losses_and_hard_takes_the_largest():
    random, hard = paper_config(strategy="random", **HALF), paper_config(strategy="hard", **HALF)
    assert selections(random, losses=RISING) == selections(random, losses=RISING.flip(0))
    assert selections(hard, losses=RISING) == [frozenset(range(40, 80))] * 4
    assert selections(hard, losses=RISING.flip(0)) == [frozenset(range(40))] * 4


def test_only_soft_draws_anew_within_a_round():
    for strategy, new_in_round in (("random", False), ("soft", True)):
        one, two, three, four = selections(paper_config(strategy=strategy, **HALF), losses=RISING)
        assert (one != two) == (three != four) == new_in_round
        assert one != three


def test_seeds():
    config = paper_config(**HALF)
    first = selections(config, losses=RISING)
    assert first == selections(config, losses=RISING, data_seed=1)  # the order changes, the choice does not
    assert first != selections(replace(config, seed=1), losses=RISING)


def test_weights_of_are_zero_for_what_was_left_out_and_one_on_average():
    teacher = Teacher(LossBuffer(80), paper_config(**HALF), batch_size=8, total_steps=1000)
    teacher.buffer.record(torch.arange(80), RISING, step=1)
    one = teacher.next_pass(step=teacher.plan.warmup_steps)
    weights = teacher.weights_of(torch.arange(80)).numpy()
    assert one.weighted and set(np.flatnonzero(weights)) == set(one.ids(0, 5).tolist())
    assert weights[weights > 0].mean() == pytest.approx(1) and weights.max() <= 4
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(teacher.weights_of(shuffled).numpy(), weights[shuffled])


def test_a_broken_example_does_not_spoil_the_weights_of_a_draw_of_everything():
    config = paper_config(initial_ratio=1.0, final_ratio=1.0)
    teacher = Teacher(LossBuffer(24), config, batch_size=12, total_steps=100)
    teacher.buffer.record(torch.arange(24), torch.arange(24).float().masked_fill(torch.arange(24) == 5, np.nan), step=1)
    teacher.next_pass(step=2)
    assert teacher.weights_of(torch.arange(24)).tolist() == [1.0] * 24


def test_the_threshold_leaves_out_some_below_the_mean_and_counts_the_others_twice():
    config = paper_config(strategy="threshold", **HALF)
    one, two, _, _ = selections(config, losses=RISING)
    assert one != two
    teacher = Teacher(LossBuffer(80), config, batch_size=8, total_steps=1000)
    teacher.buffer.record(torch.arange(80), RISING, step=1)
    teacher.next_pass(step=teacher.plan.warmup_steps)
    weights = teacher.weights_of(torch.arange(80)).numpy()
    assert (weights[40:] == weights[79]).all() and weights[79] > 0  # all above the mean are kept
    low = weights[:40][weights[:40] > 0]
    assert 8 <= len(low) <= 32 and low == pytest.approx(2 * weights[79])
    assert weights[weights > 0].mean() == pytest.approx(1)


def test_every_pass_trains_a_batch_when_the_threshold_leaves_less_than_one():
    for seed in range(20):
        config = paper_config(strategy="threshold", seed=seed)
        teacher = Teacher(LossBuffer(12), config, batch_size=12, total_steps=100)
        teacher.buffer.record(torch.arange(12), torch.arange(12).float(), step=1)
        assert teacher.next_pass(step=1).num_batches == 1


def test_a_batch_larger_than_the_data_is_refused():
    message = "has 7 examples, fewer than one global batch of 8: write more data, or lower training.global_batch_size"
    with pytest.raises(ValueError, match=message):
        Teacher(LossBuffer(7), paper_config(), batch_size=8, total_steps=10)
    with pytest.raises(ValueError, match="temperature"):
        Teacher(LossBuffer(7), paper_config(temperature=0), batch_size=4, total_steps=10)


def test_a_weighting_that_a_teacher_alone_does_not_apply_is_refused():
    config = paper_config(strategy="uniform", weighting="worst_case")
    with pytest.raises(ValueError, match="scale the gradient with WorstCase of titan_attent.losses.worst_case"):
        Teacher(LossBuffer(7), config, batch_size=4, total_steps=10)


# -- a planted corpus ---------------------------------------------------------------------------------------------

PLANTED, NUM_COPIED = 1024, 64
"""Rows 0 to 511 are copies of 64 rows, the others are unlike each other."""


def shares_of_copies(strategy: str) -> list[float]:
    """Share of copies in each selection when a row's loss falls with every visit to its content."""
    config = paper_config(strategy=strategy, ratio_schedule="constant", full_data_tail=0.0)
    teacher = Teacher(LossBuffer(PLANTED), config, batch_size=32, total_steps=300)
    content = torch.arange(PLANTED)
    content[:512] %= NUM_COPIED
    visits, base = torch.zeros(PLANTED), 5 + torch.rand(PLANTED, generator=torch.Generator().manual_seed(0))
    shares, sampler = [], TeachingSampler(teacher)
    for step, (ids, _) in enumerate(itertools.islice(iter(sampler), 300), start=1):
        teacher.buffer.record(ids, base[ids] * 0.9 ** visits[content[ids]], step=step)
        visits.index_add_(0, content[ids], torch.ones(32))
        teacher.step_done()
        one = teacher.current_pass()
        if one.strategy == strategy and sampler.consumed == one.num_batches:
            shares.append((one.ids(0, one.num_batches) < 512).float().mean().item())
    return shares


def test_hard_and_soft_pass_by_the_copies_and_random_takes_its_share():
    # A random half of the rows holds half copies, with a hypergeometric error.
    error = (0.25 / 512 * 512 / 1023) ** 0.5
    shares = {strategy: shares_of_copies(strategy) for strategy in ("random", "hard", "soft")}
    assert all(len(values) >= 10 for values in shares.values())
    assert all(abs(share - 0.5) < 4 * error for share in shares["random"])
    assert max(shares["soft"]) < 0.5 - 4 * error
    assert max(shares["hard"]) < max(shares["soft"])
