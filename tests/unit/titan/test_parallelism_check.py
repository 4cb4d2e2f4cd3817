"""Every combination that is refused, with its message; that what is granted trains is shown in tests/distributed."""

from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torchtitan.config import ConfigManager, JobConfig

from titan_attent.job_config import JobConfig as OurSections
from titan_attent.titan.checks.parallelism import check_parallelism
from titan_attent.titan.settings import settings_of, systems_of


def config_of(**values: Any) -> JobConfig:
    """``section__key=value``; a bare name is a degree of [parallelism]."""
    config = ConfigManager._merge_configs(JobConfig, OurSections)()
    config.model.name = "llama3_attent"
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section or "parallelism"), name if section else f"{name}_degree", value)
    return config


def check(config: Any, *, world_size: int) -> int:
    """As preflight.check_run does: torchtitan's own, then those of the systems."""
    degree = check_parallelism(config, world_size=world_size)
    settings = settings_of(config, world_size=world_size)
    for system, section in systems_of(config):
        system.check(section, settings)
    return degree


GRANTED: list[tuple[int, int, dict[str, Any]]] = [
    (1, 1, {}),
    (8, 8, {}),
    (8, 8, {"data_parallel_replicate": 2}),
    (2, 2, {"data_parallel_replicate": 2, "data_parallel_shard": 1}),
    (8, 4, {"tensor_parallel": 2}),
    (8, 1, {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2}),
    (8, 2, {"data_parallel_replicate": 2, "context_parallel": 4}),
    (8, 8, {"model__name": "llama4_attent", "expert_parallel": 4}),
    (8, 4, {"model__name": "llama4_attent", "expert_parallel": 4, "tensor_parallel": 2, "expert_tensor_parallel": 2}),
    (2, 1, {"pipeline_parallel": 2, "parallelism__pipeline_parallel_schedule": "ZBVZeroBubble"}),
]


@pytest.mark.parametrize(("world_size", "dp_degree", "values"), GRANTED)
def test_granted(world_size: int, dp_degree: int, values: dict[str, Any]) -> None:
    assert check(config_of(**values), world_size=world_size) == dp_degree


ZBV = {"pipeline_parallel": 2, "parallelism__pipeline_parallel_schedule": "ZBVZeroBubble"}
REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "no degree": (2, {"tensor_parallel": 0}, "tensor_parallel_degree = 0: it must be at least 1"),
    "no shard degree": (2, {"data_parallel_shard": 0}, "data_parallel_shard_degree = 0: it must be at least 1"),
    "processes": (4, {"tensor_parallel": 3}, "tensor_parallel_degree 3 .* the number of processes, 4"),
    "too few": (4, {"data_parallel_shard": 2}, "data_parallel_shard_degree 2 .* the number of processes, 4"),
    "DDP and TP": (
        4,
        {"data_parallel_replicate": 2, "data_parallel_shard": 1, "tensor_parallel": 2},
        "is DDP, .* Set data_parallel_shard_degree above 1",
    ),
    "sequence": (4, {"context_parallel": 4, "training__seq_len": 100}, "seq_len = 100 must be a multiple of .* = 8"),
    "no accelerator": (2, {"training__enable_cpu_offload": True}, "there is no accelerator to offload from"),
    "loss in chunks": (
        2,
        {"tensor_parallel": 2, "teacher__loss_chunks": 4, "teacher__strategy": "hard"},
        "loss_chunks = 4 with tensor_parallel_degree = 2, which already shards .* Set loss_chunks to 1, or ",
    ),
    "experts and TP": (
        4,
        {"tensor_parallel": 2, "expert_parallel": 2},
        "loses gradients below the experts .*#2387.* Set expert_tensor_parallel_degree = 2",
    ),
    "ETP alone": (2, {"expert_parallel": 2, "expert_tensor_parallel": 2}, "must be 1 or tensor_parallel_degree, 1"),
    "experts": (4, {"expert_parallel": 3}, "expert_parallel_degree = 3 must divide data_parallel_shard_degree x"),
    "no such schedule": (2, ZBV | {"parallelism__pipeline_parallel_schedule": "1F2B"}, '"1F2B" is unknown'),
    "microbatch": (
        2,
        {"pipeline_parallel": 2, "parallelism__pipeline_parallel_microbatch_size": 3},
        "microbatch_size = 3 must divide training.local_batch_size = 8",
    ),
    "DualPipeV": (2, ZBV | {"parallelism__pipeline_parallel_schedule": "DualPipeV"}, "streams of an accelerator"),
    "ZBV and validation": (2, ZBV | {"validation__enable": True}, "cannot run this schedule without a backward"),
    "ZBV and scoring": (
        2,
        ZBV | {"teacher__strategy": "hard", "teacher__scoring": "forward"},
        "torch cannot run this schedule without one",
    ),
    "shape of validation": (
        2,
        {"pipeline_parallel": 2, "validation__enable": True, "validation__local_batch_size": 4},
        r"\[validation\] local_batch_size = 4 differs from training.local_batch_size = 8",
    ),
    "length of validation": (
        2,
        {"pipeline_parallel": 2, "validation__enable": True, "validation__seq_len": 64},
        r"\[validation\] seq_len = 64 differs from training.seq_len = 2048",
    ),
    "shape of scoring": (
        2,
        {
            "pipeline_parallel": 2,
            "teacher__strategy": "hard",
            "teacher__scoring": "forward",
            "teacher__scoring_batch_size": 4,
        },
        r"\[teacher\] scoring_batch_size = 4 differs from training.local_batch_size = 8",
    ),
    "qwen3 and PP": (2, {"model__name": "qwen3_attent", "pipeline_parallel": 2}, "no pipeline for qwen3"),
    "gpt_oss and PP": (2, {"model__name": "gpt_oss_attent", "pipeline_parallel": 2}, "no pipeline for gpt_oss"),
    "gpt_oss and CP": (2, {"model__name": "gpt_oss_attent", "context_parallel": 2}, "cannot shard gpt_oss's"),
    "gpt_oss and TP": (2, {"model__name": "gpt_oss_attent", "tensor_parallel": 2}, "cannot clip their gradients"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    world_size, values, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^(?=\[).*{message}"):
        check(config_of(**values), world_size=world_size)
