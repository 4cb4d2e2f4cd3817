"""The mixture of a run's sources (data/plan/mixture.py), from ``[data.sources]``: its checks, its plan, its parts.

Cost of the checks and the plan: the index of the data. Of building it with documents: some lengths of each source.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import JobConfig

from titan_attent.data.examples import Examples
from titan_attent.data.plan.mixture import Mixture, Source
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.proportions import TRAINED, UNITS, Proportions, check_of, parse_sources, proportions_of
from titan_attent.data.plan.source import spans_by_name
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.source_tokens import examples_by_source, tokens_by_source
from titan_attent.titan.loader import TeachingLoader, sum_over


def is_mixed(job_config: JobConfig) -> bool:
    """Whether a run names the proportions of its sources."""
    return bool(job_config.data.sources)


def check_mixture(job_config: JobConfig, dataset: Examples) -> None:
    """Refuse a mixture that is malformed or does not fit the data; ValueError."""
    check_of(job_config.data.proportions_of)
    if is_mixed(job_config):
        _proportions(job_config, tokens_by_source(dataset))
    teacher = job_config.teacher
    if is_mixed(job_config) and teacher.strategy != "uniform" and teacher.pool_size:
        raise ValueError(
            f"[teacher] pool_size = {teacher.pool_size} with [data.sources]: a pool is a span of the shuffled order of "
            "all sources. Set pool_size = 0"
        )


def _proportions(job_config: JobConfig, tokens: Mapping[str, int]) -> Proportions:
    return proportions_of(parse_sources(job_config.data.sources), tokens, where=job_config.data.path)


def proportions_within(job_config: JobConfig, dataset: Examples) -> dict[str, float] | None:
    """Source -> its mean proportion in the run, where a teacher selects within each source; None otherwise."""
    if not is_mixed(job_config) or job_config.data.proportions_of != TRAINED:
        return None
    proportions, steps = _proportions(job_config, tokens_by_source(dataset)), max(1, job_config.training.steps)
    return {name: float(sum_ / steps) for name, sum_ in zip(proportions.names, proportions.sums(steps), strict=True)}


def build_mixture(
    loader: TeachingLoader,
    packer: Packer | None,
    job_config: JobConfig,
    *,
    mesh: DeviceMesh | None,
    device: torch.device,
    batch_size: int,
) -> Mixture | None:
    """Build the mixture of a run; None if it names no proportions.

    Args:
        packer: the run's; None if each row is one example.
        mesh: the ``batch`` mesh, whose ranks share the packing; None for one rank.
        device: the device of its collectives.
        batch_size: rows per global batch.
    """
    if not is_mixed(job_config):
        return None
    dataset, data = loader.dataset, job_config.data
    tokens = tokens_by_source(dataset)
    proportions = _proportions(job_config, tokens)
    spans = spans_by_name(dataset.sources, num_examples=len(dataset))
    packers: dict[str, Packer] = {}
    if packer is not None:
        assert isinstance(dataset, DocumentDataset)
        packers = {
            name: Packer(
                own,
                batch_size=1,
                max_examples=packer.max_examples,
                packing=data.packing,
                rank=loader.dp_rank,
                num_ranks=loader.dp_world_size,
                add_up=partial(sum_over, mesh, device),
            )
            for name, own in examples_by_source(dataset).items()
        }
        dataset.table.keep_blocks_of(len(packers))
    return Mixture(
        [Source(name, spans.get(name, ()), tokens[name], packers.get(name)) for name in proportions.names],
        proportions,
        num_examples=len(dataset),
        batch_size=batch_size,
        seq_len=dataset.tokens_per_example,
        seed=data.seed,
        of=data.proportions_of,
    )


def lines_of_mixture(job_config: JobConfig, dataset: Examples, *, batch_size: int, steps: int) -> Iterator[str]:
    """Of each source: its proportion, and the tokens and epochs that the whole run trains of it."""
    if not is_mixed(job_config):
        return
    tokens = tokens_by_source(dataset)
    proportions = _proportions(job_config, tokens)
    per_batch = batch_size * dataset.tokens_per_example
    first, last = proportions.at(1), proportions.at(max(1, steps))
    for i, (name, batches) in enumerate(zip(proportions.names, proportions.sums(steps), strict=True)):
        trained = round(batches * per_batch)
        ends = [f"{share[i] / UNITS:.2%}" for share in (first, last)]
        shown = " to ".join(dict.fromkeys(ends))
        epochs = (
            f"{trained / tokens[name]:.2f} epochs of its {tokens[name]:,}" if tokens[name] else "it holds no example"
        )
        yield f"{name}: {shown}, {trained:,} tokens, {epochs}"
