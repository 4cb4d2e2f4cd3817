"""FSDP2 and the exchange of losses on one GPU: process groups of one rank where torchtitan would have none.

On one process torchtitan wraps no FSDP2 and makes no mesh, so that nothing of what many GPUs do would run. Under
``meshes_of_one`` it does both on a mesh of one rank, over the real backend.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import PropertyMock, patch

import titan_attent.titan.patches.compat  # noqa: F401

from torchtitan.distributed import ParallelDims

KEPT = frozenset({"batch", "loss", "fsdp"})


@contextmanager
def meshes_of_one(world_size: int) -> Iterator[None]:
    """Make trainers in here treat one process as a data-parallel rank; nothing changes with more than one."""
    stock = ParallelDims._mesh_exist
    with ExitStack() as patches:
        if world_size == 1:
            patches.enter_context(
                patch.object(
                    ParallelDims, "_mesh_exist", lambda dims, name, degree: name in KEPT or stock(dims, name, degree)
                )
            )
            for name in ("dp_enabled", "dp_shard_enabled", "dp_cp_enabled"):
                patches.enter_context(patch.object(ParallelDims, name, PropertyMock(return_value=True)))
        yield
