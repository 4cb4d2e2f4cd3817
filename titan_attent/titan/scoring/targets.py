"""``python -m titan_attent.score targets``: a source's targets of every token of ``[data] path`` (scores/targets.py).

``checkpoint.initial_load_path`` is a step folder that torchtitan wrote (DCP), of the model and flavor in ``[model]``:
the source. Its targets go to the folder ``--output``/step-N, where ``[distillation] targets`` finds them. A killed
command resumes when the same one runs again, on any number of ranks.

Cost: a forward pass over the data, the draws (losses/target_draws.py), and 4 N bytes per token written in place by the
rank that computed them; per chunk of 64 batches a collective of 8 bytes and one small file.
"""

import argparse
import hashlib
import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from titan_attent.data.io.reader import ReadBatch
from titan_attent.data.text.document_examples import DOCUMENT
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.checks import check_number, check_one_of
from titan_attent.foundations.sharding import ExampleSharding, is_first_rank
from titan_attent.losses.divergence import largest_id
from titan_attent.losses.target_draws import draw_targets, top_targets
from titan_attent.scores.targets import ARGMAX, KINDS, TOP_K, TargetFacts, TargetsWriter, tokenizer_facts
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.launch import parse, spec_of
from titan_attent.titan.loader import TeachingLoader
from titan_attent.titan.models.families import family_of
from titan_attent.titan.scoring.checkpoint import run_command
from titan_attent.titan.scoring.checkpoint_checks import check_scored_run, check_weights, scoring_config
from titan_attent.titan.scoring.write_losses import ScoringChunks, fail_on_mistake, progress_bar
from titan_attent.titan.user_errors import fail, on_all_ranks, on_first_rank


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own options; all other arguments are the run's configuration."""

    output: str
    kind: str
    num: int
    temperature: float
    seed: int


class TargetsCommand(Trainer):
    """Builds the source as torchtitan does and writes its targets instead of training.

    ``job_config`` comes from :func:`scoring_config`.
    """

    def __init__(self, job_config: JobConfig, options: Options):
        super().__init__(job_config)
        loader = cast(TeachingLoader, self.dataloader)
        self.dataset, self.reader, self.pin_memory = loader.dataset, loader.reader, loader.pin_memory
        self.options, self.checkpoint_path = options, job_config.checkpoint.initial_load_path
        self.writer = writer_of(job_config, self.dataset, options)

    @record
    def train(self) -> None:
        """Load the source, write the targets of the examples that have none, and finish. A collective, on all ranks."""
        weights = self.checkpointer.states[MODEL].state_dict()
        with fail_on_mistake():
            check_weights(weights, self.checkpoint_path)
            prepared = self.writer.prepared()
            start = on_first_rank(prepared.__enter__)
        try:
            self.checkpointer.dcp_load(weights, checkpoint_id=self.checkpoint_path, from_hf=False, from_quantized=False)
            with torch.no_grad():
                self._write_from(start)
        finally:
            if is_first_rank():
                prepared.__exit__(None, None, None)
        logger.info(f"{self.writer.path}: targets of {len(self.dataset):,} examples")

    def _write_from(self, start: int) -> None:
        sharding = ExampleSharding(len(self.dataset), mesh=self.parallel_dims.get_optional_mesh("batch"))
        chunks = ScoringChunks(
            start=start,
            num_examples=len(self.dataset),
            batch_size=self.job_config.validation.local_batch_size,
            num_ranks=sharding.size,
        )
        numbers, ids = count(1), list(chunks.ids(sharding.rank))
        batches = zip(ids, self.reader.read(self.dataset.read, ids, pin_memory=self.pin_memory), strict=True)
        (model,) = self.model_parts
        model.eval()
        with progress_bar(len(self.dataset), start=start, unit=" examples") as bar:
            for first, stop in chunks.ranges():
                targets = []
                for at in range(first, stop, chunks.rows):
                    self.gc_handler.run(next(numbers))
                    examples, batch = next(batches)
                    targets.append((at + sharding.rank * chunks.batch_size, self._targets(model, examples, batch)))
                    bar.update(min(chunks.rows, stop - at))
                with fail_on_mistake():
                    on_all_ranks(lambda targets=targets, stop=stop: self._write(targets, stop))  # type: ignore[misc]
                    on_first_rank(lambda stop=stop: self.writer.durable(stop))  # type: ignore[misc]

    def _write(self, targets: list[tuple[int, tuple[Tensor, Tensor | None]]], stop: int) -> None:
        """Write this rank's rows of a chunk, without those that pad its last batch."""
        for first, (ids, probabilities) in targets:
            num = max(0, min(len(ids), stop - first))
            if num:
                self.writer.write(first, ids[:num], None if probabilities is None else probabilities[:num])

    def _targets(self, model: torch.nn.Module, examples: Tensor, batch: ReadBatch) -> tuple[Tensor, Tensor | None]:
        """Ids [B, L, N], and for top_k probabilities, on the CPU."""
        input_dict = {name: tensor.to(self.device) for name, tensor in batch[0].items()}
        prepared: Any = self.post_dataloading_process(input_dict, batch[1].to(self.device))
        inputs, _, extra_inputs, extra_kwargs = prepared
        with self.train_context(), self.maybe_enable_amp:
            logits = model(inputs, **extra_inputs, **extra_kwargs)
        options, shape = self.options, (*inputs.shape, self.options.num)
        if options.kind == ARGMAX:
            return largest_id(logits).int().cpu(), None
        flat = logits.flatten(0, 1)
        if options.kind == TOP_K:
            ids, probabilities = top_targets(flat, num=options.num, temperature=options.temperature)
            return ids.view(shape).cpu(), probabilities.view(shape).cpu()
        places = torch.arange(inputs.shape[1], device=self.device)
        tokens = examples.to(self.device)[:, None] * inputs.shape[1] + places
        ids = draw_targets(flat, tokens.flatten(), num=options.num, temperature=options.temperature, seed=options.seed)
        return ids.view(shape).cpu(), None


