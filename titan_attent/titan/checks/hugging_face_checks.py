"""Checks that weights can come from, and go to, Hugging Face's format: by torchtitan's adapter of the family.

Where torchtitan 0.2.2's adapter leaves weights out, they would start at random, or be missing in what is saved.

Cost per rank: the model built on torch's meta device, and its names converted there and back.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger

QUANTIZED = "_blocks"
"""The end of the names of gpt_oss's experts in its published files, in MXFP4. torchtitan 0.2.2 knows no others."""
ROUTING_BIAS = "moe.expert_bias"
"""The end of the names of what torchtitan's load balancing adds to the scores of experts. It is no parameter, and is 0
in a model that has none."""


def check_format(job_config: JobConfig, spec: TrainSpec) -> None:
    """Refuse a family without a Hugging Face format, and one whose adapter leaves out parameters; ValueError."""
    config = job_config.checkpoint
    keys = [key for key in ("last_save_in_hf", "initial_load_in_hf") if config.enable and getattr(config, key)]
    if not keys:
        return
    name = job_config.model.name
    if spec.state_dict_adapter is None:
        raise ValueError(f"[checkpoint] {keys[0]} = true: {name} has no Hugging Face format. Set {keys[0]} = false")
    weights = _meta_weights(job_config, spec)
    converted = _adapter(job_config, spec).to_hf(dict(weights))
    lost = sorted(weights.keys() - _adapter(job_config, spec).from_hf(dict(converted)).keys())
    if parameters := [one for one in lost if not one.endswith(ROUTING_BIAS)]:
        raise ValueError(
            f"[checkpoint] {keys[0]} = true: torchtitan 0.2.2's conversion of {name} leaves out {parameters[0]} (of "
            f"{len(parameters)} weights), which would be lost. Choose a flavor without them, such as one whose layers "
            f"all have experts, or set {keys[0]} = false"
        )
    if "last_save_in_hf" not in keys:
        return
    if lost:
        logger.warning(
            f"[checkpoint] last_save_in_hf = true: {lost[0]} (of {len(lost)} biases of the routing) has no name in "
            "Hugging Face's format: the saved model routes without it. Train a flavor with load_balance_coeff = None, "
            "or keep the last checkpoint before"
        )
    if any(one.endswith(QUANTIZED) for one in converted):
        logger.warning(
            f"[checkpoint] last_save_in_hf = true: torchtitan 0.2.2 saves the experts of {name} under the names of "
            "MXFP4 files, under which transformers does not find weights in floating point"
        )


def check_names(expected: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    """Refuse files of gpt_oss with experts in floating point, whose names torchtitan lacks; ValueError."""
    for name in sorted(expected):
        plain = name.removesuffix(QUANTIZED)
        if plain != name and name not in stored and plain in stored:
            raise ValueError(
                f"the checkpoint {path} holds {plain} in floating point: torchtitan 0.2.2 reads the experts of gpt_oss "
                "from MXFP4 files alone. Give the published files, with initial_load_in_hf_quantized = true"
            )


def hf_shapes(job_config: JobConfig, spec: TrainSpec) -> dict[str, list[int]]:
    """name -> shape of the weights of the run's model under the names of Hugging Face's model."""
    named = _adapter(job_config, spec).to_hf(_meta_weights(job_config, spec))
    return {name: list(weight.shape) for name, weight in named.items()}


def model_shapes(job_config: JobConfig, spec: TrainSpec) -> dict[str, list[int]]:
    """name -> shape of the weights of the run's model, under the names that a checkpoint uses."""
    with torch.device("meta"):
        model: nn.Module = spec.model_cls(_model_args(job_config, spec))
    return {name: list(cast(Tensor, weight).shape) for name, weight in get_model_state_dict(model).items()}


def _meta_weights(job_config: JobConfig, spec: TrainSpec) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in model_shapes(job_config, spec).items()}


def _model_args(job_config: JobConfig, spec: TrainSpec) -> Any:
    model_args = copy.deepcopy(spec.model_args[job_config.model.flavor])
    model_args.update_from_config(job_config)
    return model_args


def _adapter(job_config: JobConfig, spec: TrainSpec) -> BaseStateDictAdapter:
    assert spec.state_dict_adapter is not None
    return spec.state_dict_adapter(_model_args(job_config, spec), None)
