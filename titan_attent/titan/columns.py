"""The columns of a batch: tensors about its examples, which the loader puts beside the model's inputs.

Most columns have one row per row of the batch. ``example_index`` and the columns that a system says so of have one row
per token, so under context parallelism every rank needs its part of them, in the order in which torchtitan shards
inputs and labels.

Cost: with context parallelism, one gather of each such column per microbatch on the device. No collective, no host
sync.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import cp_shard

from titan_attent.systems.system import Columns
from titan_attent.titan.document_mask import EXAMPLE_INDEX


def take_columns(
    input_dict: dict[str, Tensor],
    names: Iterable[str],
    job_config: JobConfig,
    *,
    cp_mesh: DeviceMesh | None,
    per_token: Iterable[str] = (),
) -> Columns:
    """Remove the columns from ``input_dict``, which is passed to the model's forward, and return them.

    With a document mask ``example_index`` also stays in ``input_dict``.

    Args:
        input_dict: the inputs of the model and the columns, [B, ...] each.
        names: the names of the columns; those that the batch lacks are left out.
        cp_mesh: the mesh of context parallelism, if it is used. Columns per token [B, L, ...] are then returned as this
            rank's [B, L / ranks, ...], for the same tokens as its labels.
        per_token: names of the columns per token, beside ``example_index``.
    """
    columns = {name: input_dict.pop(name) for name in names if name in input_dict}
    if EXAMPLE_INDEX in columns and job_config.data.document_mask:
        input_dict[EXAMPLE_INDEX] = columns[EXAMPLE_INDEX]
    if cp_mesh is not None:
        balancer = job_config.parallelism.context_parallel_load_balancer
        for name in sorted({EXAMPLE_INDEX, *per_token} & columns.keys()):
            (columns[name],), _ = cp_shard(cp_mesh, (columns[name],), None, balancer)
    return columns
