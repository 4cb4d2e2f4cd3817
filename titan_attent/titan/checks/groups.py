"""``[data] group_size``: what groups of examples with one input do not combine with, and data that hold no such groups.

Cost: the index of the data, and a small file beside it.
"""

from pathlib import Path

from torchtitan.config import JobConfig

from titan_attent.data.examples import Examples
from titan_attent.data.plan.packed import BEST_FIT
from titan_attent.data.text.document_examples import DOCUMENT, DocumentDataset
from titan_attent.data.text.output import TASK_FILE
from titan_attent.foundations.versioned_json import read_json_object
from titan_attent.titan.mixtures import is_mixed


def check_groups(job_config: JobConfig, dataset: Examples, *, batch_size: int) -> None:
    """Refuse groups that the run, its global batch or its training data cannot keep whole; ValueError."""
    data, teacher = job_config.data, job_config.teacher
    m = data.group_size
    if m == 1:
        return
    groups = f"[data] group_size = {m}"
    if data.unit != DOCUMENT:
        raise ValueError(
            f'{groups} with unit = "{data.unit}": a group is of whole rows of a task, each a document. Set unit = '
            f'"{DOCUMENT}", or group_size = 1'
        )
    if data.packing != BEST_FIT or data.max_examples_per_window:
        key = "max_examples_per_window" if data.packing == BEST_FIT else "packing"
        raise ValueError(
            f"{groups} with {key} = {getattr(data, key)}: with groups each row of a batch holds one document. Remove "
            f"{key}, or set group_size = 1"
        )
    if is_mixed(job_config):
        raise ValueError(
            f"{groups} with [data.sources]: the rows that a batch takes of a source may cut a group. Remove the "
            "section, or set group_size = 1"
        )
    if teacher.strategy != "uniform":
        raise ValueError(
            f'{groups} with [teacher] strategy = "{teacher.strategy}": it selects rows one by one, and would cut '
            'groups. Set strategy = "uniform", or group_size = 1'
        )
    if batch_size % m:
        raise ValueError(
            f"{groups} with a global batch of {batch_size}: make training.global_batch_size a multiple of {m}, so that "
            "no batch cuts a group"
        )
    check_data(dataset, m, key="path")


def check_validation_groups(job_config: JobConfig, dataset: Examples, *, key: str) -> None:
    """Refuse validation data, batches and parallelisms in which no vote can be taken over groups; ValueError."""
    m, rows = job_config.data.group_size, job_config.validation.local_batch_size
    if m == 1 or not job_config.data.exact_match:
        return
    groups = f"[data] group_size = {m} with exact_match = true"
    if (degree := job_config.parallelism.context_parallel_degree) > 1:
        raise ValueError(
            f"{groups} and context_parallel_degree = {degree}, with which no rank has a whole answer to vote with. Set "
            "it to 1, or exact_match = false"
        )
    if rows % m:
        raise ValueError(
            f"{groups} and validation.local_batch_size = {rows}: a vote is taken within a batch. Make it a multiple of "
            f"{m}"
        )
    check_data(dataset, m, key=key)


def check_data(dataset: Examples, m: int, *, key: str) -> None:
    """Refuse data whose examples are no groups of m whole documents; ValueError."""
    assert isinstance(dataset, DocumentDataset)
    path, num_documents = Path(dataset.shards.path), dataset.shards.index.num_documents
    if len(dataset) != num_documents:
        raise ValueError(
            f"[data] {key} = {path} with group_size = {m}: its {num_documents} documents are {len(dataset)} examples, "
            f"as some have more than seq_len = {dataset.seq_len} tokens. Raise seq_len to the longest row"
        )
    if (seeds := _seeds_of(path)) is not None and seeds % m:
        raise ValueError(
            f"[data] {key} = {path} with group_size = {m}: {path.parent / TASK_FILE} says --seeds {seeds}, so rows of "
            f"different inputs would be one group. Set group_size = {seeds}, or write the data with --seeds {m}"
        )
    if num_documents % m:
        raise ValueError(
            f"[data] {key} = {path}: its {num_documents} rows are no groups of group_size = {m}. Set it to the --seeds "
            "that the data were written with"
        )


def _seeds_of(path: Path) -> int | None:
    """The rows per input of a data set that titan_attent.tasks wrote; None for another one."""
    try:
        content = read_json_object(path.parent / TASK_FILE)
    except (OSError, ValueError):
        return None
    options = content.get("options")
    seeds = options.get("seeds", 1) if isinstance(options, dict) and "task" in content else None
    return seeds if isinstance(seeds, int) and seeds >= 1 else None
