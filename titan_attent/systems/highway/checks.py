"""Checks of Highway backpropagation before the run. Each error says what is wrong, where, and how to fix it."""

from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.systems.settings import RunSettings

SCHEDULES = ("1F1B", "GPipe")
"""Supported pipeline schedules: those with one stage per rank that do not split the backward themselves."""


def check_run(config: HighwayConfig, settings: RunSettings) -> None:
    """Refuse settings with which blocks cannot run one by one, or that were never compared with backpropagation."""
    where = '[highway] method = "highway"'
    if (degree := settings.degrees.pipeline) > 1:
        raise ValueError(
            f'{where} with cut = "{config.cut}" and pipeline_parallel_degree = {degree}: no rank has all blocks. Set '
            'cut = "stage", or pipeline_parallel_degree = 1'
        )
    if (mode := settings.activation_checkpointing) != "none":
        raise ValueError(
            f'{where} with [activation_checkpoint] mode = "{mode}": each pass over a block would recompute its '
            'forward. Set the mode to "none"'
        )
    _check_backwards(settings)


def check_stages(settings: RunSettings) -> None:
    """The same checks for ``cut = "stage"``."""
    where = '[highway] cut = "stage"'
    if settings.degrees.pipeline == 1:
        raise ValueError(
            f'{where} with pipeline_parallel_degree = 1: there are no stages to cut between. Set cut = "block" or '
            '"branch"'
        )
    if (name := settings.pipeline_schedule) not in SCHEDULES:
        raise ValueError(
            f'{where} with pipeline_parallel_schedule = "{name}": it needs one stage per rank. Use one of '
            f"{', '.join(SCHEDULES)}, which Highway backpropagation then replaces"
        )
    if settings.compiles_model:
        raise ValueError(
            f"{where} with compile.enable = true: a compiled stage computes input and weight gradients together. "
            'Remove "model" from compile.components'
        )
    _check_backwards(settings)


def _check_backwards(settings: RunSettings) -> None:
    """Refuse settings that need a single backward per microbatch."""
    where = '[highway] method = "highway"'
    if settings.degrees.is_ddp:
        raise ValueError(
            f"{where} with data_parallel_replicate_degree = {settings.degrees.replicate} without sharding, which is "
            "DDP: it reduces gradients in one backward per microbatch, but Highway backpropagation runs several. Set "
            "data_parallel_shard_degree above 1, or data_parallel_replicate_degree = 1"
        )
    if settings.steps_in_backward:
        raise ValueError(
            f"{where} with [optimizer] early_step_in_backward = true: the gradients are computed in several backwards "
            "per microbatch. Set it to false"
        )


def rounds(config: HighwayConfig, num_blocks: int) -> int:
    """The number of rounds that ``iterations`` means for a model; ValueError if it exceeds the number of blocks."""
    if config.iterations > num_blocks:
        raise ValueError(
            f"[highway] iterations = {config.iterations} with a model of {num_blocks} blocks: gradients are already "
            f"exact with {num_blocks} rounds. Set it to at most {num_blocks}, or to -1 for exact gradients"
        )
    return num_blocks if config.iterations == -1 else config.iterations
