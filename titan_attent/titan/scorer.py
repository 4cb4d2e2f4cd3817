"""What ``python -m titan_attent.score`` does: the reference losses of ``[data] path`` (scores/reference.py).

``checkpoint.initial_load_path`` is a step folder that torchtitan wrote (DCP), full or model-only, of the model and
flavor in ``[model]``; the losses go to the folder ``teacher.reference_path``. A killed scoring goes on where it was
when the same command runs again, on any number of ranks. The run's TOML serves as it is: what concerns training, saving
and logging is not read, and nothing is written but the reference.

torchtitan's Trainer builds, shards and loads the model. The examples are scored in order, in equal batches of
``validation.local_batch_size`` rows of every data-parallel rank, so that all ranks run the same forwards; a stretch of
batches is gathered at once. Rank 0 hands it to the thread that writes (scores/writer.py), and all ranks see for
themselves what is wrong with it, so that none waits for the files of another.

Cost: a forward pass over the data, padded by less than one batch of all ranks; of a stretch one gather of its losses
(4 bytes an example) and one host sync; one broadcast of a number at the start.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer
from tqdm import tqdm

from titan_attent.data.reader import Batch
from titan_attent.foundations.sharding import ExampleSharding, is_first_rank
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.titan.launch import arguments, parse, scored_data
from titan_attent.titan.loader import TeachingLoader
from titan_attent.titan.mistakes import fail, on_first_rank
from titan_attent.titan.opened import DataSets
from titan_attent.titan.scoring_checks import check_scoring, check_weights, scoring_config, writer_of
from titan_attent.titan.train_spec import attent_spec

STRETCH_EXAMPLES = 2**16
"""About what is gathered and written at once, and at least one batch of all ranks."""
STRETCH_BATCHES = 256
"""At most, where few ranks would take long for so many examples: a killed scoring loses the stretch under way."""


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """How the examples [start, num_examples) are cut into stretches, and those into batches of all ranks."""

    start: int
    num_examples: int
    batch_size: int
    """Rows of a rank."""
    num_ranks: int

    @property
    def rows(self) -> int:
        """Of a batch of all ranks."""
        return self.batch_size * self.num_ranks

    @property
    def size(self) -> int:
        """Examples of a stretch; only the last has fewer."""
        return self.rows * min(max(STRETCH_EXAMPLES // self.rows, 1), STRETCH_BATCHES)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ids [start, stop) of every stretch, in order."""
        for start in range(self.start, self.num_examples, self.size):
            yield start, min(start + self.size, self.num_examples)

    def ids(self, rank: int) -> Iterator[Tensor]:
        """int64 [batch_size] of every batch of ``rank``; the last id of the data is the padding of the last batch."""
        mine = rank * self.batch_size + torch.arange(self.batch_size)
        for start, stop in self.ranges():
            for first in range(start, stop, self.rows):
                yield (first + mine).clamp(max=self.num_examples - 1)


