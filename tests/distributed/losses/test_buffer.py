"""LossBuffer over 1, 2 and 3 processes against a plain dictionary; its checkpoint loads at every number of ranks."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.spawn import run_on_ranks

from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.records import NEVER
from titan_attent.losses.window import LossWindow

FIELDS = ("loss", "step", "first_loss", "first_step", "visits", "gradient")
SIZES = (1, 2, 5, 7, 103)
SEEDS = (0, 1, 2)
NUM_STEPS = 40
BATCH = 12  # of all ranks


@dataclass
class PlainBuffer:
    """The content of the buffer in dictionaries, updated record by record."""

    loss: dict[int, float] = field(default_factory=dict)
    step: dict[int, int] = field(default_factory=dict)
    first_loss: dict[int, float] = field(default_factory=dict)
    first_step: dict[int, int] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)
    gradient: dict[int, float] = field(default_factory=dict)
    num_nonfinite: int = 0

    def record(self, id: int, loss: float, gradient: float, step: int, trained: bool) -> None:
        self.visits[id] = self.visits.get(id, 0) + trained
        if not (np.isfinite(loss) and np.isfinite(gradient)):
            self.num_nonfinite += 1
            return
        self.loss[id], self.step[id], self.gradient[id] = loss, step, gradient
        self.first_loss.setdefault(id, loss)
        self.first_step.setdefault(id, step)

    def arrays(self, size: int) -> dict[str, np.ndarray]:
        missing = {"loss": 0.0, "first_loss": 0.0, "step": NEVER, "first_step": NEVER, "visits": 0, "gradient": 0.0}
        return {
            name: np.array([getattr(self, name).get(i, missing[name]) for i in range(size)], dtype)
            for name, dtype in zip(
                FIELDS, [np.float32, np.int32, np.float32, np.int32, np.int32, np.float32], strict=True
            )
        }


@dataclass
class Plan:
    """Random batches: NaN and infinite losses, ids twice in one batch, ids that repeat or never occur.

    Some steps only score; padding has ids >= N; every third plan keeps gradients.
    """

    size: int
    seed: int

    def __post_init__(self):
        generator = np.random.default_rng((self.size, self.seed))
        self.flush_every = int(generator.integers(1, 9))
        self.microbatches = int(generator.choice([1, 2]))
        # Few different ids at a time, so that a batch has an id twice; steps with gaps, the last is the largest int32.
        self.ids = generator.integers(0, self.size, (NUM_STEPS, 1)) + generator.integers(0, 16, (NUM_STEPS, BATCH))
        self.ids %= self.size
        self.losses = generator.normal(2, 2, (NUM_STEPS, BATCH)).astype(np.float32)
        bad = generator.random((NUM_STEPS, BATCH)) < 0.15
        self.losses[bad] = generator.choice([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], bad.sum())
        self.ids[generator.random((NUM_STEPS, BATCH)) < 0.1] += self.size
        self.with_gradient = self.seed == 0
        self.gradients = generator.random((NUM_STEPS, BATCH)).astype(np.float32)
        if self.with_gradient:
            self.gradients[generator.random((NUM_STEPS, BATCH)) < 0.05] = np.nan
        self.trained = generator.random(NUM_STEPS) < 0.8
        self.steps = np.cumsum(generator.integers(1, 4, NUM_STEPS))
        self.steps[-1] = 2**31 - 1
        self.syncs = set(generator.choice(NUM_STEPS, 6, replace=False).tolist()) | {NUM_STEPS - 1}


PLANS = [Plan(size, seed) for size in SIZES for seed in SEEDS]


CUT = NUM_STEPS // 2
SAVED = [plan for plan in PLANS if plan.seed == 0]


def plain_states(plan: Plan) -> list[dict[str, np.ndarray]]:
    """The dictionaries after each sync point; records are applied in (step, global row) order."""
    plain, states = PlainBuffer(), []
    for index in range(NUM_STEPS):
        for id, loss, gradient in zip(plan.ids[index].tolist(), plan.losses[index], plan.gradients[index], strict=True):
            if id < plan.size:
                plain.record(id, loss, gradient, int(plan.steps[index]), bool(plan.trained[index]))
        if index in plan.syncs:
            states.append(plain.arrays(plan.size) | {"num_nonfinite": plain.num_nonfinite})
    return states


def feed(buffer: LossBuffer, plan: Plan, start: int, stop: int) -> list[dict[str, np.ndarray]]:
    """Record this rank's contiguous rows of every global batch; return the buffer's content after each sync point."""
    rank, num_ranks, states = buffer.sharding.rank, buffer.sharding.size, []
    for index in range(start, stop):
        for microbatch in range(plan.microbatches):
            rows = np.split(np.split(np.arange(BATCH), num_ranks)[rank], plan.microbatches)[microbatch]
            losses = torch.tensor(plan.losses[index, rows])
            buffer.record(
                torch.tensor(plan.ids[index, rows]),
                losses,
                step=int(plan.steps[index]),
                gradients=torch.tensor(plan.gradients[index, rows]) if plan.with_gradient else None,
                trained=bool(plan.trained[index]),
            )
            losses.fill_(-1)  # the training loop may reuse its memory
        buffer.step_done()
        if index in plan.syncs:
            buffer.sync()
            fields = FIELDS if plan.with_gradient else FIELDS[:-1]
            states.append({name: getattr(buffer, name).numpy().copy() for name in fields})
            states[-1]["num_nonfinite"] = buffer.num_nonfinite
    return states


def build(plan: Plan, mesh, *, flush_every: int | None = None) -> LossBuffer:
    flush_every = flush_every or plan.flush_every
    return LossBuffer(plan.size, mesh=mesh, flush_every=flush_every, with_gradient=plan.with_gradient)


def replay(mesh) -> list[list[dict]]:
    return [feed(build(plan, mesh), plan, 0, NUM_STEPS) for plan in PLANS]


def save(mesh, folder: str) -> None:
    for number, plan in enumerate(SAVED):
        buffer = build(plan, mesh, flush_every=100)  # half of it is still pending at the save
        feed(buffer, plan, 0, CUT)
        dcp.save({"buffer": buffer}, checkpoint_id=f"{folder}/{number}")


def load_and_continue(mesh, folder: str) -> list[list[dict]]:
    results = []
    for number, plan in enumerate(SAVED):
        buffer = build(plan, mesh)
        dcp.load({"buffer": buffer}, checkpoint_id=f"{folder}/{number}")
        results.append(feed(buffer, plan, CUT, NUM_STEPS))
    return results


def save_or_replay(mesh, folder: str) -> tuple[list, list]:
    """Both tests of a world, so that its processes start once."""
    if mesh is not None and mesh.size() == 3:
        save(mesh, folder)
    return replay(mesh), load_and_continue(mesh, folder)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    folder = str(tmp_path_factory.mktemp("loss_buffer"))
    return {num_ranks: run_on_ranks(save_or_replay, num_ranks, folder) for num_ranks in (3, 2, 1)}


def assert_whole_equals(parts: list[dict], expected: dict, where: str) -> None:
    for name in parts[0].keys() - {"num_nonfinite"}:
        whole = np.concatenate([part[name] for part in parts])
        assert whole.dtype == expected[name].dtype
        # A loss without a step has no meaning; everything else is compared everywhere.
        defined = (
            expected["step"] != NEVER if name in ("loss", "first_loss", "gradient") else np.full(whole.shape, True)
        )
        np.testing.assert_array_equal(whole[defined], expected[name][defined], err_msg=f"{name}, {where}")
    assert [part["num_nonfinite"] for part in parts] == [expected["num_nonfinite"]] * len(parts), where


def test_the_plans_hold_the_hard_cases():
    assert any(len(set(row)) < BATCH for plan in PLANS if plan.size == 103 for row in plan.ids.tolist())
    finals = {plan.size: plain_states(plan)[-1] for plan in PLANS}
    assert (finals[103]["step"] == NEVER).any() and (finals[103]["first_step"] < finals[103]["step"]).any()
    assert {plan.microbatches for plan in PLANS} == {1, 2} and len({plan.flush_every for plan in PLANS}) > 3
    assert {np.isnan, np.isposinf, np.isneginf} == {
        test for plan in PLANS for test in (np.isnan, np.isposinf, np.isneginf) if test(plan.losses).any()
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_buffer_is_the_plain_dictionary_at_every_sync(worlds, num_ranks):
    for number, plan in enumerate(PLANS):
        parts = [replayed[number] for replayed, _ in worlds[num_ranks]]
        for sync, expected in enumerate(plain_states(plan)):
            assert_whole_equals([part[sync] for part in parts], expected, f"{plan}, sync {sync}")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_checkpoint_of_three_ranks_resumes_on_any_number(worlds, num_ranks):
    for number, plan in enumerate(SAVED):
        parts = [resumed[number] for _, resumed in worlds[num_ranks]]
        later = [state for sync, state in zip(sorted(plan.syncs), plain_states(plan), strict=True) if sync >= CUT]
        assert {len(part) for part in parts} == {len(later)} and later
        for sync, expected in enumerate(later):
            assert_whole_equals([part[sync] for part in parts], expected, f"{plan}, later sync {sync}")


def test_exchanges_happen_only_at_multiples_of_flush_every(monkeypatch):
    buffer, exchanged = LossBuffer(50, flush_every=4), []
    gather = buffer.sharding.gather
    monkeypatch.setattr(buffer.sharding, "gather", lambda x, **more: exchanged.append(x.shape[1]) or gather(x, **more))

    def train(first: int, last: int) -> list[int]:
        for step in range(first, last + 1):
            for _ in range(2):  # microbatches
                buffer.record(torch.arange(3), torch.ones(3), step=step)
            buffer.step_done()
        return exchanged

    assert train(1, 10) == [24, 24]
    buffer.sync()
    buffer.sync()
    assert exchanged == [24, 24, 12]
    assert train(11, 12) == [24, 24, 12, 12]  # a checkpoint does not shift later exchanges
    assert train(13, 16) == [24, 24, 12, 12, 24]
    buffer.sync()
    assert buffer.visits.tolist() == [32] * 3 + [0] * 47


def test_an_exchange_holds_training_losses_or_scores_but_not_both():
    window = LossWindow(flush_every=4, batch_size=3, temperature=1.0)
    buffer = LossBuffer(50, flush_every=4, window=window)
    for step in range(1, 9):
        buffer.record(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]) * step, step=step)
        buffer.step_done()
        if step == 2:
            buffer.record(torch.arange(9), torch.full((9,), 100.0), step=step, trained=False)
            buffer.sync()
            assert buffer.loss[:9].tolist() == [100.0] * 9
    buffer.sync()
    assert buffer.visits.tolist() == [8] * 3 + [0] * 47
    low, high, _ = window.statistics(9).tolist()
    assert (low, high) == (1.0, 12.0)  # steps 1 to 4 of training


def test_a_slot_without_an_example_is_no_loss_of_the_window():
    window = LossWindow(flush_every=1, batch_size=4, temperature=1.0)
    buffer = LossBuffer(50, flush_every=1, window=window)
    for step in range(1, 3):
        buffer.record(torch.tensor([7, 50, 9, 50]), torch.tensor([2.0, 0.0, 5.0, 0.0]), step=step)
        buffer.sync()
    low, high, mean = window.statistics(3).tolist()
    assert (low, high) == (2.0, 5.0) and mean == pytest.approx((1 + np.e) / 2)
    assert buffer.visits.sum() == 4 and buffer.num_nonfinite == 0


def test_losses_are_detached_and_kept_as_fp32():
    buffer = LossBuffer(4)
    buffer.record(torch.tensor([2]), torch.tensor([1.5], requires_grad=True) * 3, step=7)
    buffer.record(torch.tensor([0], dtype=torch.int32), torch.tensor([2.25], dtype=torch.bfloat16), step=7)
    buffer.sync()
    assert buffer.loss.tolist()[0::2] == [2.25, 4.5] and not buffer.loss.requires_grad


def test_the_state_is_a_copy_free_view_of_all_examples():
    buffer = LossBuffer(3)
    buffer.record(torch.tensor([1]), torch.tensor([2.0]), step=4)
    state = buffer.state_dict()
    assert set(state) == {*FIELDS[:-1], "num_nonfinite"}
    assert state["visits"].tolist() == [0, 1, 0] and state["step"].tolist() == [NEVER, 4, NEVER]
    assert all(state[name].data_ptr() == getattr(buffer, name).data_ptr() for name in FIELDS[:-1])


def test_a_state_is_complete_before_another_stream_may_copy_it(monkeypatch):
    # torchtitan's async_with_pinned_mem copies on a stream of its own, in a thread, as soon as it has the state.
    events = []

    def stream_of(device):
        return SimpleNamespace(synchronize=lambda: events.append(f"waited for {device}"))

    monkeypatch.setattr(torch.accelerator, "current_stream", stream_of)
    buffer = LossBuffer(3, device="meta")
    monkeypatch.setattr(buffer, "sync", lambda: events.append("writes are queued"))
    buffer.state_dict()
    assert events == ["writes are queued", "waited for meta"]
    LossBuffer(3).state_dict()  # no wait on a CPU
    assert len(events) == 2


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="flush_every must be at least 1 step, not 0"):
        LossBuffer(5, flush_every=0)
    buffer = LossBuffer(5)
    for ids, losses in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(2, 2), torch.zeros(2, 2))):
        with pytest.raises(
            ValueError, match=r"must have one shape \[B\]: record one loss for each example of the batch"
        ):
            buffer.record(ids.long(), losses, step=0)
    with pytest.raises(ValueError, match="keeps gradients: record them with gradients="):
        LossBuffer(5, with_gradient=True).record(torch.zeros(2).long(), torch.zeros(2), step=0)
    with pytest.raises(ValueError, match=r"holds \(6,\) for 'loss', this data set needs \(5,\): resume with the data"):
        buffer.load_state_dict(LossBuffer(6).state_dict())
