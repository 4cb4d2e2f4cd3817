"""Memory that is lent again, and boxes that are read ahead."""

import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit.edit.made import save, weights

from titan_attent.edit import boxes as boxes_module
from titan_attent.edit import combine, memory, writer
from titan_attent.edit.boxes import Box, boxes
from titan_attent.edit.checkpoint import Checkpoint, DcpCheckpoint, Weight
from titan_attent.edit.combine import Combination, Term
from titan_attent.edit.command import main
from titan_attent.edit.memory import MAX_BLOCKS, empty
from titan_attent.edit.read_ahead import ReadAhead
from titan_attent.edit.transforms import Unchanged


@given(steps=st.lists(st.tuples(st.integers(0, 80), st.sampled_from(["whole", "view", "storage"])), max_size=150))
def test_no_two_tensors_that_live_share_memory(steps: list[tuple[int, str]]) -> None:
    """Tensors come and go; of some only a view or the storage is left."""
    held: dict[int, tuple[object, torch.Tensor]] = {}
    for number, (slot, kind) in enumerate(steps):
        held.pop(slot % 45, None)
        tensor = empty((3, 5), torch.int64).fill_(number)
        if kind == "storage":
            held[slot % 45] = tensor.untyped_storage(), torch.full((15,), number)
        else:
            held[slot % 45] = (tensor[1:] if kind == "view" else tensor), torch.full((15,), number)
        del tensor
        for kept, expected in held.values():
            found = kept if isinstance(kept, torch.Tensor) else torch.tensor([], dtype=torch.int64).set_(kept)
            assert torch.equal(found.flatten(), expected[: found.numel()])


def test_memory_that_nothing_refers_to_is_lent_again() -> None:
    first = empty((7,), torch.float32)
    place = first.data_ptr()
    second = empty((7,), torch.float32)
    assert second.data_ptr() != place
    del first
    assert empty((2, 3), torch.bfloat16).data_ptr() == place


def test_more_tensors_than_blocks_and_larger_ones() -> None:
    many = [empty((4,), torch.float32).fill_(i) for i in range(2 * MAX_BLOCKS)]
    assert [float(one.sum()) for one in many] == [4.0 * i for i in range(2 * MAX_BLOCKS)]
    assert len(memory._blocks) <= MAX_BLOCKS
    large = empty((memory.BLOCK_BYTES // 4 + 1,), torch.float32)
    assert large.fill_(1).sum() == large.numel()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == math.prod(shape) * dtype.itemsize  # all that torch.save would write


def test_threads_get_memory_of_their_own() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = empty((1000,), torch.int64).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("count", [4, memory.BLOCK_BYTES // 4 + 1], ids=["a block", "more than a block"])
def test_a_forked_process_has_memory_of_its_own(count: int) -> None:
    tensor = empty((count,), torch.float32)
    tensor[0] = 1
    child = os.fork()
    if not child:
        tensor[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor[0] == 1


def test_what_was_announced_is_read_once_and_in_order(tmp_path: Path) -> None:
    save(tmp_path / "x", weights(1))
    checkpoint, read = DcpCheckpoint(str(tmp_path / "x")), []
    plain = checkpoint.read
    checkpoint.read = lambda name, box: read.append((name, box)) or plain(name, box)  # type: ignore[method-assign, func-returns-value]
    name = max(weights(1), key=lambda one: weights(1)[one].numel())
    places = [(name, box) for box in boxes(checkpoint.weights[name].shape, 5)]
    assert len(places) > 3
    with ReadAhead(checkpoint) as ahead:
        for place in places:
            ahead.announce(*place)
        found = [ahead.read(*place) for place in reversed(places)]
        assert read == places
        again = ahead.read(*places[0])
    assert read == [*places, places[0]] and torch.equal(again, found[-1])
    assert torch.equal(torch.cat([one.flatten() for one in reversed(found)]), weights(1)[name].flatten())


def test_an_error_of_a_box_that_was_announced_is_raised_where_it_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "x", weights(1))
    checkpoint = DcpCheckpoint(str(tmp_path / "x"))
    name, weight = next(iter(checkpoint.weights.items()))
    box = next(boxes(weight.shape))
    for file in (tmp_path / "x").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with ReadAhead(checkpoint) as ahead:
        ahead.announce(name, box)
        with pytest.raises(ValueError, match=r"is damaged.*Restore it"):
            ahead.read(name, box)


def test_after_an_error_what_is_computed_ends_at_its_next_read(tmp_path: Path) -> None:
    """Such as a decomposition that reads many boxes, when Ctrl-C comes."""
    save(tmp_path / "x", weights(1))
    reads = []

    def endless(self: Combination, name: str, box: Box) -> torch.Tensor:
        while len(reads) < 1000:
            reads.append(self.operands[self.base].read(name, box))
            time.sleep(0.001)
        return reads[0]

    combination = Combination({"x": DcpCheckpoint(str(tmp_path / "x"))}, "x", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Combination, "read", endless)
        computed = writer._computed(combination, list(combination.weights))
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(computed)
    assert 0 < len(reads) < 900


@pytest.mark.parametrize("ahead", [0, 1, 2, 100])
def test_reading_ahead_changes_nothing(ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in ((1, "x"), (2, "y"), (3, "z")):
        save(tmp_path / name, weights(seed))
    words = [f"{tmp_path}/x", "+", "0.4", f"{tmp_path}/y", "-", "0.6", f"{tmp_path}/z"]
    assert main([*words, "--output", f"{tmp_path}/expected"]) == 0
    monkeypatch.setattr(writer, "BOXES_AHEAD", ahead)
    assert main([*words, "--output", f"{tmp_path}/found"]) == 0
    for file in (tmp_path / "expected").glob("*.distcp"):
        assert (tmp_path / "found" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_holds_the_boxes_of_few_operands_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the base, of the operand that is added, and the sum; however many operands there are."""
    made: list[weakref.ref[torch.Tensor]] = []
    living: list[int] = []

    def counted(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = empty(shape, dtype)
        made.append(weakref.ref(tensor))
        living.append(sum(one() is not None for one in made))
        return tensor

    class Ones(Checkpoint):
        weights = {"x": Weight((6,), dtype)}

        def read(self, name: str, box: Box) -> torch.Tensor:
            return counted((6,), dtype).fill_(1)

        def forget(self) -> None:
            pass

    monkeypatch.setattr(combine, "empty", counted)
    terms = [Term(0.05, str(number), "0", Unchanged()) for number in range(1, 20)]
    mean = combine.Combination({str(number): Ones() for number in range(20)}, "0", terms)
    assert torch.equal(mean.read("x", ((0, 6),)), torch.ones(6, dtype=dtype))
    assert max(living) <= 5


def test_boxes_of_many_operands_are_not_read_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each the one that is computed, and the next."""
    waiting: list[int] = []
    stock = ReadAhead.announce

    def announce(self: ReadAhead, *place: Any) -> None:
        stock(self, *place)
        waiting.append(len(self._announced))

    monkeypatch.setattr(ReadAhead, "announce", announce)
    monkeypatch.setattr(boxes_module, "ELEMENTS", 30)
    steps = [str(save(tmp_path / f"step-{number}", weights(number))) for number in range(1, 15)]
    assert main(["mean", *steps, "--output", f"{tmp_path}/out"]) == 0
    assert waiting and max(waiting) <= 2
