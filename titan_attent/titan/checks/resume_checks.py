"""Whether the checkpoint that a run starts from fits it: of this torch, of this model, of these data, with steps left.

Looked at before any tensor is read, through checkpoint_metadata.py.

Cost: the metadata of one checkpoint and a few values of it, a rank; the model's names and shapes, built on torch's meta
device.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.systems.system_list import renamed
from titan_attent.titan.checkpoint_folder import latest
from titan_attent.titan.checkpoint_metadata import read_metadata, read_value, shapes_of
from titan_attent.titan.checks.load_sources import Source, folder_of, source_of, warn_of_pickles
from titan_attent.titan.loader import check_geometry
from titan_attent.titan.settings import systems_of

STOCK_STATES = ("train_state", "lr_scheduler", "optimizer")
"""torchtitan's own, beside the weights and the data loader's."""


def check_checkpoint(job_config: JobConfig, spec: TrainSpec, geometry: dict[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot start from; ValueError."""
    _check_adapter(job_config, spec)
    source = source_of(job_config)
    if source is None:
        return
    if source.in_safetensors:
        if source.is_own:
            raise ValueError(_not_resumable(job_config, source))
        return
    path = source.path
    if not (path / ".metadata").is_file():
        raise ValueError(f"the checkpoint {path} does not exist or was never finished: check checkpoint.load_step")
    metadata = read_metadata(path)
    if not source.is_own:
        warn_of_pickles(path)
    excluded = set(job_config.checkpoint.exclude_from_loading) if source.is_full else set()
    has_other_head = job_config.vision.new_head and not source.is_own  # initial_weights.py compares the trunk
    # A converter may give the weights other names.
    if "model" not in excluded and not has_other_head and not job_config.model.converters:
        check_shapes(model_shapes(job_config, spec), metadata, path)
    if not source.is_full:
        return
    kept = {system.name for system, _ in systems_of(job_config) if system.keeps_state}
    ledger = set() if "teacher" in kept else {"ledger"}
    _check_excluded(excluded, known={"model", "dataloader", *STOCK_STATES, *kept, *ledger})
    _check_states(path, metadata, excluded=excluded, kept=kept)
    if "dataloader" not in excluded:
        stored = _geometry(path, metadata)
        check_geometry(stored, geometry, where=f"the checkpoint {path}")
    if "train_state" not in excluded:
        _check_steps(job_config, source, step=read_value(path, metadata, "train_state.step", int))


def _geometry(path: Path, metadata: Metadata) -> dict[str, Any]:
    try:
        stored = json.loads(read_value(path, metadata, "dataloader.geometry", str))
    except (json.JSONDecodeError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(
            f"the checkpoint {path} is damaged: its dataloader.geometry is no JSON object; restore it, or give another "
            "checkpoint with checkpoint.load_step"
        )
    return stored


def _check_adapter(job_config: JobConfig, spec: TrainSpec) -> None:
    config = job_config.checkpoint
    for key in ("last_save_in_hf", "initial_load_in_hf"):
        if config.enable and getattr(config, key) and spec.state_dict_adapter is None:
            raise ValueError(
                f"[checkpoint] {key} = true: {job_config.model.name} has no Hugging Face format. Set it to false"
            )


def _not_resumable(job_config: JobConfig, source: Source) -> str:
    return (
        f"the checkpoint {source.path} is in safetensors format (checkpoint.last_save_in_hf): it ended its run, and "
        "holds the weights only, so that no run can be resumed from it. Give an earlier one with "
        f"checkpoint.load_step, or start in a new job.dump_folder with --checkpoint.initial_load_path {source.path} "
        "--checkpoint.initial_load_in_hf"
    )


def model_shapes(job_config: JobConfig, spec: TrainSpec) -> dict[str, list[int]]:
    """name -> shape of the weights of the run's model, as a checkpoint has them."""
    model_args = copy.deepcopy(spec.model_args[job_config.model.flavor])
    model_args.update_from_config(job_config)
    with torch.device("meta"):
        model: nn.Module = spec.model_cls(model_args)
    return {name: list(cast(Tensor, weight).shape) for name, weight in get_model_state_dict(model).items()}


def check_shapes(here: Mapping[str, Iterable[int]], metadata: Metadata, path: str | Path) -> None:
    """Refuse a checkpoint of another model than has these shapes: other names, more layers, or other sizes."""
    # Beside the model's, a full checkpoint holds the optimizer's and others', each under a name of its own.
    there = shapes_of(metadata, modules={name.partition(".")[0] for name in here})
    differing = [
        f"{name} is {here.get(name, 'absent')} here and {there.get(name, 'absent')} there"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {path} is of another model: {'; '.join(differing[:3])} (of {len(differing)} differences). "
            "Set [model] name and flavor to what it was trained with"
        )


def _check_excluded(excluded: set[str], *, known: set[str]) -> None:
    if unknown := sorted(excluded - known):
        raise ValueError(
            f"[checkpoint] exclude_from_loading: {', '.join(unknown)} is no state of this run. Its states are "
            f"{', '.join(sorted(known))}"
        )


def _check_states(path: Path, metadata: Metadata, *, excluded: set[str], kept: set[str]) -> None:
    there = {renamed(name, separator=".").partition(".")[0] for name in metadata.state_dict_metadata}
    for state in (*sorted({"dataloader", *kept}), *STOCK_STATES):
        if state not in there | excluded:
            raise ValueError(
                f"the checkpoint {path} holds no {state} state: it is model-only (checkpoint.last_save_model_only), "
                "stock torchtitan's, or of a run without it. To go on with its weights under a new one set "
                f"checkpoint.exclude_from_loading = {json.dumps([*sorted(kept), 'dataloader'])} (full checkpoint), or "
                "start in a new job.dump_folder with checkpoint.initial_load_path (model-only)"
            )


def _check_steps(job_config: JobConfig, source: Source, *, step: int) -> None:
    """Refuse a run that is over before its first step, except one that is asked for again as it was."""
    steps = job_config.training.steps
    if step < steps or (step == steps and source == _finished_source(job_config)):
        return
    raise ValueError(
        f"nothing is left to train: the checkpoint {source.path} is already at step {step}, and [training] steps = "
        f"{steps}. Set training.steps above {step} to train on from there"
        + ", go back with checkpoint.load_step, or start anew in another job.dump_folder"
        * source.is_own
    )


def _finished_source(job_config: JobConfig) -> Source | None:
    """The last checkpoint of the run's own folder, if that is what it starts from."""
    source = source_of(job_config)
    step = latest(folder_of(job_config)) if source is not None and source.is_own else None
    return source if source is not None and step is not None and source.path.name == f"step-{step}" else None


def what_is_finished(job_config: JobConfig) -> str:
    """What to say where the run has all its steps already and its command is given once more; else nothing.

    For a configuration that passed :func:`check_checkpoint`.
    """
    source = _finished_source(job_config)
    if source is None or not source.is_full or "train_state" in job_config.checkpoint.exclude_from_loading:
        return ""
    step = read_value(source.path, read_metadata(source.path), "train_state.step", int)
    if step < job_config.training.steps:
        return ""
    return (
        f"nothing is left to train: the run has finished, its checkpoint {source.path} is at step {step} of "
        f"[training] steps = {job_config.training.steps}. Raise training.steps to train on from there"
    )
