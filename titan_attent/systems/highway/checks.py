"""What Highway backpropagation refuses before the run, each with what is wrong, where, and how to mend it."""

from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.systems.settings import RunSettings

SCHEDULES = ("1F1B", "GPipe")
"""One stage a rank, and no split backward of their own."""


def check_run(config: HighwayConfig, settings: RunSettings) -> None:
    """Refuse what cannot run block by block in one process, or was never compared with backpropagation."""
    where = '[highway] method = "highway"'
    if (degree := settings.degrees.pipeline) > 1:
        raise ValueError(
            f'{where} with cut = "{config.cut}" and pipeline_parallel_degree = {degree}: no rank has all blocks. Set '
            'cut = "stage", or the degree to 1'
        )
    if (mode := settings.activation_checkpointing) != "none":
        raise ValueError(
            f'{where} with [activation_checkpoint] mode = "{mode}": each pass over a block would compute its forward '
            'again. Set the mode to "none"'
        )
    _check_backwards(settings)


def check_stages(settings: RunSettings) -> None:
    """The same of the form between pipeline stages."""
    where = '[highway] cut = "stage"'
    if settings.degrees.pipeline == 1:
        raise ValueError(f'{where} with pipeline_parallel_degree = 1: there is no stage. Set cut = "block" or "branch"')
    if (name := settings.pipeline_schedule) not in SCHEDULES:
        raise ValueError(
            f'{where} with pipeline_parallel_schedule = "{name}": it wants one stage a rank. Use one of '
            f"{', '.join(SCHEDULES)}, which it then replaces"
        )
    if settings.compiles_model:
        raise ValueError(
            f"{where} with compile.enable = true: a compiled stage does not tell input from weight gradients. Take "
            '"model" out of compile.components'
        )
    _check_backwards(settings)


def _check_backwards(settings: RunSettings) -> None:
    """What wants a single backward of a microbatch."""
    where = '[highway] method = "highway"'
    if settings.degrees.is_ddp:
        raise ValueError(
            f"{where} with data_parallel_replicate_degree = {settings.degrees.replicate} without sharding, which is "
            "DDP: it reduces gradients in one backward, and here are several. Set data_parallel_shard_degree above 1, "
            "or that one to 1"
        )
    if settings.steps_in_backward:
        raise ValueError(
            f"{where} with [optimizer] early_step_in_backward = true: the gradients come in several backwards. Set it "
            "to false"
        )


def rounds(config: HighwayConfig, num_blocks: int) -> int:
    """``iterations`` for this model; ValueError where it has fewer blocks."""
    if config.iterations > num_blocks:
        raise ValueError(
            f"[highway] iterations = {config.iterations} with a model of {num_blocks} blocks: from {num_blocks} on "
            "gradients are exact. Set it lower, or to -1 for as many as there are"
        )
    return num_blocks if config.iterations == -1 else config.iterations
