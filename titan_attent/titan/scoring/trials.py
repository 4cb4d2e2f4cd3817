"""Forward passes for an edit's search: the mean loss of the weights in the model, on a target and a control data set.

torchtitan's Trainer builds and shards the model, as for scoring (checkpoint.py); nothing is loaded or written. The
examples are windows of ``training.seq_len`` tokens (or images), evenly spaced over each data set, the same for all
trials.

Cost per trial and data set: a forward pass over its examples, one reduction of two numbers and one host sync.
"""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.logging import init_logger

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch
from titan_attent.titan.checks import preflight
from titan_attent.titan.checks.hugging_face_checks import model_shapes
from titan_attent.titan.checks.resume_checks import compare_shapes
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.launch import parse, spec_of
from titan_attent.titan.models.families import family_of
from titan_attent.titan.scoring.checkpoint import ForwardScorer
from titan_attent.titan.scoring.checkpoint_checks import scoring_config
from titan_attent.titan.scoring.write_losses import ScoringChunks

TARGET, CONTROL = "target", "control"


class Trials(ForwardScorer):
    """The model, and the losses of the weights that a search puts into it.

    Attributes:
        weights: name -> the model's own parameters, sharded; a copy into them changes the model.
    """

    def __init__(self, job_config: JobConfig, *, control: Examples, num_examples: int):
        super().__init__(job_config)
        (self.model,) = self.model_parts
        self.model.eval()
        self.weights: Mapping[str, Tensor] = self.checkpointer.states[MODEL].state_dict()
        self._data = {TARGET: self.dataset, CONTROL: control}
        self._num_examples = num_examples

    @torch.no_grad()
    def mean_loss(self, name: str) -> float:
        """Mean nats per token (or the loss of the modality) over the examples of ``TARGET`` or ``CONTROL``.

        A collective, on all ranks; the same number on all.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last layers stay gathered after a forward pass, with the weights of before
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for (inputs, labels), valid in self._batches(name):
            result = self._losses(self.model, inputs, labels)
            counts = result.counts.double() * valid.to(self.device)
            total += torch.stack([(result.losses.double() * counts).sum(), counts.sum()])
        loss, count = self.sharding.sum(total).tolist()
        return loss / count

    def _batches(self, name: str) -> Iterator[tuple[ReadBatch, Tensor]]:
        """This rank's batches, and which of their rows count: the last batch is padded."""
        dataset = self._data[name]
        num = min(self._num_examples, len(dataset))
        spaced = torch.arange(num) * len(dataset) // num
        chunks = ScoringChunks(start=0, num_examples=num, batch_size=self.batch_size, num_ranks=self.sharding.size)
        rank, size = self.sharding.rank, self.batch_size
        slots = [first + rank * size + torch.arange(size) for first in range(0, num, chunks.rows)]
        read = self.reader.read(lambda ids: dataset.read(spaced[ids]), chunks.ids(rank), pin_memory=self.pin_memory)
        for batch, slot in zip(read, slots, strict=True):
            yield batch, slot < num


def open_trials(argv: list[str], shapes: Mapping[str, list[int]], *, path: str, num_examples: int) -> Trials:
    """The model of a run's configuration, after all checks; ValueError for a mistake in it.

    Args:
        argv: the run's configuration, with ``data.path`` for the target and ``data.validation_path`` for the control.
        shapes: of the weights that will be tried, which are those of ``path``.
        num_examples: of each data set, at most.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)  # without torchrun: one process
    os.environ.setdefault("MASTER_PORT", "0")
    job_config = scoring_config(parse(argv))
    job_config.data.unit, job_config.data.validation_sets = "window", {}
    job_config.validation.enable, job_config.validation.seq_len = True, job_config.training.seq_len
    datasets = DataSets()
    spec = spec_of(job_config, datasets)
    world_size = int(os.environ["WORLD_SIZE"])
    preflight.check_run(job_config, spec, world_size=world_size, datasets=datasets, trains=False)
    if preflight.check_parallelism(job_config, world_size=world_size) != world_size:
        raise ValueError("[parallelism] a search supports data parallelism only: set the other degrees to 1")
    compare_shapes(model_shapes(job_config, spec), dict(shapes), path)
    control = family_of(job_config).modality.open(datasets, job_config, validation=True)
    job_config.validation.enable = False
    register_train_spec(job_config.model.name, spec)
    init_logger()
    return Trials(job_config, control=control, num_examples=num_examples)
