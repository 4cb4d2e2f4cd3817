"""Checks that a run can start from its checkpoint: readable by this torch, same model, same data, steps left to train.

The checks read metadata and single values through checkpoint_metadata.py, and no tensor.

Cost per rank: the metadata and a few values of one checkpoint, and the model built on torch's meta device.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.systems.system_list import renamed
from titan_attent.titan.changed_settings import SETTINGS, log_changes, recorded_settings
from titan_attent.titan.checkpoint_folder import latest
from titan_attent.titan.checkpoint_metadata import read_metadata, read_value, safetensors_shapes, shapes_of
from titan_attent.titan.checks.hugging_face_checks import check_format, check_names, hf_shapes, model_shapes
from titan_attent.titan.checks.load_sources import Source, folder_of, source_of, warn_of_pickles
from titan_attent.titan.loader import check_geometry
from titan_attent.titan.settings import systems_of

STOCK_STATES = ("train_state", "lr_scheduler", "optimizer")
"""torchtitan's own states, except those of the weights and the data loader."""
EMBEDDINGS = ("tok_embeddings.weight", "output.weight", "embed_tokens.weight", "lm_head.weight")
"""Ends of the names of the weights with a row per token id, in torchtitan's and in Hugging Face's models."""


def check_checkpoint(job_config: JobConfig, spec: TrainSpec, geometry: dict[str, Any]) -> None:
    """Refuse a checkpoint from which this run cannot start; ValueError."""
    check_format(job_config, spec)
    source = source_of(job_config)
    if source is None:
        return
    if source.in_safetensors:
        if source.is_own:
            raise ValueError(_not_resumable(job_config, source))
        if not (job_config.checkpoint.initial_load_in_hf_quantized or job_config.model.converters):
            expected, stored = hf_shapes(job_config, spec), safetensors_shapes(source.path)
            check_names(expected, stored, source.path)
            # Files may hold more, such as the frequencies of the positions.
            compare_shapes(expected, {name: stored[name] for name in expected if name in stored}, source.path)
        return
    path = source.path
    if not (path / ".metadata").is_file():
        raise ValueError(f"the checkpoint {path} does not exist or was never finished: check checkpoint.load_step")
    metadata = read_metadata(path)
    if not source.is_own:
        warn_of_pickles(path)
    excluded = set(job_config.checkpoint.exclude_from_loading) if source.is_full else set()
    has_other_head = job_config.vision.new_head and not source.is_own  # initial_weights.py compares the trunk
    # A converter may rename the weights.
    if "model" not in excluded and not has_other_head and not job_config.model.converters:
        check_shapes(model_shapes(job_config, spec), metadata, path)
    if not source.is_full:
        return
    kept = {system.name for system, _ in systems_of(job_config) if system.keeps_state}
    ledger = set() if "teacher" in kept else {"ledger"}
    _check_excluded(excluded, states={"model", "dataloader", *STOCK_STATES, *kept, *ledger})
    _check_states(path, metadata, excluded=excluded, kept=kept)
    if "dataloader" not in excluded:
        stored = _geometry(path, metadata)
        check_geometry(stored, geometry, where=f"the checkpoint {path}")
        log_changes(stored.get(SETTINGS), recorded_settings(job_config), where=f"the checkpoint {path}")
    if "train_state" not in excluded:
        _check_steps(job_config, source, step=read_value(path, metadata, "train_state.step", int))


