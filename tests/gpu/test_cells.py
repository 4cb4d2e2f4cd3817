"""Three cells of the parallelism matrix over the real backend, each compared with a plain single-process loop.

The comparison is that of tests/distributed/titan/test_parallelism.py: same examples, weights, decisions, buffer; losses
and gradients to fp32 rounding. The cells depend on the number of GPUs: FSDP2, FSDP2 + TP, FSDP2 + PP on four or more;
FSDP2, TP, PP on two. On one GPU, FSDP2 and the exchange of losses run over NCCL on process groups of one rank
(one_gpu.py): plain, with accumulation, and with recomputation. That does not test that ranks agree. The test suite runs
all cells over gloo.
"""

import json
import traceback
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from devices import DEVICE, num_ranks
from distributed.parallel_world import Settings, train_cells, train_plainly, write_data
from distributed.titan.test_parallelism import (
    ALL,
    CHUNKED,
    FULL_AC,
    PP,
    SCORED,
    TP,
    VALIDATED,
    batch,
    check_cell,
    result_settings,
)
from one_gpu import meshes_of_one
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.common import measure
from titan_attent.data.text.writer import write_dataset

pytestmark = pytest.mark.gpu
NUM_RANKS = num_ranks(at_most=4)


def cells_of(world_size: int) -> dict[str, Settings]:
    """Three cells for a world of 1, 2 or 4 processes."""
    if world_size == 4:
        return {
            "FSDP2": batch(2) | SCORED | VALIDATED,
            "FSDP2 + TP": batch(4) | TP | SCORED | VALIDATED,
            "FSDP2 + PP": batch(4) | PP | SCORED | VALIDATED,
        }
    if world_size == 2:
        return {"FSDP2": ALL[2]["FSDP"], "TP": ALL[2]["TP"], "PP": ALL[2]["PP 1F1B, accumulated"]}
    assert world_size == 1
    return {
        "FSDP2 on one rank": batch(8) | SCORED | VALIDATED,
        "FSDP2 on one rank, accumulated": batch(4) | VALIDATED,
        "FSDP2 on one rank, full AC, loss in chunks": batch(8) | FULL_AC | CHUNKED | SCORED | VALIDATED,
    }


def work(mesh: DeviceMesh, cells: dict[str, Settings], data: str, folder: str, device: str) -> dict[str, str]:
    """One rank: every cell, what all ranks of it saw against the plain loop; "" where they agree."""
    torch.backends.cuda.matmul.allow_tf32 = False
    verdicts = {}
    for name, settings in cells.items():
        with meshes_of_one(mesh.size()):
            (mine,) = train_cells(mesh, {name: settings}, data, folder).values()
        ranks: list[Any] = [None] * mesh.size()
        dist.all_gather_object(ranks, mine)
        if dist.get_rank() == 0:
            try:
                check_cell(settings, ranks, train_plainly(result_settings(settings), data=data, device=device))
                verdicts[name] = ""
            except AssertionError:
                verdicts[name] = traceback.format_exc(limit=-1)
        dist.barrier()
    return verdicts


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cells")
    write_dataset([Path(json.__file__).parent], output=folder / "all", tokenizer="train:512")
    data = write_data(folder, str(folder / "all" / "tokenizer.tiktoken"))
    arguments = (cells_of(NUM_RANKS), str(data), str(folder / "cells"), DEVICE)
    return measure.run_ranks(work, *arguments, num_ranks=NUM_RANKS, device=DEVICE)


@pytest.mark.parametrize("cell", cells_of(NUM_RANKS))
def test_a_cell_is_as_the_plain_loop(cell: str, verdicts: dict[str, str]) -> None:
    assert not verdicts[cell], verdicts[cell]
