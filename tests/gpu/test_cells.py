"""Three cells of the parallelism matrix over the real backend, each compared with a plain single-process loop.

    python tests/gpu/test_cells.py [--device cuda] [--output cells.json]

The comparison is that of tests/distributed/titan/test_parallelism.py: same examples, weights, decisions, buffer; losses
and gradients to fp32 rounding. The cells follow the number of GPUs: FSDP2, FSDP2 + TP, FSDP2 + PP on four or more;
FSDP2, TP, PP on two. One GPU has no peer to talk to: there FSDP2 and the exchange of losses run on process groups of
one rank (one_gpu.py), plain, with accumulation, and with recomputation. They run over NCCL; that ranks agree is not
shown then.

On CPU (--device cpu, gloo) it is a rehearsal on two processes: the suite runs all cells there.
"""

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import torch
import torch.distributed as dist
from distributed.parallel_world import Settings, train_cells, train_plainly
from distributed.titan.test_parallelism import (
    CELLS,
    CHUNKED,
    FULL_AC,
    PP,
    SCORED,
    TP,
    VALIDATED,
    batch,
    check_cell,
    taught,
)
from one_gpu import meshes_of_one
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.common import measure
from titan_attent.data.text.writer import write_dataset


def cells_of(num_ranks: int) -> dict[str, Settings]:
    """Three cells for a world of 1, 2 or 4 processes."""
    if num_ranks == 4:
        return {
            "FSDP2": batch(2) | SCORED | VALIDATED,
            "FSDP2 + TP": batch(4) | TP | SCORED | VALIDATED,
            "FSDP2 + PP": batch(4) | PP | SCORED | VALIDATED,
        }
    if num_ranks == 2:
        return {"FSDP2": CELLS[2]["FSDP"], "TP": CELLS[2]["TP"], "PP": CELLS[2]["PP 1F1B, accumulated"]}
    assert num_ranks == 1
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
                check_cell(settings, ranks, train_plainly(taught(settings), data=data, device=device))
                verdicts[name] = ""
            except AssertionError:
                verdicts[name] = traceback.format_exc(limit=-1)
        dist.barrier()
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description="Cells of the parallelism matrix against a plain loop.")
    parser.add_argument("--device", default=measure.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, choices=[1, 2, 4], help="default: as many as there are GPUs, or 2")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    count = torch.cuda.device_count() if args.device == "cuda" else 2
    args.processes = args.processes or max(n for n in (1, 2, 4) if n <= count)

    header = measure.header()
    with tempfile.TemporaryDirectory() as folder:
        # 21 windows: two batches of 8, and a rest.
        write_dataset([Path(json.__file__).parent], output=Path(folder) / "all", tokenizer="train:512")
        data = Path(folder) / "data"
        ranks = str(Path(folder) / "all" / "tokenizer.tiktoken")
        write_dataset([Path(json.__file__).parent / "scanner.py"], output=data, tokenizer=ranks)
        arguments = (cells_of(args.processes), str(data), f"{folder}/cells", args.device)
        verdicts = measure.run_ranks(work, *arguments, num_ranks=args.processes, device=args.device)
    rows = [{"cell": name, "as the plain loop": "yes" if not text else "NO"} for name, text in verdicts.items()]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, rows)
    print("".join(f"\n{name}:\n{text}" for name, text in verdicts.items() if text))
    if args.processes == 1:
        print("One GPU: no rank had a peer. That ranks agree over NCCL needs two GPUs or more.")
    sys.exit(any(verdicts.values()))


if __name__ == "__main__":
    main()
