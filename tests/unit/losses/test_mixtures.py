"""losses/mixtures.py against a loop in rational numbers; the result does not depend on when records are exchanged."""

import random
from fractions import Fraction
from typing import Any

import pytest
import torch

from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.records import NEVER

FIELDS = ("loss", "step", "first_loss", "first_step", "visits", "gradient")
NUM, STEPS, WINDOW = 7, 40, 8
Row = tuple[int, float, float, float]
"""(example, loss, gradient, share)."""


def synthetic_rows(seed: int) -> dict[int, list[Row]]:
    """For every step, the two rows of each of three mixtures; some shares are 0, 0.5 and 1."""
    rng, rows = random.Random(seed), dict[int, list[Row]]()
    for step in range(1, STEPS + 1):
        rows[step] = []
        for _ in range(3):
            share = rng.choice([0.0, 0.02, 0.25, 0.5, 1.0, rng.random()])
            loss, norm = rng.choice([rng.uniform(0, 9), rng.uniform(0, 1e-2), 1e5]), rng.random()
            if rng.random() < 0.1:
                loss = float(rng.choice(["nan", "inf", "-inf"]))
            first, second = rng.sample(range(NUM), 2) if rng.random() < 0.9 else [rng.randrange(NUM)] * 2
            rows[step] += [(first, loss, norm, share), (second, loss, norm, 1 - share)]
    return rows


def exact(share: float) -> Fraction:
    return Fraction(round(float(torch.tensor(share)) * 2**24), 2**24)


def plain(rows: dict[int, list[Row]], scored: dict[int, float]) -> list[dict[str, Any]]:
    """The rule of mixtures.py in rational numbers, example by example; ``scored``: step -> score of all examples."""
    result = []
    for example in range(NUM):
        records = [Fraction(0), Fraction(0)]  # loss, gradient
        weight, visits, latest = Fraction(0), 0, {}
        for start in range(1, STEPS + 1, WINDOW):
            chunks: list[list[tuple[int, Row]]] = [[]]
            for step in range(start, start + WINDOW):
                chunks[-1] += [(step, row) for row in rows[step] if row[0] == example]
                if step in scored:
                    chunks.append([(step, (example, scored[step], scored[step], -1.0))])
                    chunks.append([])
            for chunk in chunks:
                visits += sum(float(torch.tensor(share)) >= 0.5 for _, (_, _, _, share) in chunk)
                seen = [(step, row) for step, row in chunk if abs(row[1]) < float("inf") and exact(row[3])]
                if not seen:
                    continue
                if seen[0][1][3] == -1:
                    records, share, weight = (
                        [Fraction(float(torch.tensor(seen[0][1][1])))] * 2,
                        Fraction(1),
                        Fraction(1),
                    )
                else:
                    shares = [exact(row[3]) for _, row in seen]
                    share, values = min(Fraction(1), sum(shares, Fraction(0))), []
                    for at, record in enumerate(records, start=1):
                        clipped = [min(Fraction(4096), Fraction(float(torch.tensor(row[at])))) for _, row in seen]
                        mean = sum((s * v for s, v in zip(shares, clipped, strict=True)), Fraction(0)) / sum(shares)
                        old_share = (1 - share) * weight
                        values.append((share * mean + old_share * record) / (share + old_share))
                    records, weight = values, share + (1 - share) * weight
                if weight >= Fraction(1, 2):
                    last = {"loss": float(records[0]), "gradient": float(records[1]), "step": seen[-1][0]}
                    latest = last | {
                        "first_loss": latest.get("first_loss", last["loss"]),
                        "first_step": latest.get("first_step", last["step"]),
                    }
        result.append(latest | {"visits": visits})
    return result


def build(num: int = NUM, **more: Any) -> LossBuffer:
    return LossBuffer(num, flush_every=WINDOW, with_shares=True, with_gradient=True, **more)


def feed(
    rows: dict[int, list[Row]], *, cuts: set[int] = frozenset(), scored: dict[int, float] | None = None, rotate: int = 0
) -> dict[str, Any]:  # type: ignore[assignment]
    """``cuts``: steps after which a checkpoint is saved; ``rotate``: rotates the rows of each step by this number."""
    buffer = build()
    for step, all_rows in rows.items():
        rotated = all_rows[rotate:] + all_rows[:rotate]
        ids, losses, norms, shares = map(torch.tensor, zip(*rotated, strict=True))
        buffer.record(ids, losses, step=step, gradients=norms, shares=shares)
        buffer.step_done()
        if step in (scored or {}):
            everything, score = torch.arange(NUM), torch.full((NUM,), scored[step])  # type: ignore[index]
            ones = torch.ones(NUM)
            buffer.record(everything, score, step=step, gradients=score, shares=ones, trained=False)
        if step in cuts:
            state = {name: tensor.clone() for name, tensor in buffer.state_dict().items()}
            buffer = build()
            buffer.load_state_dict(state)
    buffer.sync()
    return {name: getattr(buffer, name).tolist() for name in FIELDS} | {
        name: tensor.tolist() for name, tensor in buffer.state_dict().items() if name not in FIELDS
    }


