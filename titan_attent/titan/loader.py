"""The loader: torchtitan's BaseDataLoader over shards of tokens or images, in the order of a sampler.

    sampler (batches of a pass) -> reader threads (data/io/reader.py) -> {"input", "example_id", "weight"}, labels

The threads read ahead within a pass only. At the end of a pass, the loader requests the next pass from the sampler, in
the training thread and on all ranks at the same batch. The threads also evaluate the order of the pass, which takes
some microseconds per id.

The state does not depend on the rank. So it loads at another data-parallel size with the same global batch, which
torchtitan's own loader does not support (its issues #811, #816).

Cost: that of data/io/reader.py.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.packed import BEST_FIT, Packer, default_limit
from titan_attent.data.plan.sampler import MIXTURE, ServedPass, TeachingSampler
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.source_tokens import examples_by_source
from titan_attent.systems.system_list import renamed
from titan_attent.titan.changed_settings import SETTINGS, recorded_settings
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.families import family_of
from titan_attent.titan.patches import compat
from titan_attent.titan.settings import GROUP_SIZE, document_settings, settings_of, systems_of


def geometry_of(job_config: JobConfig, dataset: Examples, *, batch_size: int) -> dict[str, Any]:
    """The values that must be equal in a checkpoint and the run that resumes it, so that example ids match."""
    geometry = {
        "data fingerprint": dataset.stored.fingerprint,
        "num_examples": len(dataset),
        "training.seq_len": dataset.seq_len,
        "training.global_batch_size": batch_size,
        "data.seed": job_config.data.seed,
    }
    if isinstance(dataset, DocumentDataset):
        geometry |= document_settings(job_config)
    settings = settings_of(job_config)
    for system, config in systems_of(job_config):
        geometry |= system.identity(config, settings)
    return geometry


def check_geometry(stored: dict[str, Any], current: dict[str, Any], *, where: str) -> None:
    """Raise a ValueError that names every difference."""
    stored = {GROUP_SIZE: 1} | {renamed(name, separator="."): value for name, value in stored.items()}
    current = {GROUP_SIZE: 1} | current
    differing = [
        f"{name} is {current.get(name)!r} in this run but {stored.get(name)!r} in the checkpoint"
        for name in current
        if stored.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            f"{where} was written for another data set, batch or teacher state: {'; '.join(differing)}. Its example "
            "ids or the statistics of examples would not match this run. Resume with the same values, or start a new "
            "run in another job.dump_folder"
        )


class TeachingLoader(BaseDataLoader):
    """An endless iterator over the microbatches of this data-parallel rank; call :meth:`follow` before iterating.

    Args:
        dataset: reads the inputs and labels of examples, by id.
        datasets: all data sets of the run, for its systems.
        geometry: the result of :func:`geometry_of`, saved in the checkpoint and compared on resume.
        settings: other settings that the checkpoint records (changed_settings.py).
        dp_rank, dp_world_size: rank and size of the ``batch`` mesh; TP, PP and CP peers build identical loaders.
        microbatches: gradient accumulation steps.
        reader: the reader threads, shared with scoring and validation.
        pin_memory: copy batches to page-locked memory, for asynchronous transfer to a GPU.
    """

    def __init__(
        self,
        dataset: Examples,
        *,
        datasets: DataSets,
        geometry: dict[str, Any],
        settings: dict[str, Any],
        dp_rank: int,
        dp_world_size: int,
        microbatches: int,
        reader: Reader,
        pin_memory: bool,
    ):
        self.dataset, self.datasets, self.geometry, self.settings = dataset, datasets, geometry, settings
        self.dp_rank, self.dp_world_size, self.microbatches = dp_rank, dp_world_size, microbatches
        self.reader, self.pin_memory = reader, pin_memory
        self.sampler: TeachingSampler | None = None
        self.served: tuple[ServedPass, int] | None = None
        """The pass of the last global batch that was returned, and the number of that batch in the pass."""
        self._before_decision: Callable[[], None] = lambda: None
        self._reads: Sequence[Callable[[Tensor], dict[str, Tensor]]] = ()
        self._step_reads: Sequence[Callable[..., dict[str, Tensor]]] = ()
        self._step: Callable[[], int] = lambda: 0
        self._marks: Sequence[Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]] = ()
        self._with_weights = True

    def follow(
        self,
        sampler: TeachingSampler,
        *,
        before_decision: Callable[[], None] = lambda: None,
        reads: Sequence[Callable[[Tensor], dict[str, Tensor]]] = (),
        step_reads: Sequence[Callable[..., dict[str, Tensor]]] = (),
        step: Callable[[], int] = lambda: 0,
        marks: Sequence[Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]] = (),
        with_weights: bool = True,
    ) -> None:
        """Return the batches of ``sampler``.

        Args:
            before_decision: called before the sampler may change its state, to wait for checkpoint staging.
            reads: functions from example ids int64 [B] to further columns of the batch; called in reader threads.
            step_reads: the same from ids and the number of the step that trains them; also from ``skipped=``, as
                :meth:`~titan_attent.systems.system.System.read_columns_of_step`.
            step: the number of the step in which it is called; read when a pass begins.
            marks: functions from example ids, inputs and labels to the labels to train on, see
                :meth:`~titan_attent.systems.system.System.mark_labels`; called in reader threads.
            with_weights: whether the batch has the column "weight".
        """
        self.sampler, self._before_decision, self._reads = sampler, before_decision, reads
        self._step_reads, self._step = step_reads, step
        self._marks, self._with_weights = marks, with_weights

    def _read(
        self, sampler: TeachingSampler, current: ServedPass, step_of_first: int, batch_and_microbatch: tuple[int, int]
    ) -> ReadBatch:
        """Read a microbatch of the pass ``current``; ``step_of_first``: the step of its batch 0, before a resume."""
        ids = sampler.local_ids(current, *batch_and_microbatch)
        skipped = sampler.local_skipped(current, *batch_and_microbatch)
        # Only documents have rows with cut examples.
        cut = {} if skipped is None else {"skipped": skipped}
        inputs, labels = self.dataset.read(ids, current.visit_key_of(batch_and_microbatch[0]), **cut)
        for mark in self._marks:
            labels = mark(ids, inputs, labels)
        columns = {name: column for read in self._reads for name, column in read(ids).items()}
        for read_of_step in self._step_reads:
            columns |= read_of_step(ids, step_of_first + batch_and_microbatch[0], **cut)
        return {**inputs, "example_id": ids, **columns}, labels

    def __iter__(self) -> Iterator[ReadBatch]:
        sampler = self.sampler
        assert sampler is not None, "follow a sampler before iterating"
        while True:
            self._before_decision()
            current = sampler.current_pass()
            start = sampler.consumed
            batches = self.reader.read(
                partial(self._read, sampler, current, self._step() - start),
                sampler.local_microbatches(current, start=start),
                pin_memory=self.pin_memory,
            )
            weights = sampler.local_weights(current, start=start)
            for i, ((input_dict, labels), weight) in enumerate(zip(batches, weights, strict=True)):
                if self._with_weights:
                    input_dict["weight"] = weight
                if (i + 1) % self.microbatches == 0:
                    self.served = (current, sampler.consumed)
                    sampler.batch_consumed()
                yield input_dict, labels

    def state_dict(self) -> dict[str, Any]:
        assert self.sampler is not None
        state, recorded = self.sampler.state_dict(), self.geometry | {SETTINGS: self.settings}
        if MIXTURE in state:  # DCP requires equal keys, and a run may resume with or without a mixture
            recorded[MIXTURE] = state.pop(MIXTURE)
        return {"sampler": state, "geometry": json.dumps(recorded)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.sampler is not None
        recorded = json.loads(state_dict["geometry"])
        check_geometry(recorded, self.geometry, where="the checkpoint")
        mixture = {MIXTURE: recorded[MIXTURE]} if MIXTURE in recorded else {}
        self.sampler.load_state_dict(state_dict["sampler"] | mixture)

    def close(self) -> None:
        """End the reader threads."""
        self.reader.close()


def global_batch_size(job_config: JobConfig, *, dp_world_size: int) -> int:
    """The number of rows per training step: examples, or windows of packed documents."""
    training = job_config.training
    return training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * dp_world_size


def build_loader(job_config: JobConfig, datasets: DataSets, *, dp_rank: int, dp_world_size: int) -> TeachingLoader:
    """Build the loader of a run; the trainer sets its sampler once the meshes exist."""
    data = job_config.data
    dataset = family_of(job_config).modality.open(datasets, job_config)
    batch_size = global_batch_size(job_config, dp_world_size=dp_world_size)
    return TeachingLoader(
        dataset,
        datasets=datasets,
        geometry=geometry_of(job_config, dataset, batch_size=batch_size),
        settings=recorded_settings(job_config),
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        microbatches=batch_size // (job_config.training.local_batch_size * dp_world_size),
        reader=datasets.reader(data.num_workers),
        pin_memory=not compat.IS_CPU and data.num_workers > 0,
    )


def build_packer(
    loader: TeachingLoader,
    *,
    mesh: DeviceMesh | None,
    device: torch.device,
    batch_size: int,
    max_examples: int,
    packing: str = BEST_FIT,
    mixed: bool = False,
    one_per_row: bool = False,
) -> Packer | None:
    """Build the packer of a run; None if each row is one example. A collective on ``mesh``.

    Args:
        mesh: the ``batch`` mesh, whose ranks share the reading of the documents' lengths; None for one rank.
        device: the device of its collectives.
        batch_size: windows per global batch.
        max_examples, packing: as in :class:`Packer`.
        mixed: whether a row holds the documents of one source (mixtures.py).
        one_per_row: whether each row holds one document.
    """
    dataset = loader.dataset
    if not isinstance(dataset, DocumentDataset):
        return None
    add_up = partial(sum_over, mesh, device)
    ranks: dict[str, Any] = {"rank": loader.dp_rank, "num_ranks": loader.dp_world_size}
    dataset.share_table(add_up, **ranks)
    if one_per_row:
        return None
    if mixed and not max_examples:
        # Rows of a source whose documents are short hold more of them than rows of all data.
        max_examples = max(default_limit(own, packing=packing) for own in examples_by_source(dataset).values())
    limits: dict[str, Any] = {"max_examples": max_examples, "packing": packing}
    return Packer(dataset, batch_size=batch_size, add_up=add_up, **limits, **ranks)


def sum_over(mesh: DeviceMesh | None, device: torch.device, numbers: Tensor) -> Tensor:
    """The sums of an int64 tensor on the CPU over the ranks of ``mesh``. A collective."""
    if mesh is None:
        return numbers
    numbers = numbers.to(device)
    dist.all_reduce(numbers, group=mesh.get_group())
    return numbers.cpu()
