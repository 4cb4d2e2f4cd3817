"""The scorer's own loop on a gloo world, with a table instead of a model: ranks that wait, and ranks that fail."""

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpoint import MODEL

from titan_attent.data.io.reader import Reader
from titan_attent.foundations import sharding
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.scores.stored import Scoring, StoredScores
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan import user_errors
from titan_attent.titan.scoring import checkpoint as scorer_module
from titan_attent.titan.scoring import write_losses as loop_module
from titan_attent.titan.scoring.checkpoint import CheckpointScorer

NUM_EXAMPLES, BATCH_SIZE = 31, 3
SCORING = Scoring(
    **{"data_fingerprint": "f00d", "seq_len": 1, "num_examples": NUM_EXAMPLES, "model": "a table"},
    **{"precision": "float32", "checkpoint": "/step-3", "checkpoint_sha256": "beef"},
)
LOSSES = torch.linspace(0.5, 9.0, NUM_EXAMPLES)


class Examples:
    def __len__(self) -> int:
        return NUM_EXAMPLES

    def read(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"input": ids}, ids


def scorer_of(mesh: DeviceMesh | None, folder: str, losses: Tensor) -> Any:
    """All of it but the model: the loss of an example is looked up."""
    scorer: Any = object.__new__(CheckpointScorer)
    scorer.dataset, scorer.reader, scorer.pin_memory = Examples(), Reader(0), False
    scorer.sharding, scorer.batch_size = ExampleSharding(NUM_EXAMPLES, mesh=mesh), BATCH_SIZE
    scorer.model_parts, scorer.gc_handler = [torch.nn.Identity()], mock.MagicMock()
    states = {MODEL: SimpleNamespace(state_dict=dict)}
    scorer.checkpointer, scorer.checkpoint_path = SimpleNamespace(states=states, dcp_load=mock.MagicMock()), "/step-3"
    scorer.writer = ScoresWriter(folder, scoring=SCORING)
    scorer.forward_rows = None
    scorer._losses = lambda model, input_dict, ids: SimpleNamespace(losses=losses[ids])
    return scorer


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of two batches of two ranks, 12 examples: three chunks."""
    with (
        mock.patch.object(loop_module, "CHUNK_EXAMPLES", 12),
        mock.patch.object(scorer_module, "check_weights"),
        mock.patch.object(user_errors, "wait_for_first_rank"),
    ):
        yield


def counted(counts: Counter[str], name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return fn(*args, **kwargs)

    return call


def collectives(mesh: DeviceMesh, folder: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    with (
        small_chunks(),
        mock.patch.object(sharding, "_all_gather", counted(counts, "gather", sharding._all_gather)),
        mock.patch.object(dist, "broadcast_object_list", counted(counts, "start", dist.broadcast_object_list)),
    ):
        scorer_of(mesh, folder, LOSSES).train()
    return counts


def test_a_scoring_is_one_broadcast_and_a_gather_per_chunk(tmp_path: Path) -> None:
    assert run_on_ranks(collectives, 2, str(tmp_path)) == [{"start": 1, "gather": 3}] * 2
    losses = StoredScores(tmp_path)
    losses.verify_checksum()
    assert torch.equal(losses.read(0, NUM_EXAMPLES), LOSSES)


def with_a_slow_disk(mesh: DeviceMesh, folder: str) -> bool:
    """Rank 0's disk blocks until rank 1 has done all its work. Returns whether the folder was already finished."""
    done = Path(folder).with_name("rank 1 is done")
    stock = os.fsync

    def slow(file: int) -> None:
        while Path(folder, "losses.bin").exists() and not done.exists():
            time.sleep(0.001)
        stock(file)

    with small_chunks(), mock.patch("os.fsync", slow):
        scorer_of(mesh, folder, LOSSES).train()
    finished = Path(folder, "reference.json").exists()
    if mesh.get_local_rank() == 1:
        done.touch()
    return finished


