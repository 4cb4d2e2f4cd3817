"""The validation sets of a run: which of their examples are read, in which rows, and what is measured on them.

Cost: opens the data sets, whose indexes earlier checks have read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_attent.data.examples import Examples
from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.plan.order import Key, Pool
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.token_bytes import token_bytes_of
from titan_attent.data.validation_sets import ValidationSet, validation_sets
from titan_attent.losses.exact_match import ExactMatch
from titan_attent.losses.votes import InputVotes
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.forward_rows import build_forward_rows
from titan_attent.titan.loader import global_batch_size
from titan_attent.titan.models.families import family_of
from titan_attent.titan.settings import with_validation_set
from titan_attent.titan.source_losses import SourceLosses, build_source_losses

SAMPLE_ORDER: Key = (0, 0, 0)
"""The key of the random order whose first examples are the sample; independent of data.seed, so that runs compare."""


@dataclass(frozen=True)
class MeasuredSet:
    """A validation set as it is read and measured.

    Attributes:
        info: its name and its weight.
        loader: its examples.
        sources: sums by source; None for data of one source.
        exact_match: counts right answers; None without ``[data] exact_match``.
        votes: of inputs with several rows; None without ``[data] group_size``.
        token_bytes: int64 [V], the bytes of each token id, on the device; None where they are not known.
    """

    info: ValidationSet
    loader: FixedLoader
    sources: SourceLosses | None = None
    exact_match: ExactMatch | None = None
    votes: InputVotes | None = None
    token_bytes: Tensor | None = None


def sample(dataset: Examples, *, num_examples: int, group_size: int = 1) -> Pool:
    """The first ``num_examples`` of ``dataset`` in a fixed random order of its groups; all if it has no more."""
    if num_examples >= len(dataset):
        return Pool.whole(len(dataset))
    size = max(1, num_examples // group_size) * group_size
    return Pool(len(dataset), order=SAMPLE_ORDER, size=size, group_size=group_size)


def build_sets(
    datasets: DataSets,
    flavors: Mapping[str, BaseModelArgs],
    job_config: JobConfig,
    *,
    dp_world_size: int,
    dp_rank: int,
    parallel_dims: ParallelDims,
) -> list[MeasuredSet]:
    """The validation sets that a run names, on this rank.

    Args:
        flavors: of the model.
        dp_world_size, dp_rank: size of the ``batch`` mesh, and this rank in it.
    """
    validation, data = job_config.validation, job_config.data
    device, cp_mesh = torch.device(utils.device_type), parallel_dims.get_optional_mesh("cp")
    modality = family_of(job_config).modality
    infos = validation_sets(data)
    opened = {
        info: modality.open(datasets, with_validation_set(job_config, info.path), validation=True) for info in infos
    }
    documents = [dataset for dataset in opened.values() if isinstance(dataset, DocumentDataset)]
    sets, sampled = [], []
    for info, dataset in opened.items():
        num_examples = len(dataset)
        if validation.steps > 0:
            num_examples = validation.steps * global_batch_size(job_config, dp_world_size=dp_world_size)
        m = data.group_size if data.exact_match else 1
        pool = sample(dataset, num_examples=num_examples, group_size=m)
        sampled.append(f"{pool.size:,} of {len(dataset):,} examples" + (f" of {info.name}" if info.name else ""))
        loader = FixedLoader(
            dataset,
            pool,
            batch_size=validation.local_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            reader=datasets.reader(data.num_workers),
            forward_rows=build_forward_rows(
                job_config,
                dataset,
                flavors[job_config.model.flavor],
                dims=parallel_dims,
                device=device,
                together=documents,
            )
            if m == 1  # else whole groups in every batch
            else None,
        )
        measured = MeasuredSet(
            info,
            loader,
            sources=build_source_losses(dataset, job_config, dims=parallel_dims, device=device),
            exact_match=ExactMatch(dataset.sources, cp_mesh=cp_mesh, device=device) if data.exact_match else None,
            votes=_votes(loader, group_size=m, dims=parallel_dims, device=device) if m > 1 else None,
            token_bytes=_token_bytes(dataset, device=device),
        )
        sets.append(measured)
    logger.info(f"Validation: {', '.join(sampled)}, the same each time; the loss is {modality.validated(job_config)}")
    return sets


def _votes(loader: FixedLoader, *, group_size: int, dims: ParallelDims, device: torch.device) -> InputVotes:
    num_batches = -(-loader.pool.size // (loader.batch_size * loader.dp_world_size))
    return InputVotes(
        group_size=group_size,
        num_groups=num_batches * loader.batch_size // group_size,
        gather=dims.get_optional_mesh("batch"),
        add_up=dims.get_optional_mesh("pp"),
        device=device,
    )


def _token_bytes(dataset: Any, *, device: torch.device) -> Tensor | None:
    """int64 [V] on ``device``, the bytes of each token id; None for images and without a tokenizer file."""
    shards = getattr(dataset, "shards", None)
    table = token_bytes_of(shards) if isinstance(shards, TokenShards) else None
    return None if table is None else torch.from_numpy(table).long().to(device)