def writer_of(job_config: JobConfig, dataset: Any, options: Options) -> TargetsWriter:
    """The writer of the targets; a ValueError if the folder belongs to others."""
    path = Path(job_config.checkpoint.initial_load_path).resolve()
    facts = TargetFacts(
        **dataset.scored._asdict(),
        tokenizer=tokenizer_facts(dataset.shards.tokenizer_info),
        model=f"{job_config.model.name} {job_config.model.flavor}",
        precision=job_config.training.mixed_precision_param,
        checkpoint=str(path),
        checkpoint_sha256=hashlib.sha256((path / ".metadata").read_bytes()).hexdigest(),
        kind=options.kind,
        num=options.num,
        temperature=options.temperature,
        seed=options.seed,
    )
    return TargetsWriter(Path(options.output) / path.name, facts=facts)


def check_text(job_config: JobConfig, dataset: Any) -> None:
    """Refuse data whose examples are not windows of tokens; ValueError."""
    if job_config.data.unit == DOCUMENT:
        raise ValueError(
            f'[data] unit = "{DOCUMENT}" with targets on disk: they are kept by windows of tokens. Use the source '
            'itself ([distillation] source), or unit = "window"'
        )
    if not isinstance(dataset, TokenDataset):
        raise ValueError(f"titan_attent.score targets needs tokens, not {family_of(job_config).name}'s examples")


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    """The command's own options, and all other arguments; ValueError for a missing or unknown value."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m titan_attent.score targets",
        description="Write a few target ids per token of a source, for [distillation] targets. The same command "
        "resumes a killed one. All other options are those of titan_attent.train; checkpoint.initial_load_path names "
        "the source's weights, [model] its family and flavor.",
        allow_abbrev=False,
        add_help="--help" in argv or "-h" in argv,
        exit_on_error=False,
    )
    parser.add_argument("--output", default="", metavar="DIR", help="folder to write; the targets go to DIR/step-N")
    parser.add_argument(
        "--kind", default="draws", help="draws (unbiased), top_k (the largest probabilities alone: biased) or argmax"
    )
    parser.add_argument("--num", type=int, default=32, metavar="N", help="ids per token; not read for argmax")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides the source's logits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    try:
        parsed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    if not parsed.output:
        raise ValueError("--output is missing: name the folder to write the targets to")
    check_one_of("--kind", parsed.kind, KINDS, section="score targets")
    check_number("--num", parsed.num, at_least=1, whole=True, section="score targets")
    check_number("--temperature", parsed.temperature, above=0, section="score targets")
    if parsed.kind == ARGMAX:
        parsed.num, parsed.temperature, parsed.seed = 1, 0.0, 0
    elif parsed.kind == TOP_K:
        parsed.seed = 0
    return Options(**vars(parsed)), rest


def main(argv: list[str]) -> None:
    """Run the command."""
    try:
        options, rest = parse_options(argv)
        job_config = scoring_config(parse(rest))
        datasets = DataSets()
        spec = spec_of(job_config, datasets)
        world_size = int(os.environ["WORLD_SIZE"])
        dataset = check_scored_run(job_config, spec, world_size=world_size, datasets=datasets)
        check_text(job_config, dataset)
        vocab_size = cast(Any, spec.model_args[job_config.model.flavor]).vocab_size
        if options.num > vocab_size:
            raise ValueError(f"--num {options.num}: the source has {vocab_size} ids; lower it")
        writer_of(job_config, dataset, options)
    except ValueError as error:
        fail(error)
    run_command(job_config, spec, datasets, lambda: TargetsCommand(job_config, options))
