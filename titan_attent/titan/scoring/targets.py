"""``python -m titan_attent.score targets``: a source's targets of every token of ``[data] path`` (scores/targets.py).

``checkpoint.initial_load_path`` is a step folder that torchtitan wrote (DCP), of the model and flavor in ``[model]``:
the source. Its targets go to the folder ``--output``/step-N, where ``[distillation] targets`` finds them. A killed
command resumes when the same one runs again, on any number of ranks.

With ``data.unit = "document"`` the source reads each example of a document by itself: packed with a document mask
where the flavor has one and ``data.document_mask`` is set, else in a row of its own.

Cost: a forward pass over the data, the draws (losses/target_draws.py), and 4 N bytes per token written in place by the
rank that computed them; per chunk (write_targets.py) a collective of 8 bytes and one small file.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from titan_attent.data.text.document_examples import DocumentDataset, PairPlaces
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.checks import check_number, check_one_of
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.losses.divergence import largest_id
from titan_attent.losses.target_draws import draw_targets, top_targets
from titan_attent.scores.targets import ARGMAX, KINDS, TOP_K, TargetFacts, TargetsWriter, facts_of_data
from titan_attent.systems.distillation.checks import check_tokenizer_of_run
from titan_attent.systems.distillation.config import MIN_TEMPERATURE
from titan_attent.systems.distillation.sources import step_of
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.launch import parse, spec_of
from titan_attent.titan.models.families import family_of
from titan_attent.titan.scoring.checkpoint import ForwardScorer, run_command
from titan_attent.titan.scoring.checkpoint_checks import check_scored_run, check_weights, scoring_config
from titan_attent.titan.scoring.write_losses import fail_on_mistake, progress_bar
from titan_attent.titan.scoring.write_targets import Chunk, Part, document_chunks, window_chunks
from titan_attent.titan.user_errors import fail, on_all_ranks, on_first_rank


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own options; all other arguments are the run's configuration."""

    output: str
    kind: str
    num: int
    temperature: float
    seed: int


class TargetsCommand(ForwardScorer):
    """Builds the source as torchtitan does and writes its targets instead of training.

    ``job_config`` comes from :func:`scoring_config`.

    Args:
        num_ids: of the source.
    """

    def __init__(self, job_config: JobConfig, options: Options, *, num_ids: int):
        super().__init__(job_config)
        self.options, self.checkpoint_path = options, job_config.checkpoint.initial_load_path
        self.writer = writer_of(job_config, self.dataset, options, num_ids=num_ids)
        self.is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        """Whether every prediction of this rank so far could be drawn from."""

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

    def _chunks(self, start: int) -> Iterator[Chunk]:
        common: dict[str, Any] = {
            **{"start": start, "reader": self.reader, "sharding": self.sharding},
            **{"batch_size": self.batch_size, "pin_memory": self.pin_memory},
        }
        if self.forward_rows is None:
            return window_chunks(self.dataset, **common)
        self.dataset.share_table(self.forward_rows.add_up, rank=self.sharding.rank, num_ranks=self.sharding.size)
        return document_chunks(self.dataset, self.forward_rows, **common)

    def _write_from(self, start: int) -> None:
        numbers = count(1)
        (model,) = self.model_parts
        model.eval()
        with progress_bar(len(self.dataset), start=start, unit=" examples") as bar:
            for chunk in self._chunks(start):
                targets = []
                for part in chunk.parts:
                    self.gc_handler.run(next(numbers))
                    targets.append((part.places, *self._targets(model, part)))
                    bar.update(part.num_examples)
                with fail_on_mistake():
                    on_all_ranks(partial(self._write, targets))
                    on_first_rank(partial(self.writer.durable, chunk.stop, num_records=chunk.num_records))

    def _write(self, targets: list[tuple[PairPlaces, Tensor, Tensor | None]]) -> None:
        """Write this rank's targets of a chunk; ValueError if the source predicts NaN or infinity."""
        if not self.is_finite:
            raise ValueError(
                f"the source {self.checkpoint_path} predicts NaN or infinity, of which there are no targets: its "
                "weights are damaged, or overflow in training.mixed_precision_param. Give another checkpoint or "
                "precision"
            )
        for places, ids, probabilities in targets:
            self.writer.write(places, ids, probabilities)

    def _targets(self, model: torch.nn.Module, part: Part) -> tuple[Tensor, Tensor | None]:
        """Ids [B, L, N], and for top_k probabilities, on the CPU."""
        with self.predicted(model, *part.batch) as predicted:
            logits = predicted.pred
        slots = torch.from_numpy(part.places.slots(logits.shape[1]))
        # The largest logit is NaN where any is; -inf only excludes an id.
        self.is_finite &= logits.amax(dim=-1).flatten()[slots.to(logits.device)].isfinite().all()
        options, shape = self.options, (*logits.shape[:2], self.options.num)
        if options.kind == ARGMAX:
            return largest_id(logits).int().cpu(), None
        flat = logits.flatten(0, 1)
        if options.kind == TOP_K:
            ids, probabilities = top_targets(flat, num=options.num, temperature=options.temperature)
            return ids.view(shape).cpu(), probabilities.view(shape).cpu()
        tokens = torch.zeros(len(flat), dtype=torch.int64)
        tokens[slots] = torch.from_numpy(part.places.numbers())
        ids = draw_targets(
            flat, tokens.to(self.device), num=options.num, temperature=options.temperature, seed=options.seed
        )
        return ids.view(shape).cpu(), None


