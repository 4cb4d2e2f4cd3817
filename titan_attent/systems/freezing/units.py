"""The modules of a model, as the unit in which a step updates its parameters, and what each costs.

Of each layer its attention and its feed-forward part (or its experts, as one), with the norm before it; the embedding;
the output with the last norm. Names are those of torchtitan's models, which agree on them.

FLOPs are of one example, as foundations/flops.py counts them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from titan_attent.foundations.flops import is_experts, matrix_flops, product_flops

WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


@dataclass
class Unit:
    """A module.

    Attributes:
        name: "layers.3.attention", "tok_embeddings", ...
        kind: "attention", "feed_forward", "moe", "embedding" or "output": eigenvalues compare within a kind.
        layer: number of its layer; -1 for the embedding, the number of layers for the output.
        parameters: as the model's parts hold them between steps: sharded under FSDP2.
        layers: the Linear, Embedding and expert modules in it, and what sorts for the experts, by name.
        forward, weight, inputs: FLOPs of an example: of the forward pass, of the weight gradients, of the input
            gradients.
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
        """Parameters, over all ranks."""
        return sum(parameter.numel() for parameter in self.parameters)


def is_reorderer(module: nn.Module) -> bool:
    """torchtitan's module that sorts tokens by expert, which knows whose tokens the experts get."""
    return type(module).__name__ == "TokenReorderer"


def plain_name(name: str) -> str:
    """Without what torch.compile and activation checkpointing put into it."""
    return WRAPPERS.sub("", name + ".")[:-1]


def place_of(name: str, *, has_experts: bool, num_layers: int) -> tuple[str, str, int]:
    """(name, kind, layer) of the unit to which a parameter belongs; ValueError for a name of no torchtitan model."""
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
        f'[freezing] policy: the parameter "{name}" belongs to no module that this model is known to have; set '
        'policy = "off"'
    )


def find_units(model: nn.Module, *, seq_len: int) -> list[Unit]:
    """The units of a whole model, from the embedding upwards.

    Args:
        model: torchtitan's, parallelised or not; all of its parameters require gradients.
        seq_len: tokens of an example.
    """
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    with_experts = {int(match[1]) for name in named if (match := re.match(r"layers\.(\d+)\.moe\.", name))}
    num_layers = 1 + max((int(match[1]) for name in named if (match := LAYER.match(name))), default=-1)
    units: dict[str, Unit] = {}

    def unit_of(name: str) -> Unit:
        match = LAYER.match(name)
        has_experts = match is not None and int(match[1]) in with_experts
        place = place_of(name, has_experts=has_experts, num_layers=num_layers)
        return units.setdefault(place[0], Unit(*place))

    for name, parameter in named.items():
        unit_of(name).parameters.append(parameter)
    args: Any = getattr(model, "model_args", None)
    for name, module in model.named_modules():
        name = plain_name(name)
        if isinstance(module, nn.Linear | nn.Embedding) or is_experts(module) or is_reorderer(module):
            unit_of(name).layers[name] = module
    _tie(units, named, model)
    for unit in units.values():
        _count(unit, args, seq_len=seq_len)
    order = {"attention": 0, "feed_forward": 1, "moe": 1, "embedding": 0, "output": 0}
    return sorted(units.values(), key=lambda unit: (unit.layer, order[unit.kind]))


def _tie(units: dict[str, Unit], named: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Where the output has the embedding's matrix, the two are one module, with the last norm."""
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
    """FLOPs of an example's backward pass that frozen modules save: (weight gradients, input gradients).

    Input gradients are saved below the first active module only; not the output's where it has the embedding's matrix
    and is frozen with it, as it stands above all others.
    """
    first = list(active).index(True) if any(active) else len(units)
    weight = sum(unit.weight for unit, on in zip(units, active, strict=True) if not on)
    return weight, sum(unit.inputs for unit in units[:first] if unit.kind != "embedding")


def backward_flops(units: Sequence[Unit]) -> float:
    """FLOPs of an example's whole backward pass."""
    return sum(unit.weight + unit.inputs for unit in units)