def test_no_rank_waits_for_the_files_of_another(tmp_path: Path) -> None:
    assert run_on_ranks(with_a_slow_disk, 2, str(tmp_path / "ref"), timeout=30.0) == [True, False]
    assert torch.equal(StoredScores(tmp_path / "ref").read(0, NUM_EXAMPLES), LOSSES)


def failing(mesh: DeviceMesh, folder: str, losses: Tensor, free: int) -> tuple[int, str, int]:
    """(exit code, message, number of gathers) of a rank, if the disk has space for ``free`` durable steps."""
    messages: list[str] = []
    counts: Counter[str] = Counter()
    steps = iter(range(free))
    stock = os.fsync

    def fsync(file: int) -> None:
        if next(steps, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(file)

    def fail(error: ValueError) -> None:
        messages.append(str(error))
        raise SystemExit(2)

    with (
        small_chunks(),
        mock.patch("os.fsync", fsync),
        mock.patch.object(loop_module, "fail", fail),
        mock.patch.object(sharding, "_all_gather", counted(counts, "gather", sharding._all_gather)),
        pytest.raises(SystemExit) as end,
    ):
        scorer = scorer_of(mesh, folder, losses)
        if free < 10**6:  # so that the next gather reports the failure
            stock_append = scorer.writer.append
            scorer.writer.append = lambda losses: (stock_append(losses), wait(scorer.writer._pending))
        scorer.train()
    return int(str(end.value.code)), messages[0], counts["gather"]


def test_losses_that_are_not_finite_end_all_ranks_alike(tmp_path: Path) -> None:
    losses = LOSSES.clone()
    losses[[14, 16, 30]] = float("nan")  # 14 of rank 0, 16 of rank 1; 30 and its padding are never reached
    one, two = run_on_ranks(failing, 2, str(tmp_path), losses, 10**6)
    assert one == two and one[0] == 2 and one[2] == 2
    assert "2 of the 12 losses from example 12 on are not finite, first those of examples 14, 16: " in one[1]
    assert not (tmp_path / "reference.json").exists()
    assert ScoresWriter(tmp_path, scoring=SCORING).num_scored == 12


def test_a_disk_that_fills_up_ends_all_ranks(tmp_path: Path) -> None:
    # Two durable steps at the start and three for the first chunk; there is no space for the second.
    one, two = run_on_ranks(failing, 2, str(tmp_path), LOSSES, 5)
    assert one[0] == two[0] == 2 and one[2] == two[2] == 3
    assert "cannot read or write the losses ([Errno 28] No space left on device). Free some space" in one[1]
    assert "rank 0 could not write the losses" in two[1]
    assert ScoresWriter(tmp_path, scoring=SCORING).num_scored == 12
    with small_chunks(), mock.patch.object(dist, "broadcast_object_list"):
        scorer_of(None, str(tmp_path), LOSSES).train()
    assert torch.equal(StoredScores(tmp_path).read(0, NUM_EXAMPLES), LOSSES)


def test_a_folder_that_cannot_be_made_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one, two = run_on_ranks(failing, 2, str(tmp_path / "file" / "ref"), LOSSES, 10**6)
    assert one == two and one[0] == 2 and one[2] == 0
    assert "ref: cannot read or write the losses ([Errno 20] Not a directory" in one[1]


def refused(mesh: DeviceMesh, folder: str, losses: Tensor) -> tuple[int, str, int]:
    """Rank 0 fails at the start with an unexpected error."""
    with mock.patch.object(ScoresWriter, "__enter__", mock.Mock(side_effect=MemoryError("out of everything"))):
        return failing(mesh, folder, losses, 10**6)


def test_whatever_goes_wrong_on_rank_0_at_the_start_ends_all_ranks(tmp_path: Path) -> None:
    one, two = run_on_ranks(refused, 2, str(tmp_path), LOSSES, timeout=60.0)
    assert one == two == (2, "MemoryError: out of everything", 0)
