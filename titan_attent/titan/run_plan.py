"""The plan of a run, from its configuration alone: tokens, passes, what each system does, memory and files.

It is computed in one process for any number of processes, by the functions that the run itself uses, except the
activations, which are an estimate (:func:`activation_bytes`).

Cost: the model on torch's meta device, without memory; what the plans of the systems cost.
"""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.words import counted
from titan_attent.systems.system import DataFacts, Planned, PlannedFrozen
from titan_attent.titan.checkpoint_metadata import read_metadata, read_value
from titan_attent.titan.checks.load_sources import folder_of, source_of
from titan_attent.titan.frozen_model import check_frozen
from titan_attent.titan.mixtures import lines_of_mixture
from titan_attent.titan.settings import systems_of

BYTES_PER_LAYER = 17
"""Numbers that a transformer layer keeps per token and unit of width for its backward, with fused attention: 34 bytes
in 16 bits (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4)."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        world_size: number of processes.
        num_parameters: of the whole model.
        first_step: the step after which it starts; above 0 on a resume.
        start: what it starts from, in words.
        steps, batch_size, tokens_per_row: training steps of the whole run, rows per step, tokens per row.
        passes: passes over the data in all steps.
        systems: name of each system that is on -> its plan.
        memory: (part, bytes per process, how it was computed).
        checkpoints: steps after which a checkpoint is saved.
        checkpoint_bytes: size of one that can be resumed.
        num_kept: checkpoints on the disk at a time, at most.
        files: what is written into the dump folder.
    """

    world_size: int
    num_parameters: int
    first_step: int
    start: str
    steps: int
    batch_size: int
    tokens_per_row: int
    passes: float
    systems: dict[str, Planned]
    memory: list[tuple[str, int, str]]
    checkpoints: list[int]
    checkpoint_bytes: int
    num_kept: int
    files: list[str]


def plan_of(job_config: JobConfig, spec: TrainSpec, facts: DataFacts, *, world_size: int) -> RunPlan:
    """The plan of a run that has passed preflight.check_run, which returned ``facts``."""
    dataset, settings = facts.dataset, facts.settings
    degrees = settings.degrees
    num_ranks = degrees.replicate * degrees.shard
    model, args = _model(job_config, spec)
    num_parameters = int(args.get_nparams_and_flops(model, job_config.training.seq_len)[0])
    systems: dict[str, Planned] = {}
    for system, config in systems_of(job_config):
        planned, known = system.plan(config, facts, num_ranks=num_ranks), systems.get(system.name, Planned())
        systems[system.name] = Planned(
            known.lines + planned.lines,
            known.bytes_per_rank + planned.bytes_per_rank,
            known.files + planned.files,
            known.memory + planned.memory,
            planned.frozen or known.frozen,
        )
    memory = list(_memory(job_config, facts, model, args, num_parameters))
    memory += [(name, each.bytes_per_rank, "state") for name, each in systems.items() if each.bytes_per_rank]
    for each in systems.values():
        memory += each.memory
        if each.frozen is not None:
            memory += _frozen_memory(job_config, facts, each.frozen)
    first_step, start = _start(job_config)
    checkpoints = _checkpoints(job_config, first_step)
    keep = job_config.checkpoint.keep_latest_k
    state = sum(each.bytes_per_rank for each in systems.values()) * num_ranks
    return RunPlan(
        world_size=world_size,
        num_parameters=num_parameters,
        first_step=first_step,
        start=start,
        steps=settings.steps,
        batch_size=facts.batch_size,
        tokens_per_row=dataset.tokens_per_example,
        passes=settings.steps * facts.batch_size / dataset.num_rows,
        systems=systems,
        memory=memory,
        checkpoints=checkpoints,
        checkpoint_bytes=3 * num_parameters * _size_of(job_config.training.dtype) + state,
        num_kept=min(len(checkpoints), keep) if keep else len(checkpoints),
        files=_files(job_config, systems),
    )