def writer_of(job_config: JobConfig, dataset: Any, options: Options, *, num_ids: int) -> TargetsWriter:
    """The writer of the targets; a ValueError if the folder belongs to others."""
    path = Path(job_config.checkpoint.initial_load_path).resolve()
    facts = TargetFacts(
        **facts_of_data(dataset),
        model=f"{job_config.model.name} {job_config.model.flavor}",
        precision=job_config.training.mixed_precision_param,
        checkpoint=str(path),
        checkpoint_sha256=hashlib.sha256((path / ".metadata").read_bytes()).hexdigest(),
        kind=options.kind,
        num=options.num,
        temperature=options.temperature,
        seed=options.seed,
        num_ids=num_ids,
    )
    return TargetsWriter(Path(options.output) / path.name, facts=facts)


def check_source(path: Path, dataset: Any) -> None:
    """Refuse a source whose targets no run would find, or whose run recorded another tokenizer; ValueError."""
    where = f"[checkpoint] initial_load_path = {path}"
    if step_of(path) is None:
        raise ValueError(
            f"{where}: its name is not step-N, by which [distillation] targets finds the targets of a checkpoint. "
            "Rename the folder, such as step-1"
        )
    check_tokenizer_of_run(path.parent.parent, dataset, where=where)


def check_text(job_config: JobConfig, dataset: Any) -> None:
    """Refuse data whose examples are not of tokens; ValueError."""
    if not isinstance(dataset, TokenDataset | DocumentDataset):
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
    parser.add_argument(
        "--ids", type=int, default=32, metavar="N", dest="num", help="ids per token; not read for argmax"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides the source's logits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    try:
        parsed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    if not parsed.output:
        raise ValueError("--output is missing: name the folder to write the targets to")
    check_one_of("--kind", parsed.kind, KINDS, section="score targets")
    check_number("--ids", parsed.num, at_least=1, whole=True, section="score targets")
    if parsed.kind == ARGMAX:
        parsed.num, parsed.temperature, parsed.seed = 1, 0.0, 0
        return Options(**vars(parsed)), rest
    if parsed.temperature == 0:
        raise ValueError(f"--temperature 0 with --kind {parsed.kind}: for the largest logit give --kind {ARGMAX}")
    check_number("--temperature", parsed.temperature, at_least=MIN_TEMPERATURE, section="score targets")
    if parsed.kind == TOP_K:
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
        check_source(Path(job_config.checkpoint.initial_load_path).resolve(), dataset)
        num_ids: int = cast(Any, spec.model_args[job_config.model.flavor]).vocab_size
        if options.num > num_ids:
            raise ValueError(f"--ids {options.num}: the source has {num_ids} ids; lower it")
        writer_of(job_config, dataset, options, num_ids=num_ids)
    except ValueError as error:
        fail(error)
    run_command(job_config, spec, datasets, lambda: TargetsCommand(job_config, options, num_ids=num_ids))
