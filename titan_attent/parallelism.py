"""Which parallelisms a run may combine: refusals of what torchtitan 0.2.2 cannot do, or would train wrongly.

All checks read the configuration only. What is granted here is compared with plain training in
tests/distributed/test_parallelism.py, or stands in the README's table as not tested.
"""

import titan_attent.compat

from torch.distributed.pipelining.schedules import get_schedule_class
from torchtitan.config import JobConfig


def check_parallelism(job_config: JobConfig, *, world_size: int) -> int:
    """Refuse degrees that do not fit together or that torchtitan cannot combine; returns the data-parallel one."""
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
            f"the number of processes, {world_size}: change one of them or --nproc_per_node"
        )
    if replicate > 1 and shard * cp == 1 and tp * pp > 1:
        raise ValueError(
            f"[parallelism] data_parallel_replicate_degree = {replicate} without sharding is DDP, which torchtitan "
            "0.2.2 does not combine with tensor or pipeline parallelism. Set data_parallel_shard_degree above 1 (HSDP) "
            "or data_parallel_replicate_degree to 1 (FSDP2)"
        )
    if training.seq_len % (tp * 2 * cp):
        raise ValueError(
            f"[training] seq_len = {training.seq_len} must be a multiple of tensor_parallel_degree x 2 x "
            f"context_parallel_degree = {tp} x 2 x {cp} = {tp * 2 * cp}: torchtitan cuts it so"
        )
    if training.enable_cpu_offload and titan_attent.compat.IS_CPU:
        raise ValueError(
            "[training] enable_cpu_offload = true: there is no accelerator to offload from. Set it to false"
        )
    teacher = getattr(job_config, "teacher", None)
    if cp > 1 and teacher is not None and teacher.weighting == "loss":
        raise ValueError(
            f'[teacher] weighting = "loss" with context_parallel_degree = {cp}: within the step a rank knows the loss '
            'of its part of an example only. Use weighting = "inverse_probability", or context_parallel_degree = 1'
        )
    if tp > 1 and not parallelism.disable_loss_parallel and teacher is not None and teacher.loss_chunks > 1:
        raise ValueError(
            f"[teacher] loss_chunks = {teacher.loss_chunks} with tensor_parallel_degree = {tp}, which cuts the logits "
            "along the vocabulary already. Set it to 1, or parallelism.disable_loss_parallel to true"
        )
    ep, etp = degree["expert_parallel"], degree["expert_tensor_parallel"]
    _check_experts(ep, etp, shard=shard, cp=cp, tp=tp)
    if pp > 1:
        _check_pipeline(job_config)
    _check_model(job_config.model.name, tp=tp, pp=pp, cp=cp)
    return replicate * shard


def _check_experts(ep: int, etp: int, *, shard: int, cp: int, tp: int) -> None:
    if ep == 1:
        return  # torchtitan does not read expert_tensor_parallel_degree then
    if tp > 1 and etp != tp:
        raise ValueError(
            f"[parallelism] expert_parallel_degree = {ep} with tensor_parallel_degree = {tp} and "
            f"expert_tensor_parallel_degree = {etp}: torchtitan 0.2.2 loses gradients below the experts there (its "
            f"threads #2387, #2416). Set expert_tensor_parallel_degree = {tp}"
        )
    if tp == 1 and etp != 1:
        raise ValueError(
            f"[parallelism] expert_tensor_parallel_degree = {etp} must be 1 or tensor_parallel_degree, {tp}"
        )
    if shard * cp % ep or ep % cp:
        raise ValueError(
            f"[parallelism] expert_parallel_degree = {ep} must divide data_parallel_shard_degree x "
            f"context_parallel_degree = {shard} x {cp} and be a multiple of the latter: experts are spread over these"
        )


def _check_model(name: str, *, tp: int, pp: int, cp: int) -> None:
    """What torchtitan 0.2.2 lacks for single models, before it fails half-way."""
    if pp > 1 and name in ("qwen3_attent", "gpt_oss_attent"):
        raise ValueError(
            f"[parallelism] pipeline_parallel_degree = {pp}: torchtitan 0.2.2 has no pipeline for "
            f"{name.removesuffix('_attent')}. Set it to 1"
        )
    if name == "gpt_oss_attent" and cp > 1:
        raise ValueError(
            f"[parallelism] context_parallel_degree = {cp}: torchtitan 0.2.2 cannot cut gpt_oss's flex attention. Set "
            "it to 1"
        )
    if name == "gpt_oss_attent" and tp > 1:
        raise ValueError(
            f"[parallelism] tensor_parallel_degree = {tp}: torchtitan 0.2.2 leaves parameters of gpt_oss off the mesh "
            "and then cannot clip its gradients. Set it to 1, and use data_parallel_shard_degree and "
            "expert_parallel_degree"
        )


def _check_pipeline(job_config: JobConfig) -> None:
    parallelism, training, validation = job_config.parallelism, job_config.training, job_config.validation
    name = parallelism.pipeline_parallel_schedule
    try:
        get_schedule_class(name)
    except ValueError as error:
        raise ValueError(f'[parallelism] pipeline_parallel_schedule = "{name}" is unknown: {error}') from None
    if name == "DualPipeV" and parallelism.pipeline_parallel_expert_parallel_overlap and titan_attent.compat.IS_CPU:
        raise ValueError(
            '[parallelism] pipeline_parallel_schedule = "DualPipeV" overlaps work on the streams of an accelerator, '
            "and there is none. Set pipeline_parallel_expert_parallel_overlap = false"
        )
    microbatch, batch = parallelism.pipeline_parallel_microbatch_size, training.local_batch_size
    if microbatch < 1 or batch % microbatch:
        raise ValueError(
            f"[parallelism] pipeline_parallel_microbatch_size = {microbatch} must divide training.local_batch_size = "
            f"{batch}: change one of the two"
        )
    # The stages send each other tensors of one shape.
    if name in ("ZBVZeroBubble", "DualPipeV") and (validation.enable or job_config.teacher.scoring != "train"):
        raise ValueError(
            f'[parallelism] pipeline_parallel_schedule = "{name}": torch cannot run it without a backward, as '
            'validation and scoring do. Set validation.enable = false and teacher.scoring = "train", or use '
            '"Interleaved1F1B"'
        )
    shapes = {}
    if validation.enable:
        shapes["[validation] local_batch_size"] = (validation.local_batch_size, batch, "training.local_batch_size")
        shapes["[validation] seq_len"] = (validation.seq_len, training.seq_len, "training.seq_len")
    if job_config.teacher.scoring != "train" and job_config.teacher.scoring_batch_size:
        scoring = job_config.teacher.scoring_batch_size
        shapes["[teacher] scoring_batch_size"] = (scoring, batch, "training.local_batch_size")
    for key, (value, expected, other) in shapes.items():
        if value != expected:
            raise ValueError(
                f"{key} = {value} differs from {other} = {expected}: pipeline stages exchange tensors of one shape. "
                "Make the two equal"
            )