class ReferenceScorer(Trainer):
    """Builds the model as torchtitan does and, instead of training, writes the reference losses.

    ``job_config`` comes from :func:`scoring_config`. Not a TeachingTrainer: it has no teacher, and that one would want
    the reference that is still to be written.
    """

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        loader = cast(TeachingLoader, self.dataloader)
        self.dataset, self.reader, self.pin_memory = loader.dataset, loader.reader, loader.pin_memory
        self.sharding = ExampleSharding(len(self.dataset), mesh=self.parallel_dims.get_optional_mesh("batch"))
        self.batch_size = job_config.validation.local_batch_size
        self.checkpoint_path = job_config.checkpoint.initial_load_path
        self.example_loss = per_example_cross_entropy
        compile_config = job_config.compile
        if compile_config.enable and "loss" in compile_config.components:
            self.example_loss = torch.compile(self.example_loss, backend=compile_config.backend, fullgraph=True)
        self.writer = writer_of(job_config, self.dataset)

    @record
    def train(self) -> None:
        """Load, score what is missing, and finish the reference. A collective, on all ranks."""
        weights = self.checkpointer.states[MODEL].state_dict()
        with _fail_on_mistake():
            check_weights(weights, self.checkpoint_path)
        with ExitStack() as stack:
            with _fail_on_mistake():
                start = on_first_rank(lambda: stack.enter_context(self.writer).num_scored)
            self.checkpointer.dcp_load(weights, checkpoint_id=self.checkpoint_path, from_hf=False, from_quantized=False)
            logger.info(f"Scoring with the weights of {self.checkpoint_path}")
            self._write_reference(start)

    def _write_reference(self, start: int) -> None:
        """Score the examples from id ``start`` on, and finish; ends all ranks if the losses are not to be kept."""
        bar = tqdm(
            total=len(self.dataset),
            initial=start,
            unit=" examples",
            mininterval=0.2 if sys.stderr.isatty() else 60,  # a log file is no place for five lines a second
            disable=not is_first_rank(),
        )
        with bar:
            for first, losses, written in self._scored(start, bar):
                with _fail_on_mistake(bar):
                    if not written:
                        self.writer.wait()
                        raise ValueError(f"{self.writer.path}: rank 0 could not write the losses, and says why")
                    self.writer.check_finite(first, losses)
                    if is_first_rank():
                        self.writer.append(losses)
        if is_first_rank():
            with _fail_on_mistake():
                self.writer.finish()
            logger.info(f"{self.writer.path}: reference losses of {len(self.dataset):,} examples")

    @torch.no_grad()
    def _scored(self, start: int, bar: tqdm) -> Iterator[tuple[int, Tensor, bool]]:
        """Of every stretch from id ``start`` on, on every rank: first id, losses fp32 [n] on the CPU, and whether rank
        0 could write so far."""
        (model,) = self.model_parts
        model.eval()
        stretches = Stretches(
            start=start, num_examples=len(self.dataset), batch_size=self.batch_size, num_ranks=self.sharding.size
        )
        batches = self.reader.read(self._read, stretches.ids(self.sharding.rank), pin_memory=self.pin_memory)
        num_batches = 0
        for first, stop in stretches.ranges():
            local = []
            for done in range(first, stop, stretches.rows):
                num_batches += 1
                self.gc_handler.run(num_batches)
                input_dict, labels = next(batches)
                local.append(self._losses(model, input_dict, labels))
                bar.update(min(stretches.rows, stop - done))
            # Whether the writer failed travels along: all ranks end together, and none waits for one that is gone.
            failed = local[0].new_full((1,), float(self.writer.failed))
            gathered = self.sharding.gather(torch.cat([*local, failed]))[0].cpu()
            by_rank = gathered[:, :-1].unflatten(1, (len(local), self.batch_size))  # [ranks, batches, rows]
            yield first, by_rank.transpose(0, 1).flatten()[: stop - first], not gathered[:, -1].any()

    def _read(self, ids: Tensor) -> Batch:
        inputs, labels = self.dataset.batch(ids)
        return {"input": inputs}, labels

    def _losses(self, model: torch.nn.Module, input_dict: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Mean nats a token, fp32 [B]."""
        input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels.to(self.device))
        with self.train_context(), self.maybe_enable_amp:
            sums, counts = self.example_loss(model(inputs, **extra_inputs, **extra_kwargs), labels)
        return sums / counts


@contextmanager
def _fail_on_mistake(bar: tqdm | None = None) -> Iterator[None]:
    # Within the writer's own context: the message comes before the wait for what is still to be written.
    try:
        yield
    except ValueError as error:
        if bar is not None:
            bar.close()  # the message gets a line of its own
        fail(error)


def score() -> None:
    """The whole of the scoring command."""
    argv = arguments("titan_attent.score")
    try:
        job_config = scoring_config(parse(argv))
        datasets = DataSets()
        spec = attent_spec(job_config.model.name, datasets, data=scored_data(job_config))
        check_scoring(job_config, spec, world_size=int(os.environ["WORLD_SIZE"]), datasets=datasets)
    except ValueError as error:
        fail(error)
    register_train_spec(job_config.model.name, spec)
    init_logger()
    scorer = ReferenceScorer(job_config)
    scorer.train()
    scorer.close()
    torch.distributed.destroy_process_group()
