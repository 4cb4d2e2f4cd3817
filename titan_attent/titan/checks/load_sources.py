"""Finds the source that a run starts from (own checkpoint, another checkpoint, random weights) and checks its keys.

The checkpoint manager, which loads, uses the same functions (checkpoint_folder.py) and so finds the same source.

Cost: one or two directory listings.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from titan_attent.titan.checkpoint_folder import checkpoint, is_safetensors, latest
from titan_attent.titan.checkpoint_metadata import TRUSTED


@dataclass(frozen=True)
class Source:
    """A checkpoint that will be loaded.

    Attributes:
        path: its folder.
        is_full: whether all of its states are loaded, or the weights alone.
        is_own: whether it is in the run's own folder.
        in_safetensors: whether it is in safetensors format.
    """

    path: Path
    is_full: bool
    is_own: bool
    in_safetensors: bool = False


def folder_of(job_config: JobConfig) -> Path:
    """The folder of the run's own checkpoints."""
    return Path(job_config.job.dump_folder) / job_config.checkpoint.folder


def source_of(job_config: JobConfig) -> Source | None:
    """The source that the patched CheckpointManager will load; None for a start from random weights.

    Raises:
        ValueError: as :func:`checkpoint_folder.latest`.
    """
    config, folder = job_config.checkpoint, folder_of(job_config)
    if not config.enable or config.create_seed_checkpoint:
        return None
    step = config.load_step if config.load_step != -1 and folder.exists() else latest(folder)
    if step is not None:
        path = checkpoint(folder, step)
        hf = is_safetensors(path) and not (path / ".metadata").is_file()
        return Source(path, is_full=step > 0, is_own=True, in_safetensors=hf)
    initial = config.initial_load_path or (job_config.model.hf_assets_path if config.initial_load_in_hf else None)
    if not initial:
        return None
    is_full = not config.initial_load_model_only
    return Source(Path(initial), is_full=is_full, is_own=False, in_safetensors=config.initial_load_in_hf)


def checkpoint_to_load(job_config: JobConfig) -> Path | None:
    """The checkpoint whose states are all loaded; None if the run loads weights alone or nothing."""
    source = source_of(job_config)
    return source.path if source is not None and source.is_full else None


def check_start(job_config: JobConfig) -> None:
    """Refuse, for a training run, keys that ask to load or save while ``checkpoint.enable = false``."""
    config = job_config.checkpoint
    if config.enable:
        return
    if config.create_seed_checkpoint:
        raise ValueError("[checkpoint] create_seed_checkpoint = true with enable = false: set enable = true")
    requested = {
        "initial_load_path": bool(config.initial_load_path),
        "initial_load_in_hf": config.initial_load_in_hf,
        "load_step": config.load_step > -1,
    }
    for key, is_set in requested.items():
        if is_set:
            raise ValueError(
                f"[checkpoint] {key} = {getattr(config, key)} with enable = false: nothing would be loaded, and the "
                f"run would start from random weights. Set enable = true (with load_only = true nothing is saved), or "
                f"leave {key} out"
            )


def check_sources(job_config: JobConfig) -> None:
    """Refuse keys of an enabled ``[checkpoint]`` that contradict each other or the files on disk."""
    config, folder = job_config.checkpoint, folder_of(job_config)
    _check_hf(job_config)
    if config.load_step == 0 and not (folder / "step-0").is_dir():
        if folder.exists():
            raise ValueError(
                f"[checkpoint] load_step = 0 asks for the seed checkpoint {folder / 'step-0'}, which does not exist: "
                "leave load_step out to resume from the latest checkpoint"
            )
        start = config.initial_load_path or "random weights"
        logger.warning(f"[checkpoint] load_step = 0: there is no {folder / 'step-0'}, the run starts from {start}")
    if config.load_step > 0 and not folder.exists():
        initial = config.initial_load_path
        fix = f"give --checkpoint.initial_load_path {initial}/step-{config.load_step}" if initial else "leave it out"
        raise ValueError(
            f"[checkpoint] load_step = {config.load_step}: neither {folder / f'step-{config.load_step}'} nor its "
            f"parent folder exists; load_step selects one of the run's own checkpoints. Check job.dump_folder, or "
            f"{fix} to start a new run"
        )
    source = source_of(job_config)
    if source is None or source.is_own:
        return
    if config.initial_load_path:
        _check_initial(source)
    elif not source.path.is_dir():
        raise ValueError(
            f"[model] hf_assets_path = {source.path} does not exist: checkpoint.initial_load_in_hf loads from there, "
            "or from checkpoint.initial_load_path"
        )


def _check_hf(job_config: JobConfig) -> None:
    config = job_config.checkpoint
    if config.initial_load_in_hf and not config.initial_load_model_only:
        raise ValueError(
            "[checkpoint] initial_load_in_hf = true: that format holds weights only. Set initial_load_model_only = true"
        )
    if config.initial_load_in_hf_quantized and not config.initial_load_in_hf:
        raise ValueError(
            "[checkpoint] initial_load_in_hf_quantized = true has no effect without initial_load_in_hf = true: set both"
        )
    if config.export_dtype != "float32" and not config.last_save_model_only:
        logger.warning(
            f'[checkpoint] export_dtype = "{config.export_dtype}" has no effect: it applies to the last checkpoint '
            "if last_save_model_only = true"
        )


def _check_initial(source: Source) -> None:
    where = f"[checkpoint] initial_load_path = {source.path}"
    if not source.path.is_dir():
        raise ValueError(f"{where} does not exist: check the path")
    if source.in_safetensors:
        if not is_safetensors(source.path):
            raise ValueError(f"{where} holds no *.safetensors: set initial_load_in_hf = false, or check the path")
        return
    check_checkpoint_path(str(source.path))


def check_checkpoint_path(path: str | None) -> None:
    """Refuse a ``checkpoint.initial_load_path`` that is not a finished DCP checkpoint."""
    if not path:
        raise ValueError(
            "[checkpoint] initial_load_path is empty: give the step folder of the checkpoint to score with, such as "
            "outputs/checkpoint/step-1000"
        )
    folder = Path(path)
    if (folder / ".metadata").is_file():
        return
    steps = [*folder.glob("step-*/.metadata"), *folder.glob("*/step-*/.metadata")]
    if steps:
        latest_step = max((file.parent for file in steps), key=lambda step: (len(step.name), step.name))
        problem = f"contains checkpoints but is not one itself: give one of them, such as {latest_step}"
    elif not folder.is_dir():
        problem = "does not exist: check the path"
    elif is_safetensors(folder):
        problem = (
            "is in safetensors format: train from it with initial_load_in_hf = true; to score, load it into "
            "torchtitan, save it there, and give that step folder"
        )
    else:
        problem = (
            "is not a DCP checkpoint or was never finished (it has no .metadata): give a step folder written by "
            "torchtitan"
        )
    raise ValueError(f"[checkpoint] initial_load_path = {path} {problem}")


def warn_of_pickles(path: str | Path, *, what: str = "[checkpoint] initial_load_path =") -> None:
    """Warn on rank 0 that loading a checkpoint from another source can run any code in it.

    Args:
        what: what the checkpoint is; stands before its path.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.warning(f"{what} {path}: {TRUSTED}")
