"""Records of mixtures on 2 and 3 ranks equal those of one rank bit for bit; a checkpoint resumes on any number."""

import itertools
import random
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from distributed.spawn import run_on_ranks

from titan_attent.losses.buffer import LossBuffer

NUM, STEPS, WINDOW, CUT, ROWS = 11, 20, 8, 13, 6


def synthetic_rows() -> list[tuple[list[float], ...]]:
    """The ids, losses and shares of six rows per step; some ids occur twice, some are padding."""
    rng = random.Random(3)

    def row(_: int) -> tuple[float, ...]:
        return (
            rng.randrange(NUM + 1),
            rng.choice([rng.uniform(0, 9), float("nan")]),
            rng.choice([0.0, 0.5, rng.random()]),
        )

    return [tuple(map(list, zip(*map(row, range(ROWS)), strict=True))) for _ in range(STEPS)]


def feed(buffer: LossBuffer, start: int, stop: int) -> None:
    rank, size = buffer.sharding.rank, buffer.sharding.size
    local_rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    for step, (ids, losses, shares) in itertools.islice(enumerate(synthetic_rows(), start=1), start, stop):
        local_ids, local_losses, local_shares = (torch.tensor(column[local_rows]) for column in (ids, losses, shares))
        buffer.record(local_ids, local_losses, step=step, shares=local_shares)
        buffer.step_done()


def build(mesh: Any) -> LossBuffer:
    return LossBuffer(NUM, mesh=mesh, flush_every=WINDOW, with_shares=True)


def local(buffer: LossBuffer) -> dict[str, np.ndarray]:
    buffer.sync()
    state = {name: tensor[: buffer.sharding.num_local].numpy().copy() for name, tensor in buffer._state.items()}
    return state | {"num_nonfinite": np.array(buffer.num_nonfinite)}


def train(mesh: Any, folder: str, save: bool) -> dict[str, np.ndarray]:
    """Train all steps and save a checkpoint within a window, or, without ``save``, resume from that checkpoint."""
    buffer = build(mesh)
    if save:
        feed(buffer, 0, CUT)
        dcp.save({"buffer": buffer}, checkpoint_id=folder)
    else:
        dcp.load({"buffer": buffer}, checkpoint_id=folder)
    feed(buffer, CUT, STEPS)
    return local(buffer)


def both(mesh: Any, folder: str) -> list[dict[str, np.ndarray]]:
    num_ranks = 1 if mesh is None else mesh.size()
    return [train(mesh, f"{folder}/{num_ranks}", True), train(mesh, f"{folder}/3", False)]


def test_ranks_and_checkpoints_change_no_bit(tmp_path: Any) -> None:
    whole = build(None)
    feed(whole, 0, STEPS)
    expected = local(whole)
    assert (expected["step"] == -1).any() and (expected["visits"] > 1).any() and expected["num_nonfinite"] > 3
    for num_ranks in (3, 2, 1):
        ranks = run_on_ranks(both, num_ranks, str(tmp_path))
        for parts in zip(*ranks, strict=True):
            for name, values in expected.items():
                joined = parts[0][name] if name == "num_nonfinite" else np.concatenate([part[name] for part in parts])
                defined = expected["step"] >= 0 if name in ("loss", "first_loss") else slice(None)
                if name == "num_nonfinite":
                    assert joined == values
                else:
                    np.testing.assert_array_equal(
                        joined[defined], values[defined], err_msg=f"{name}, {num_ranks} ranks"
                    )