def _geometry(path: Path, metadata: Metadata) -> dict[str, Any]:
    try:
        stored = json.loads(read_value(path, metadata, "dataloader.geometry", str))
    except (json.JSONDecodeError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(
            f"the checkpoint {path} is damaged: its dataloader.geometry is not a JSON object; restore it, or give "
            "another checkpoint with checkpoint.load_step"
        )
    return stored


def _not_resumable(job_config: JobConfig, source: Source) -> str:
    return (
        f"the checkpoint {source.path} is in safetensors format (checkpoint.last_save_in_hf) and holds the weights "
        "only: a run cannot be resumed from it. Give an earlier checkpoint with checkpoint.load_step, or start in a "
        f"new job.dump_folder with --checkpoint.initial_load_path {source.path} --checkpoint.initial_load_in_hf"
    )


OWN_MODEL = "Set [model] name and flavor to those it was trained with"


def check_shapes(
    expected: Mapping[str, Iterable[int]], metadata: Metadata, path: str | Path, *, fix: str = OWN_MODEL
) -> None:
    """Refuse a checkpoint whose model differs from the ``expected`` shapes: other names, more layers or other sizes.

    Args:
        fix: what to do about another model, for the message.
    """
    # A full checkpoint also holds the optimizer's and other states, each under its own prefix.
    stored = shapes_of(metadata, modules={name.partition(".")[0] for name in expected})
    compare_shapes({name: list(shape) for name, shape in expected.items()}, stored, path, fix=fix)


def compare_shapes(
    expected: Mapping[str, list[int]], stored: Mapping[str, list[int]], path: str | Path, *, fix: str = OWN_MODEL
) -> None:
    """Refuse the weights ``stored`` in ``path`` if their names or shapes differ from the ``expected`` ones."""
    differing = [name for name in sorted({*expected, *stored}) if expected.get(name) != stored.get(name)]
    if not differing:
        return
    if all(name.endswith(EMBEDDINGS) and _same_width(expected.get(name), stored.get(name)) for name in differing):
        name = differing[0]
        raise ValueError(
            f"the checkpoint {path} is of another vocabulary: it has {stored[name][0]:,} token ids, and this model has "
            f"{expected[name][0]:,}, by its flavor and its data. Use data written with the tokenizer that the "
            "checkpoint was trained with, or another checkpoint"
        )
    shapes = [
        f"{name} is {expected.get(name, 'absent')} here and {stored.get(name, 'absent')} there" for name in differing
    ]
    raise ValueError(
        f"the checkpoint {path} is of another model: {'; '.join(shapes[:3])} (of {len(shapes)} differences). {fix}"
    )


def _same_width(first: list[int] | None, second: list[int] | None) -> bool:
    return first is not None and second is not None and first[1:] == second[1:]


def _check_excluded(excluded: set[str], *, states: set[str]) -> None:
    if unknown := sorted(excluded - states):
        raise ValueError(
            f"[checkpoint] exclude_from_loading: {', '.join(unknown)} is not a state of this run. Its states are "
            f"{', '.join(sorted(states))}"
        )


def _check_states(path: Path, metadata: Metadata, *, excluded: set[str], kept: set[str]) -> None:
    stored = {renamed(name, separator=".").partition(".")[0] for name in metadata.state_dict_metadata}
    for state in (*sorted({"dataloader", *kept}), *STOCK_STATES):
        if state not in stored | excluded:
            raise ValueError(
                f"the checkpoint {path} holds no {state} state: it is model-only (checkpoint.last_save_model_only), "
                f"from stock torchtitan, or from a run without {state}. To train its weights with a new {state} state: "
                "from a full checkpoint set checkpoint.exclude_from_loading = "
                f"{json.dumps([*sorted(kept), 'dataloader'])}; from a model-only one start in a new job.dump_folder "
                "with checkpoint.initial_load_path"
            )


def _check_steps(job_config: JobConfig, source: Source, *, step: int) -> None:
    """Refuse a run without steps left to train, except a finished run whose command is given again unchanged."""
    steps = job_config.training.steps
    if step < steps or (step == steps and source == _finished_source(job_config)):
        return
    raise ValueError(
        f"nothing is left to train: the checkpoint {source.path} is already at step {step}, and [training] steps = "
        f"{steps}. Set training.steps above {step} to train on from there"
        + ", go back with checkpoint.load_step, or start a new run in another job.dump_folder"
        * source.is_own
    )


def _finished_source(job_config: JobConfig) -> Source | None:
    """The last checkpoint of the run's own folder if the run starts from it; else None."""
    source = source_of(job_config)
    step = latest(folder_of(job_config)) if source is not None and source.is_own else None
    return source if source is not None and step is not None and source.path.name == f"step-{step}" else None


def finished_message(job_config: JobConfig) -> str:
    """The message for a finished run whose command is given again; empty if the run is not finished.

    The configuration must have passed :func:`check_checkpoint`.
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
