"""``python -m titan_attent.score checkpoint``: the losses of one model on ``[data] path`` (scores/stored.py).

``checkpoint.initial_load_path`` is a step folder that torchtitan wrote (DCP), full or model-only, of the model and
flavor in ``[model]``. The losses go to the folder ``--output``. A killed scoring resumes when the same command runs
again, on any number of ranks. The run's TOML needs no changes: its settings of training, saving and logging are not
read, and the command writes nothing but the losses. ``--role amateur`` or ``expert`` is stored with them, and a run
refuses them in the other role.

With ``data.unit = "document"`` the scores are of whole documents. A document longer than ``training.seq_len`` is read
in spans of that many tokens, and its score is the mean over all its tokens
(write_documents.py).

torchtitan's Trainer builds, shards and loads the model. The examples are scored in batches of
``validation.local_batch_size`` rows per data-parallel rank.

Cost: a forward pass over the data, and the cost of writing its losses (write_losses.py).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.folding import ExampleLosses, index_in_batch
from titan_attent.losses.window import neutral_statistics
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.document_mask import EXAMPLE_INDEX, document_batch
from titan_attent.titan.forward_rows import forward_rows_of, static_shapes
from titan_attent.titan.launch import log_vocabulary, parse, spec_of
from titan_attent.titan.loader import TeachingLoader
from titan_attent.titan.models.families import family_of
from titan_attent.titan.scoring.checkpoint_checks import (
    Options,
    check_scoring,
    check_weights,
    parse_options,
    scoring_config,
    writer_of,
)
from titan_attent.titan.scoring.write_documents import write_document_losses
from titan_attent.titan.scoring.write_losses import fail_on_mistake, open_on_rank_zero, write_losses
from titan_attent.titan.user_errors import fail


class Predicted(NamedTuple):
    """The result of a forward pass: predictions, labels on the device, and which example of its row each token is of,
    where rows hold several.
    """

    pred: Tensor
    labels: Tensor
    example_index: Tensor | None


class ForwardScorer(Trainer):
    """Builds the model as torchtitan does, for forward passes that give the loss of every example.

    ``job_config`` comes from :func:`scoring_config`. It is not a TeachingTrainer, whose teacher would need the losses
    that scoring is about to write.
    """

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        loader = cast(TeachingLoader, self.dataloader)
        self.dataset: Any = loader.dataset
        self.reader, self.pin_memory = loader.reader, loader.pin_memory
        self.sharding = ExampleSharding(len(self.dataset), mesh=self.parallel_dims.get_optional_mesh("batch"))
        self.batch_size = job_config.validation.local_batch_size
        compiled = job_config.compile
        self.example_loss = family_of(job_config).modality.example_loss(job_config)(
            compile_loss=compiled.enable and "loss" in compiled.components, backend=compiled.backend
        )
        self.neutral_statistics = neutral_statistics(self.device)
        self.forward_rows = forward_rows_of(self, self.dataset)

    @contextmanager
    def predicted(self, model: torch.nn.Module, input_dict: dict[str, Tensor], labels: Tensor) -> Iterator[Predicted]:
        """The context of a forward pass over a batch, with its result."""
        input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
        index = input_dict.get(EXAMPLE_INDEX)
        if self.job_config.data.document_mask:
            prepared: Any = document_batch(model, input_dict, labels.to(self.device))
        else:
            prepared = self.post_dataloading_process(input_dict, labels.to(self.device))
        inputs, labels, extra_inputs, extra_kwargs = prepared
        with static_shapes(self.forward_rows), self.train_context(), self.maybe_enable_amp:
            yield Predicted(model(inputs, **extra_inputs, **extra_kwargs), labels, index)

    def _losses(self, model: torch.nn.Module, input_dict: dict[str, Tensor], labels: Tensor) -> ExampleLosses:
        """Mean nats per token of each example, or the loss of the model's modality, and the numbers of tokens."""
        with self.predicted(model, input_dict, labels) as (pred, labels, index):
            num, packing = len(labels), {}
            if index is not None and self.forward_rows is not None:  # packed
                num = len(labels) * self.forward_rows.max_examples
                packing = {"example_index": index_in_batch(index, examples_per_row=self.forward_rows.max_examples)}
            ones = torch.ones(num, device=self.device)
            return self.example_loss(pred, labels, ones, self.neutral_statistics, **packing)


class CheckpointScorer(ForwardScorer):
    """Writes the losses of a checkpoint's model instead of training."""

    def __init__(self, job_config: JobConfig, options: Options):
        super().__init__(job_config)
        self.checkpoint_path = job_config.checkpoint.initial_load_path
        self.writer = writer_of(job_config, self.dataset, options)

    @record
    def train(self) -> None:
        """Load the model, score the examples without a loss, and finish the folder. A collective, on all ranks."""
        weights = self.checkpointer.states[MODEL].state_dict()
        with fail_on_mistake():
            check_weights(weights, self.checkpoint_path)
        (model,), numbers = self.model_parts, count(1)
        model.eval()

        def losses(input_dict: dict[str, Tensor], labels: Tensor) -> ExampleLosses:
            self.gc_handler.run(next(numbers))
            return self._losses(model, input_dict, labels)

        with open_on_rank_zero(self.writer) as start, torch.no_grad():
            self.checkpointer.dcp_load(weights, checkpoint_id=self.checkpoint_path, from_hf=False, from_quantized=False)
            logger.info(f"Scoring with the weights of {self.checkpoint_path}")
            common: dict[str, Any] = {
                **{"start": start, "dataset": self.dataset, "reader": self.reader, "sharding": self.sharding},
                **{"batch_size": self.batch_size, "pin_memory": self.pin_memory},
            }
            if self.forward_rows is None:
                write_losses(self.writer, lambda *batch: losses(*batch).losses, **common)
            else:
                self.dataset.share_table(
                    self.forward_rows.add_up, rank=self.sharding.rank, num_ranks=self.sharding.size
                )
                write_document_losses(self.writer, losses, forward_rows=self.forward_rows, **common)
            logger.info(f"{self.writer.path}: scores of {self.writer.scoring.num_examples:,} examples")


def run_command(job_config: JobConfig, spec: TrainSpec, datasets: DataSets, build: Callable[[], Trainer]) -> None:
    """Build a trainer that writes something instead of training, after all checks, and run it."""
    register_train_spec(job_config.model.name, spec)
    init_logger()
    log_vocabulary(job_config, spec, datasets)
    command = build()
    command.train()
    command.close()
    torch.distributed.destroy_process_group()


def main(argv: list[str]) -> None:
    """Run the command."""
    try:
        options, rest = parse_options(argv)
        job_config = scoring_config(parse(rest))
        datasets = DataSets()
        spec = spec_of(job_config, datasets)
        check_scoring(job_config, spec, options, world_size=int(os.environ["WORLD_SIZE"]), datasets=datasets)
    except ValueError as error:
        fail(error)
    run_command(job_config, spec, datasets, lambda: CheckpointScorer(job_config, options))
