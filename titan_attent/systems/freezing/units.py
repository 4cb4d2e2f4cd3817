"""The units of freezing: the modules of a model that are frozen or active as a whole, and their cost in FLOPs.

Units are the attention and the feed-forward (or all experts) of each layer, each with the norm before it; the
embedding; and the output with the last norm. The parameter names are those that torchtitan's models share.

FLOPs are per example, counted by foundations/flops.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from titan_attent.foundations.flops import is_experts, is_routed, matrix_flops, product_flops

WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
LAYER = re.compile(r"layers\.(\d+)\.(\w+)")
ALWAYS_TRAINED = "gates."
"""Prefix of the gates of mot_attent, which belong to no unit: they are trained in every step."""


@dataclass
class Unit:
    """A module that is frozen or active as a whole.

    Attributes:
        name: "layers.3.attention", "tok_embeddings", ...
        kind: module type: "attention", "feed_forward", "moe", "embedding" or "output". Eigenvalues are comparable
            within a type only.
        layer: index of the layer; -1 for the embedding, the number of layers for the output.
        parameters: parameters as the model holds them between steps: sharded under FSDP2.
        layers: Linear, Embedding and expert modules by name, and the module that sorts tokens by expert.
        forward: FLOPs per example of the forward pass.
        weight: FLOPs per example of the weight gradients.
        inputs: FLOPs per example of the input gradients.
    """

    name: str
    kind: str
    layer: int
    parameters: list[nn.Parameter] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    forward: float = 0.0
    weight: float = 0.0
    inputs: float = 0.0

    @cached_property
    def numel(self) -> int:
        """The number of parameters over all ranks."""
        return sum(parameter.numel() for parameter in self.parameters)


def is_reorderer(module: nn.Module) -> bool:
    """Whether a module is torchtitan's TokenReorderer, which sorts tokens by expert."""
    return type(module).__name__ == "TokenReorderer"


OTHER_LAYERS = (is_experts, is_reorderer, is_routed)


def plain_name(name: str) -> str:
    """Remove the parts of a name that torch.compile and activation checkpointing insert."""
    return WRAPPERS.sub("", name + ".")[:-1]


def unit_key(name: str, *, has_experts: bool, num_layers: int) -> tuple[str, str, int]:
    """(name, kind, layer) of the unit of a parameter; ValueError if no torchtitan model has such a name."""
    top = name.split(".")[0]
    if top == "tok_embeddings":
        return "tok_embeddings", "embedding", -1
    if top in ("norm", "output"):
        return "output", "output", num_layers
    if (match := LAYER.match(name)) is not None:
        layer, part = int(match[1]), match[2]
        if part.startswith("attention"):
            return f"layers.{layer}.attention", "attention", layer
        if part in ("feed_forward", "moe", "ffn_norm"):
            kind = "moe" if has_experts else "feed_forward"
            return f"layers.{layer}.{kind}", kind, layer
    raise ValueError(
        f'[freezing] policy: the parameter "{name}" belongs to no module that freezing supports; set policy = "off"'
    )


def find_units(model: nn.Module, *, seq_len: int) -> list[Unit]:
    """Find the units of a whole model, ordered from the embedding to the output.

    Args:
        model: a torchtitan model, parallelised or not; all of its parameters require gradients.
        seq_len: tokens per example.
    """
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    with_experts = {int(match[1]) for name in named if (match := re.match(r"layers\.(\d+)\.moe\.", name))}
    num_layers = 1 + max((int(match[1]) for name in named if (match := LAYER.match(name))), default=-1)
    units: dict[str, Unit] = {}

    def unit_of(name: str) -> Unit:
        match = LAYER.match(name)
        has_experts = match is not None and int(match[1]) in with_experts
        key = unit_key(name, has_experts=has_experts, num_layers=num_layers)
        return units.setdefault(key[0], Unit(*key))

    for name, parameter in named.items():
        if name.startswith(ALWAYS_TRAINED):
            continue
        unit_of(name).parameters.append(parameter)
    args: Any = getattr(model, "model_args", None)
    for name, module in model.named_modules():
        name = plain_name(name)
        if isinstance(module, nn.Linear | nn.Embedding) or any(is_kind(module) for is_kind in OTHER_LAYERS):
            if name.startswith(ALWAYS_TRAINED):
                continue
            unit_of(name).layers[name] = module
    _tie(units, named, model)
    for unit in units.values():
        _count(unit, args, seq_len=seq_len)
    order = {"attention": 0, "feed_forward": 1, "moe": 1, "embedding": 0, "output": 0}
    return sorted(units.values(), key=lambda unit: (unit.layer, order[unit.kind]))


def _tie(units: dict[str, Unit], named: dict[str, nn.Parameter], model: nn.Module) -> None:
    """If the output shares the embedding's matrix, merge the output unit into the embedding's, last norm included."""
    if "output.weight" in named or getattr(model, "output", None) is None:
        return
    output = units.pop("output")
    units["tok_embeddings"].parameters += output.parameters
    units["tok_embeddings"].layers |= output.layers


def _count(unit: Unit, args: Any, *, seq_len: int) -> None:
    unit.forward = sum(matrix_flops(module, args, seq_len=seq_len) for module in unit.layers.values())
    unit.weight = unit.inputs = unit.forward
    if unit.kind == "attention":
        products = product_flops(args, seq_len=seq_len)
        unit.forward += products
        unit.inputs += 2 * products


def saved_flops(units: Sequence[Unit], active: Sequence[bool]) -> tuple[float, float]:
    """The FLOPs per example that frozen modules save in the backward pass: (weight gradients, input gradients).

    Input gradients are saved below the first active module only. A tied output's are never saved: it is frozen with
    the embedding, but lies above all other modules.
    """
    first = list(active).index(True) if any(active) else len(units)
    weight = sum(unit.weight for unit, on in zip(units, active, strict=True) if not on)
    return weight, sum(unit.inputs for unit in units[:first] if unit.kind != "embedding")


def backward_flops(units: Sequence[Unit]) -> float:
    """The FLOPs per example of the whole backward pass."""
    return sum(unit.weight + unit.inputs for unit in units)
