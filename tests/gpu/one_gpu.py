"""FSDP2 and the exchange of losses on one GPU: process groups of one rank where torchtitan would have none.

On one process torchtitan applies no FSDP2 and makes no mesh, so the code for several GPUs would not run. Under
``meshes_of_one`` it does both on a mesh of one rank, over the real backend.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import PropertyMock, patch

import titan_attent.titan.patches.compat  # noqa: F401

from torchtitan.distributed import ParallelDims

MESHES = frozenset({"batch", "loss", "fsdp"})


@contextmanager
def meshes_of_one(world_size: int) -> Iterator[None]:
    """Make trainers in this context treat one process as a data-parallel rank; no effect with more than one."""
    stock = ParallelDims._mesh_exist
    with ExitStack() as patches:
        if world_size == 1:
            patches.enter_context(
                patch.object(
                    ParallelDims, "_mesh_exist", lambda dims, name, degree: name in MESHES or stock(dims, name, degree)
                )
            )
            for name in ("dp_enabled", "dp_shard_enabled", "dp_cp_enabled"):
                patches.enter_context(patch.object(ParallelDims, name, PropertyMock(return_value=True)))
        yield