@pytest.mark.parametrize("seed", range(6))
def test_records_are_those_of_rational_numbers(seed: int) -> None:
    rows, scored = synthetic_rows(seed), {11: 2.5, 16: 0.125, 30: 3.0} if seed % 2 else {}
    actual = feed(rows, scored=scored)
    for example, expected in enumerate(plain(rows, scored)):
        assert actual["visits"][example] == expected.pop("visits")
        assert (actual["step"][example] == NEVER) == (not expected)
        for name, value in expected.items():
            assert actual[name][example] == pytest.approx(value, rel=1e-6, abs=1e-9), (example, name)


@pytest.mark.parametrize("seed", range(4))
def test_no_save_and_no_order_changes_anything(seed: int) -> None:
    rows, scored = synthetic_rows(seed), {11: 2.5} if seed % 2 else {}
    expected = feed(rows, scored=scored)
    for cuts in (set(range(1, STEPS + 1)), {1}, {8, 9}, {3, 20, 21, 39}):
        assert feed(rows, scored=scored, cuts=cuts) == expected
    assert feed(rows, scored=scored, rotate=1) == feed(rows, scored=scored, rotate=4, cuts={5}) == expected


def record(buffer: LossBuffer, step: int, loss: float, share: float, *, example: int = 0) -> LossBuffer:
    one = torch.ones(1)
    buffer.record(torch.tensor([example]), one * loss, step=step, gradients=one, shares=one * share)
    buffer.step_done()
    buffer.sync()
    return buffer


def test_a_small_share_is_not_the_record_of_an_unseen_example() -> None:
    buffer = record(build(1), 1, 7.0, 0.02)
    assert buffer.step.tolist() == buffer.first_step.tolist() == [NEVER] and buffer.visits.tolist() == [0]
    record(buffer, 9, 2.0, 0.9)
    assert buffer.loss.item() == pytest.approx((0.9 * 2 + 0.1 * 0.02 * 7) / (0.9 + 0.1 * 0.02))
    assert (buffer.step.tolist(), buffer.first_step.tolist(), buffer.visits.tolist()) == ([9], [9], [1])
    record(buffer, 17, 5.0, 1.0)
    assert buffer.loss.tolist() == [5.0] and buffer.first_step.tolist() == [9] and buffer.visits.tolist() == [2]


def test_small_shares_add_up() -> None:
    buffer = build(1)
    for step in (1, 2, 9):
        record(buffer, step, 3.0, 0.24)
    assert buffer.step.tolist() == [9] and buffer.loss.item() == pytest.approx(3.0) and buffer.visits.tolist() == [0]


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_share_of_zero_is_ignored(share: float) -> None:
    buffer = record(record(build(1), 1, 4.0, 1.0), 9, 7.0, share)
    assert buffer.loss.tolist() == [4.0] and buffer.visits.tolist() == [1]
    assert record(build(1), 1, 7.0, share).step.tolist() == [NEVER]


def test_a_non_finite_loss_is_a_visit_of_the_example_with_the_larger_share() -> None:
    """An example that was trained and never had a finite loss gets importance -inf; the other image stays unseen."""
    buffer = build(2)
    nan, ids = torch.full((2,), float("nan")), torch.arange(2)
    buffer.record(ids, nan, step=1, gradients=torch.ones(2), shares=torch.tensor([0.9, 0.1]))
    buffer.sync()
    assert buffer.visits.tolist() == [1, 0] and buffer.step.tolist() == [NEVER, NEVER] and buffer.num_nonfinite == 2


def test_the_first_loss_is_fixed_from_the_next_window_on() -> None:
    buffer = record(record(build(1), 2, 6.0, 1.0), 5, 4.0, 1.0)
    assert buffer.loss.tolist() == buffer.first_loss.tolist() == [5.0] and buffer.first_step.tolist() == [5]
    record(buffer, 9, 2.0, 1.0)
    assert (buffer.loss.tolist(), buffer.first_loss.tolist(), buffer.first_step.tolist()) == ([2.0], [5.0], [5])


def test_shares_of_one_once_per_window_equal_the_buffer_without_shares() -> None:
    rng = torch.Generator().manual_seed(0)
    plain_buffer, mixed = LossBuffer(64, flush_every=WINDOW), LossBuffer(64, flush_every=WINDOW, with_shares=True)
    for step in range(1, 33):
        first = (step - 1) % WINDOW * 8
        ids, losses = torch.arange(first, first + 8), torch.rand(8, generator=rng) * 9 + 0.01
        plain_buffer.record(ids, losses, step=step)
        mixed.record(ids, losses, step=step, shares=torch.ones(8))
        for buffer in (plain_buffer, mixed):
            buffer.step_done()
    for buffer in (plain_buffer, mixed):
        buffer.sync()
    for name in FIELDS[:-1]:
        assert torch.equal(getattr(plain_buffer, name), getattr(mixed, name)), name
