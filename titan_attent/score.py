"""The command that scores: ``torchrun ... -m titan_attent.score --job.config_file X.toml --checkpoint.initial_load_path
DIR [--section.key value ...]`` writes the reference losses of ``[data] path`` (reference.py).

DIR is a step folder that torchtitan wrote (DCP), full or model-only, of the model and flavor in ``[model]``; the losses
go to the folder ``teacher.reference_path``. A killed scoring goes on where it was when the same command runs again, on
any number of ranks. The run's TOML serves as it is: what concerns training, saving and logging is not read, and nothing
is written but the reference.

torchtitan's Trainer builds, shards and loads the model. A part's examples are spread over the data-parallel ranks in
equal padded batches of ``validation.local_batch_size`` rows, so that every rank runs the same forwards.

Cost: a forward pass over the data; one gather of a part's losses (4 bytes an example) and one host sync a part.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import titan_attent.compat  # noqa: F401

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer
from tqdm import tqdm

from titan_attent import preflight
from titan_attent.data.loader import TeachingLoader
from titan_attent.data.opened import DataSets
from titan_attent.data.reader import Batch
from titan_attent.loss import per_example_cross_entropy
from titan_attent.score_checks import check_scoring, check_weights, scoring_config, writer_of
from titan_attent.sharding import ExampleSharding
from titan_attent.train import arguments, parse
from titan_attent.train_spec import attent_spec


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
        try:
            check_weights(weights, self.checkpoint_path)
        except ValueError as error:
            preflight.fail(error)
        self.checkpointer.dcp_load(weights, checkpoint_id=self.checkpoint_path, from_hf=False, from_quantized=False)
        logger.info(f"Scoring with the weights of {self.checkpoint_path}")
        writes = torch.distributed.get_rank() == 0
        with ExitStack() as stack:
            parts = self._on_first_rank(lambda: stack.enter_context(self.writer).missing())
            num_missing = sum(stop - start for start, stop in map(self.writer.range_of, parts))
            bar = tqdm(
                total=len(self.dataset),
                initial=len(self.dataset) - num_missing,
                unit=" examples",
                mininterval=0.2 if sys.stderr.isatty() else 60,  # a log file is no place for five lines a second
                disable=not writes,
            )
            with bar:
                for part, losses in self._scored(parts, bar):
                    if writes:
                        self.writer.write_part(part, losses)
            self._on_first_rank(self.writer.finish)
        logger.info(f"{self.writer.path}: reference losses of {len(self.dataset):,} examples")

    def _on_first_rank(self, action: Callable[[], Any]) -> Any:
        """What ``action`` gives on rank 0, on all ranks; its ValueError ends them all with one message."""
        result: list[Any] = [None, ""]
        if torch.distributed.get_rank() == 0:
            try:
                result[0] = action()
            except ValueError as error:
                result[1] = str(error)
        torch.distributed.broadcast_object_list(result)
        if result[1]:
            preflight.fail(ValueError(result[1]))
        return result[0]

    @torch.no_grad()
    def _scored(self, parts: list[int], bar: tqdm) -> Iterator[tuple[int, Tensor]]:
        """(part, its losses fp32 [part]) on every rank."""
        (model,) = self.model_parts
        model.eval()
        ids = self._id_batches(parts)
        batches = self.reader.read(self._read, ids, pin_memory=self.pin_memory)
        rows, num_batches = self.batch_size * self.sharding.size, 0
        for part in parts:
            start, stop = self.writer.range_of(part)
            local = []
            for first in range(start, stop, rows):
                num_batches += 1
                self.gc_handler.run(num_batches)
                input_dict, labels = next(batches)
                local.append(self._losses(model, input_dict, labels))
                bar.update(min(rows, stop - first))
            gathered, _ = self.sharding.gather(torch.stack(local))
            yield part, gathered.transpose(0, 1).flatten()[: stop - start].cpu()  # [ranks, batches, rows] -> ids

    def _id_batches(self, parts: list[int]) -> Iterator[Tensor]:
        """This rank's B of each B x ranks ids of a part; its last id is the padding."""
        rows = self.batch_size * self.sharding.size
        mine = self.sharding.rank * self.batch_size + torch.arange(self.batch_size)
        for start, stop in map(self.writer.range_of, parts):
            for first in range(start, stop, rows):
                yield (first + mine).clamp(max=stop - 1)

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


def main() -> None:
    argv = arguments("titan_attent.score")
    try:
        job_config = scoring_config(parse(argv))
        datasets = DataSets()
        spec = attent_spec(job_config.model.name, datasets)
        check_scoring(job_config, spec, world_size=int(os.environ["WORLD_SIZE"]), datasets=datasets)
    except ValueError as error:
        preflight.fail(error)
    register_train_spec(job_config.model.name, spec)
    init_logger()
    scorer = ReferenceScorer(job_config)
    scorer.train()
    scorer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
