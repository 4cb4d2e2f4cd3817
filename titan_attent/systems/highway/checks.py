"""What Highway backpropagation refuses before the run, each with what is wrong, where, and how to mend it."""

from typing import Any

from titan_attent.foundations.sharding import num_shards
from titan_attent.systems.highway.config import BackwardConfig

SCHEDULES = ("1F1B", "GPipe")
"""One stage a rank, and no split backward of their own."""

MODELS = ("llama3", "qwen3", "llama4", "deepseek_v3", "gpt_oss")
"""Their blocks are h + attention + feed-forward or experts, in one hidden state."""


def check_run(config: BackwardConfig, job_config: Any) -> None:
    """Refuse what cannot run block by block in one process, or was never compared with backpropagation."""
    parallelism, where = job_config.parallelism, '[backward] method = "highway"'
    name = job_config.model.name.removesuffix("_attent")
    if name not in MODELS:
        raise ValueError(
            f"{where} with [model] name = {job_config.model.name!r}: it is known to be exact for {', '.join(MODELS)} "
            'only. Choose one of these, or method = "exact"'
        )
    if (degree := parallelism.pipeline_parallel_degree) > 1:
        raise ValueError(
            f'{where} with cut = "{config.cut}" and pipeline_parallel_degree = {degree}: no rank has all blocks. Set '
            'cut = "stage", or the degree to 1'
        )
    if (mode := job_config.activation_checkpoint.mode) != "none":
        raise ValueError(
            f'{where} with [activation_checkpoint] mode = "{mode}": each pass over a block would compute its forward '
            'again. Set the mode to "none"'
        )
    _check_backwards(job_config)


def check_stages(job_config: Any) -> None:
    """The same of the form between pipeline stages."""
    parallelism, where = job_config.parallelism, '[backward] cut = "stage"'
    if parallelism.pipeline_parallel_degree == 1:
        raise ValueError(f'{where} with pipeline_parallel_degree = 1: there is no stage. Set cut = "block" or "branch"')
    if (name := parallelism.pipeline_parallel_schedule) not in SCHEDULES:
        raise ValueError(
            f'{where} with pipeline_parallel_schedule = "{name}": it wants one stage a rank. Use one of '
            f"{', '.join(SCHEDULES)}, which it then replaces"
        )
    if job_config.compile.enable and "model" in job_config.compile.components:
        raise ValueError(
            f"{where} with compile.enable = true: a compiled stage does not tell input from weight gradients. Take "
            '"model" out of compile.components'
        )
    _check_backwards(job_config)


def _check_backwards(job_config: Any) -> None:
    """What wants a single backward of a microbatch."""
    parallelism, where = job_config.parallelism, '[backward] method = "highway"'
    if (degree := parallelism.data_parallel_replicate_degree) > 1 and num_shards(parallelism) == 1:
        raise ValueError(
            f"{where} with data_parallel_replicate_degree = {degree} without sharding, which is DDP: it reduces "
            "gradients in one backward, and here are several. Set data_parallel_shard_degree above 1, or that one to 1"
        )
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            f"{where} with [optimizer] early_step_in_backward = true: the gradients come in several backwards. Set it "
            "to false"
        )


def rounds(config: BackwardConfig, num_blocks: int) -> int:
    """``iterations`` for this model; ValueError where it has fewer blocks."""
    if config.iterations > num_blocks:
        raise ValueError(
            f"[backward] iterations = {config.iterations} with a model of {num_blocks} blocks: from {num_blocks} on "
            "gradients are exact. Set it lower, or to -1 for as many as there are"
        )
    return num_blocks if config.iterations == -1 else config.iterations
