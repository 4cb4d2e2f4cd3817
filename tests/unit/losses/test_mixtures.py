"""Records of mixtures against rational numbers, one example at a time; the same wherever the exchanges are cut."""

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
    """Of every step two rows of each of three mixtures; shares of 0, of a half and of the whole among them."""
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
    """The rule of mixtures.py for each example by itself, in rational numbers; ``scored``: step -> score of all."""
    result = []
    for example in range(NUM):
        records = [Fraction(0), Fraction(0)]  # loss, gradient
        weight, visits, known = Fraction(0), 0, {}
        for start in range(1, STEPS + 1, WINDOW):
            pieces: list[list[tuple[int, Row]]] = [[]]
            for step in range(start, start + WINDOW):
                pieces[-1] += [(step, row) for row in rows[step] if row[0] == example]
                if step in scored:
                    pieces.append([(step, (example, scored[step], scored[step], -1.0))])
                    pieces.append([])
            for piece in pieces:
                visits += sum(float(torch.tensor(share)) >= 0.5 for _, (_, _, _, share) in piece)
                seen = [(step, row) for step, row in piece if abs(row[1]) < float("inf") and exact(row[3])]
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
                        read = [min(Fraction(4096), Fraction(float(torch.tensor(row[at])))) for _, row in seen]
                        mean = sum((s * v for s, v in zip(shares, read, strict=True)), Fraction(0)) / sum(shares)
                        rest = (1 - share) * weight
                        values.append((share * mean + rest * record) / (share + rest))
                    records, weight = values, share + (1 - share) * weight
                if weight >= Fraction(1, 2):
                    last = {"loss": float(records[0]), "gradient": float(records[1]), "step": seen[-1][0]}
                    known = last | {
                        "first_loss": known.get("first_loss", last["loss"]),
                        "first_step": known.get("first_step", last["step"]),
                    }
        result.append(known | {"visits": visits})
    return result


def build(num: int = NUM, **more: Any) -> LossBuffer:
    return LossBuffer(num, flush_every=WINDOW, with_shares=True, with_gradient=True, **more)


def feed(
    rows: dict[int, list[Row]], *, cuts: set[int] = frozenset(), scored: dict[int, float] | None = None, turn: int = 0
) -> dict[str, Any]:  # type: ignore[assignment]
    """``cuts``: steps after which a checkpoint is saved; ``turn``: rotates the rows of a step."""
    buffer = build()
    for step, all_rows in rows.items():
        turned = all_rows[turn:] + all_rows[:turn]
        ids, losses, norms, shares = map(torch.tensor, zip(*turned, strict=True))
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
    found = feed(rows, scored=scored)
    for example, expected in enumerate(plain(rows, scored)):
        assert found["visits"][example] == expected.pop("visits")
        assert (found["step"][example] == NEVER) == (not expected)
        for name, value in expected.items():
            assert found[name][example] == pytest.approx(value, rel=1e-6, abs=1e-9), (example, name)


@pytest.mark.parametrize("seed", range(4))
def test_no_save_and_no_order_changes_anything(seed: int) -> None:
    rows, scored = synthetic_rows(seed), {11: 2.5} if seed % 2 else {}
    expected = feed(rows, scored=scored)
    for cuts in (set(range(1, STEPS + 1)), {1}, {8, 9}, {3, 20, 21, 39}):
        assert feed(rows, scored=scored, cuts=cuts) == expected
    assert feed(rows, scored=scored, turn=1) == feed(rows, scored=scored, turn=4, cuts={5}) == expected


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
def test_a_share_of_nothing_is_nothing(share: float) -> None:
    buffer = record(record(build(1), 1, 4.0, 1.0), 9, 7.0, share)
    assert buffer.loss.tolist() == [4.0] and buffer.visits.tolist() == [1]
    assert record(build(1), 1, 7.0, share).step.tolist() == [NEVER]


def test_a_broken_loss_counts_for_who_was_most_of_it() -> None:
    """-inf among importances is for what was trained and never finite: the other image is still unseen."""
    buffer = build(2)
    nan, ids = torch.full((2,), float("nan")), torch.arange(2)
    buffer.record(ids, nan, step=1, gradients=torch.ones(2), shares=torch.tensor([0.9, 0.1]))
    buffer.sync()
    assert buffer.visits.tolist() == [1, 0] and buffer.step.tolist() == [NEVER, NEVER] and buffer.num_nonfinite == 2


def test_what_is_known_first_is_kept_from_the_next_window_on() -> None:
    buffer = record(record(build(1), 2, 6.0, 1.0), 5, 4.0, 1.0)
    assert buffer.loss.tolist() == buffer.first_loss.tolist() == [5.0] and buffer.first_step.tolist() == [5]
    record(buffer, 9, 2.0, 1.0)
    assert (buffer.loss.tolist(), buffer.first_loss.tolist(), buffer.first_step.tolist()) == ([2.0], [5.0], [5])


def test_whole_shares_once_a_window_are_the_plain_buffer() -> None:
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