def _model(job_config: JobConfig, spec: TrainSpec) -> tuple[nn.Module, Any]:
    args: Any = copy.deepcopy(spec.model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    with torch.device("meta"):
        return spec.model_cls(args), args


def _size_of(dtype: str) -> int:
    return TORCH_DTYPE_MAP[dtype].itemsize


def _memory(
    job_config: JobConfig, facts: DataFacts, model: nn.Module, args: Any, num_parameters: int
) -> Iterator[tuple[str, int, str]]:
    """(part, bytes per process, how) of the model and its step; of the largest process where they differ."""
    degrees, training = facts.settings.degrees, job_config.training
    shards = degrees.shard * degrees.context * degrees.tensor * degrees.pipeline
    local, size = -(-num_parameters // shards), _size_of(training.dtype)
    sharded = f"{training.dtype}, sharded over {shards}" if shards > 1 else training.dtype
    yield "weights", local * size, sharded
    yield "gradients", local * size, sharded
    yield "optimizer", 2 * local * size, f"two moments, {sharded}"
    computed = _size_of(training.mixed_precision_param)
    if degrees.shard * degrees.context > 1:
        largest = _largest_block(model) // degrees.tensor
        yield "gathered", 3 * largest * computed, "two blocks' weights and one's gradients, at most"
    yield "activations", activation_bytes(job_config, facts, args), f"estimate, in {training.mixed_precision_param}"


def _frozen_memory(job_config: JobConfig, facts: DataFacts, frozen: PlannedFrozen) -> Iterator[tuple[str, int, str]]:
    """(part, bytes per process, how) of a frozen second model (frozen_model.py); under a pipeline, of the last stage.

    Its forward pass keeps nothing but the logits, which live until the loss has its gradient; one layer at a time has
    as many activations as a layer of the learner, which keeps them.
    """
    config, spec = check_frozen(job_config, frozen.checkpoint, family=frozen.family, flavor=frozen.flavor)
    model, args = _model(config, spec)
    degrees, training = facts.settings.degrees, config.training
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    shards = degrees.shard * degrees.context * degrees.tensor
    sharded = f"{training.dtype}, sharded over {shards}" if shards > 1 else training.dtype
    where = f"{sharded}; on the last stage" if degrees.pipeline > 1 else sharded
    yield "source", -(-num_parameters // shards) * _size_of(training.dtype), f"weights, {where}"
    computed = _size_of(training.mixed_precision_param)
    if degrees.shard * degrees.context > 1:
        yield (
            "its blocks",
            2 * _largest_block(model) // degrees.tensor * computed,
            "two blocks' weights, gathered, at most",
        )
    rows = training.local_batch_size
    if degrees.pipeline > 1:
        rows = min(rows, config.parallelism.pipeline_parallel_microbatch_size)
    tokens = rows * facts.dataset.tokens_per_example // degrees.context
    numbers = tokens * (BYTES_PER_LAYER * int(getattr(args, "dim", 0)) + int(getattr(args, "vocab_size", 0)))
    yield (
        "its pass",
        numbers * computed // degrees.tensor,
        f"logits of a microbatch and one layer, estimate, in {training.mixed_precision_param}",
    )


def _largest_block(model: nn.Module) -> int:
    """Parameters of the largest group that FSDP2 gathers at once."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(model)]
    return max([sum(p.numel() for p in model.parameters()) - sum(blocks), *blocks])


def _blocks(model: nn.Module) -> list[nn.Module]:
    layers: Any = getattr(model, "layers", None)
    return list(layers.values()) if isinstance(layers, nn.ModuleDict) else list(layers or ())


def activation_bytes(job_config: JobConfig, facts: DataFacts, args: Any) -> int:
    """An estimate of the activations of one process, in bytes, of a dense transformer with fused attention.

    Per layer and token 17 numbers per unit of width; with full activation checkpointing one, and 17 in one layer. Other
    modes of checkpointing lie between; without checkpointing is what they take at most. Besides, the logits: in
    training.mixed_precision_param, in float32, and their gradients. torch.compile may keep less.
    """
    training, parallelism, degrees = job_config.training, job_config.parallelism, facts.settings.degrees
    size = _size_of(training.mixed_precision_param)
    rows = training.local_batch_size
    if degrees.pipeline > 1:  # the first stage holds as many microbatches as there are stages
        micro = parallelism.pipeline_parallel_microbatch_size
        rows = min(rows, degrees.pipeline * micro)
    tokens = rows * facts.dataset.tokens_per_example // degrees.context
    layers = -(-int(getattr(args, "n_layers", 0)) // degrees.pipeline)
    width = int(getattr(args, "dim", 0))
    numbers = layers * BYTES_PER_LAYER
    if job_config.activation_checkpoint.mode == "full":
        numbers = layers + BYTES_PER_LAYER
    logits = int(getattr(args, "vocab_size", 0)) * tokens * (size + 4 + 4)
    return (numbers * width * tokens * size + logits) // degrees.tensor


def _start(job_config: JobConfig) -> tuple[int, str]:
    source = source_of(job_config)
    if source is None:
        return 0, "random weights"
    if not source.is_full or "train_state" in job_config.checkpoint.exclude_from_loading:
        return 0, f"the weights of {source.path}"
    step = read_value(source.path, read_metadata(source.path), "train_state.step", int)
    return step, f"{source.path}, at step {step:,}"


def _checkpoints(job_config: JobConfig, first_step: int) -> list[int]:
    """The steps after which torchtitan saves: CheckpointManager._should_save."""
    config, last = job_config.checkpoint, job_config.training.steps
    if not config.enable or config.load_only:
        return []
    steps = {step for step in range(first_step + 1, last + 1) if step % config.interval == 0 or step == last}
    if config.enable_first_step_checkpoint and first_step == 0:
        steps.add(1)
    return sorted(steps)


def _files(job_config: JobConfig, systems: dict[str, Planned]) -> list[str]:
    files = ["run.lock", "teacher/data.json"]
    files += [f"{job_config.metrics.save_tb_folder}/"] if job_config.metrics.enable_tensorboard else []
    files += [f"{job_config.profiling.save_traces_folder}/"] if job_config.profiling.enable_profiling else []
    return files + [file for each in systems.values() for file in each.files]


def lines_of(plan: RunPlan, job_config: JobConfig, facts: DataFacts) -> Iterator[str]:
    """The plan as lines of text."""
    dataset, remaining = facts.dataset, plan.steps - plan.first_step
    yield f"Plan for {counted(plan.world_size, 'process', 'processes')}. Nothing is trained or written"
    yield f"model       {job_config.model.name} {job_config.model.flavor}: {plan.num_parameters:,} parameters"
    yield f"start       {plan.start}"
    per_step = plan.batch_size * plan.tokens_per_row
    num_tokens = dataset.num_rows * plan.tokens_per_row
    if isinstance(dataset, DocumentDataset):
        num_tokens = dataset.num_pairs  # their last row is not full
    yield f"data        {job_config.data.path}: {len(dataset):,} examples, {num_tokens:,} tokens"
    yield (
        f"steps       {plan.steps:,} of {plan.batch_size:,} x {plan.tokens_per_row:,} = {per_step:,} tokens: "
        f"{plan.steps * per_step:,} tokens, {plan.passes:.2f} passes over the data"
    )
    if plan.first_step:
        yield f"            {remaining:,} steps remain, {remaining * per_step:,} tokens"
    mixed = list(lines_of_mixture(job_config, dataset, batch_size=plan.batch_size, steps=plan.steps))
    yield from (f"{'mixture' if i == 0 else '':11} {line}" for i, line in enumerate(mixed))
    if not mixed and not any(each.lines for each in plan.systems.values()):
        yield f"            each example is trained {plan.passes:.2f} times"
    for name, each in plan.systems.items():
        yield from (f"{name if i == 0 else '':11} {line}" for i, line in enumerate(each.lines))
    yield f"memory      per process, about {_gib(sum(size for _, size, _ in plan.memory))}, without the allocator's own"
    for name, size, how in plan.memory:
        yield f"            {name:12} {_gib(size):>11}  {how}"
    yield f"files       in {job_config.job.dump_folder}: {', '.join(plan.files)}"
    if plan.checkpoints:
        folder = folder_of(job_config)
        total, free = plan.num_kept * plan.checkpoint_bytes, _free(folder)
        yield (
            f"            {folder}/step-N: {len(plan.checkpoints):,} checkpoints, the last after step "
            f"{plan.checkpoints[-1]:,}; at most {plan.num_kept:,} kept, about {_gib(plan.checkpoint_bytes)} each, "
            f"{_gib(total)} in all; {_gib(free)} are free"
        )
        if job_config.checkpoint.last_save_model_only:
            yield "            The last holds weights only: the run cannot be extended from it"
        if total > free:
            yield "            The disk is too small for them: lower checkpoint.keep_latest_k, or free some space"


def _free(folder: Path) -> int:
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(nearest).free


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
