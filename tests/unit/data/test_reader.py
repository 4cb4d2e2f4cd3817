"""reader.py: requests are answered in order, by threads that live as long as the run."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from titan_attent.data.io.reader import ReadBatch, Reader


@pytest.fixture(params=[0, 1, 3])
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    reader = Reader(request.param)
    yield reader
    reader.close()


def batch_of(number: int) -> ReadBatch:
    time.sleep(0.002 * (number % 3))  # some overtake others
    return {"input": torch.full((2,), number)}, torch.full((2,), -number)


def numbers(batches: Iterator[ReadBatch]) -> list[int]:
    return [int(inputs["input"][0]) for inputs, labels in batches if int(labels[1]) == -int(inputs["input"][0])]


def test_answers_come_in_the_order_of_the_requests(reader: Reader) -> None:
    assert numbers(reader.read(batch_of, range(40))) == list(range(40))
    assert numbers(reader.read(batch_of, range(0))) == []


def test_the_threads_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    reader = Reader(3)
    for _ in range(10):
        assert len(numbers(reader.read(batch_of, range(12)))) == 12
    assert len(started) == 3 and all("reader" in name for name in started)
    reader.close()


def test_it_reads_ahead_by_a_fixed_number_of_batches() -> None:
    requested: list[int] = []

    def requests() -> Iterator[int]:
        for number in range(100):
            requested.append(number)
            yield number

    reader = Reader(2)
    batches = reader.read(batch_of, requests())
    for taken in range(1, 20):
        next(batches)
        assert len(requested) == taken + 4
    batches.close()
    assert len(requested) == 23
    on_demand = Reader(0).read(batch_of, requests())
    requested.clear()
    next(on_demand)
    assert requested == [0]


def test_an_exception_of_a_reader_is_raised_at_its_position(reader: Reader) -> None:
    def fails_at_five(number: int) -> ReadBatch:
        if number == 5:
            raise ValueError("shard 5 is gone")
        return batch_of(number)

    batches = reader.read(fails_at_five, range(20))
    assert [int(next(batches)[0]["input"][0]) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="shard 5 is gone"):
        next(batches)
    assert numbers(reader.read(batch_of, range(3))) == [0, 1, 2]


def test_after_a_dropped_iterator_the_next_one_works(reader: Reader) -> None:
    called: list[int] = []

    def slow(number: int) -> ReadBatch:
        called.append(number)
        return batch_of(number)

    batches = reader.read(slow, range(1000))
    next(batches)
    batches.close()  # as the garbage collector does
    assert numbers(reader.read(batch_of, range(30))) == list(range(30))
    assert len(called) <= 1 + reader.num_workers + 3


def test_close_ends_the_threads_and_does_not_wait() -> None:
    release = threading.Event()

    def blocked(number: int) -> ReadBatch:
        release.wait(10)
        return batch_of(number)

    before = set(threading.enumerate())
    reader = Reader(2)
    batches = reader.read(blocked, range(10))
    thread = threading.Thread(target=lambda: next(batches, None), daemon=True)
    thread.start()
    while len(set(threading.enumerate()) - before) < 3:
        time.sleep(0.001)
    reader.close()
    reader.close()
    release.set()
    for left in set(threading.enumerate()) - before - {thread}:
        left.join(5)
        assert not left.is_alive()
