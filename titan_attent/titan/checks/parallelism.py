"""Refuses combinations of parallelisms that torchtitan 0.2.2 does not support or would train wrongly.

All checks read the configuration only. Combinations that docs/reference/status.md lists as tested are compared with
single-process training in tests/distributed/titan/test_parallelism.py.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part
from torchtitan.protocols import BaseModelArgs

from titan_attent.titan.models.families import family_of
from titan_attent.titan.models.family import Family
from titan_attent.titan.patches import compat


def check_parallelism(job_config: JobConfig, *, world_size: int) -> int:
    """Refuse degrees that contradict each other or that torchtitan cannot combine; return the data-parallel degree."""
    parallelism, training = job_config.parallelism, job_config.training
    degree = {
        name: getattr(parallelism, f"{name}_degree")
        for name in (
            *("data_parallel_replicate", "data_parallel_shard", "context_parallel", "tensor_parallel"),
            *("pipeline_parallel", "expert_parallel", "expert_tensor_parallel"),
        )
    }
    for name, value in degree.items():
        if value < 1 and (name, value) != ("data_parallel_shard", -1):
            raise ValueError(f"[parallelism] {name}_degree = {value}: it must be at least 1; 1 turns it off")
    replicate, shard = degree["data_parallel_replicate"], degree["data_parallel_shard"]
    cp, tp, pp = degree["context_parallel"], degree["tensor_parallel"], degree["pipeline_parallel"]
    if shard == -1:
        shard = max(1, world_size // (replicate * cp * tp * pp))
    if replicate * shard * cp * tp * pp != world_size:
        raise ValueError(
            f"[parallelism] data_parallel_replicate_degree {replicate} x data_parallel_shard_degree {shard} x "
            f"context_parallel_degree {cp} x tensor_parallel_degree {tp} x pipeline_parallel_degree {pp} must be "
            f"the number of processes, {world_size}: change one of the degrees or --nproc_per_node"
        )
    if replicate > 1 and shard * cp == 1 and tp * pp > 1:
        raise ValueError(
            f"[parallelism] data_parallel_replicate_degree = {replicate} without sharding is DDP, which torchtitan "
            "0.2.2 does not combine with tensor or pipeline parallelism. Set data_parallel_shard_degree above 1 (HSDP) "
            "or data_parallel_replicate_degree to 1 (FSDP2)"
        )
    seq_lens = {"training": training.seq_len}
    if job_config.validation.enable and tp * cp > 1:
        seq_lens["validation"] = job_config.validation.seq_len
    for section, seq_len in seq_lens.items():
        if seq_len % (tp * 2 * cp):
            raise ValueError(
                f"[{section}] seq_len = {seq_len} must be a multiple of tensor_parallel_degree x 2 x "
                f"context_parallel_degree = {tp} x 2 x {cp} = {tp * 2 * cp}: torchtitan splits it into that many chunks"
            )
    if training.enable_cpu_offload and compat.IS_CPU:
        raise ValueError(
            "[training] enable_cpu_offload = true: there is no accelerator to offload from. Set it to false"
        )
    ep, etp = degree["expert_parallel"], degree["expert_tensor_parallel"]
    _check_experts(ep, etp, shard=shard, cp=cp, tp=tp)
    if pp > 1:
        _check_pipeline(job_config)
    check_family(family_of(job_config), degree)
    return replicate * shard


def _check_experts(ep: int, etp: int, *, shard: int, cp: int, tp: int) -> None:
    if ep == 1 and etp in (1, tp):
        return
    if ep > 1 and tp > 1 and etp != tp:
        raise ValueError(
            f"[parallelism] expert_parallel_degree = {ep} with tensor_parallel_degree = {tp} and "
            f"expert_tensor_parallel_degree = {etp}: torchtitan 0.2.2 loses gradients below the experts then "
            f"(torchtitan #2387, #2416). Set expert_tensor_parallel_degree = {tp}"
        )
    if etp not in (1, tp):
        raise ValueError(
            f"[parallelism] expert_tensor_parallel_degree = {etp} must be 1 or tensor_parallel_degree, {tp}"
        )
    if shard * cp % ep or ep % cp:
        raise ValueError(
            f"[parallelism] expert_parallel_degree = {ep} must divide data_parallel_shard_degree x "
            f"context_parallel_degree = {shard} x {cp} and be a multiple of context_parallel_degree: experts are "
            "sharded over these ranks"
        )


def check_split(job_config: JobConfig, model_args: BaseModelArgs) -> None:
    """Refuse a tensor parallel degree that does not divide the heads, and more pipeline stages than layers."""
    config, flavor = job_config.parallelism, job_config.model.flavor
    for name in ("n_heads", "n_kv_heads"):
        heads = getattr(model_args, name, None)
        if heads and heads % config.tensor_parallel_degree:
            raise ValueError(
                f"[parallelism] tensor_parallel_degree = {config.tensor_parallel_degree} must divide {name} = {heads} "
                f"of flavor {flavor}: choose a divisor, or another flavor"
            )
    if config.pipeline_parallel_degree == 1 or config.module_fqns_per_model_part is not None:
        return
    weights = (config.pipeline_parallel_first_stage_less_layers, config.pipeline_parallel_last_stage_less_layers)
    num_layers = cast(Any, model_args).n_layers
    if (per_stage := config.pipeline_parallel_layers_per_stage) is None:
        is_single = issubclass(get_schedule_class(config.pipeline_parallel_schedule), PipelineScheduleSingle)
        num_stages = config.pipeline_parallel_degree * (1 if is_single else 2)
    else:
        num_stages = -(-(num_layers + sum(weights)) // max(1, per_stage))
    try:
        generate_llm_fqn_per_model_part(num_stages, num_layers, *weights)
    except ValueError as error:
        raise ValueError(
            f"[parallelism] pipeline_parallel_degree = {config.pipeline_parallel_degree} with the {num_layers} layers "
            f"of flavor {flavor}: {error}"
        ) from None


def check_family(family: Family, degree: Mapping[str, int]) -> None:
    """Refuse parallelisms that the model's family does not support; ValueError.

    Args:
        degree: name of a dimension, such as "tensor_parallel" -> its degree.
    """
    for dimension, reason in family.lacks.items():
        if degree.get(dimension, 1) > 1:
            raise ValueError(f"[parallelism] {dimension}_degree = {degree[dimension]}: {reason}")


def _check_pipeline(job_config: JobConfig) -> None:
    parallelism, training, validation = job_config.parallelism, job_config.training, job_config.validation
    name = parallelism.pipeline_parallel_schedule
    try:
        get_schedule_class(name)
    except ValueError as error:
        raise ValueError(f'[parallelism] pipeline_parallel_schedule = "{name}" is unknown: {error}') from None
    if name == "DualPipeV" and parallelism.pipeline_parallel_expert_parallel_overlap and compat.IS_CPU:
        raise ValueError(
            '[parallelism] pipeline_parallel_schedule = "DualPipeV" overlaps work on the streams of an accelerator, '
            "but this machine has none. Set pipeline_parallel_expert_parallel_overlap = false"
        )
    microbatch, batch = parallelism.pipeline_parallel_microbatch_size, training.local_batch_size
    if microbatch < 1 or batch % microbatch:
        raise ValueError(
            f"[parallelism] pipeline_parallel_microbatch_size = {microbatch} must divide training.local_batch_size = "
            f"{batch}: change one of the two"
        )
    if name in ("ZBVZeroBubble", "DualPipeV") and validation.enable:
        raise ValueError(
            f'[parallelism] pipeline_parallel_schedule = "{name}": torch cannot run this schedule without a backward, '
            'which validation needs. Set validation.enable = false, or use "Interleaved1F1B"'
        )
    shapes = {}  # the stages exchange tensors of one shape
    if validation.enable:
        shapes["[validation] local_batch_size"] = (validation.local_batch_size, batch, "training.local_batch_size")
        shapes["[validation] seq_len"] = (validation.seq_len, training.seq_len, "training.seq_len")
    for key, (value, expected, other) in shapes.items():
        if value != expected:
            raise ValueError(
                f"{key} = {value} differs from {other} = {expected}: pipeline stages exchange tensors of one shape. "
                "Make the two equal"
            )
