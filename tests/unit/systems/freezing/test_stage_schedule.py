"""The schedule of ``[freezing] policy = "stages"``."""

from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torch import nn
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from titan_attent.foundations.flops import matrix_flops
from titan_attent.systems.freezing.config import FreezingConfig, Stage, parse_stages
from titan_attent.systems.freezing.policy import stage_of, units_of_stage
from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.freezing.units import find_units
from titan_attent.titan.models.mot import MixtureOfTransformers, MotArgs

SIZES = {"dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "multiple_of": 8, "max_seq_len": 12}


def test_a_step_has_one_stage() -> None:
    stages = parse_stages(["feed_forward:3", "attention:2", "both"])
    assert stages == [Stage("feed_forward", 3), Stage("attention", 2), Stage("both", None)]
    found = [stage_of(stages, step, warmup_steps=2) for step in range(1, 10)]
    assert found == [-1, -1, 0, 0, 0, 1, 1, 2, 2]


def test_the_plan_says_when_a_stage_begins() -> None:
    facts: Any = None  # not read
    config = FreezingConfig(policy="stages", stages=["feed_forward:3", "attention"], warmup_steps=2)
    schedule = (
        "Freezing: all modules for 2 steps, then feed_forward for 3 steps, then attention for the remaining steps."
    )
    assert Freezing.plan(config, facts, num_ranks=1).lines == (schedule,)
    assert Freezing.plan(FreezingConfig(policy="mat"), facts, num_ranks=1).lines == ()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["ffn:3", "attention"], 'stages: "ffn:3" begins with none of attention, feed_forward, both'),
        (["attention:0", "both"], '"attention:0" needs a number of steps'),
        (["attention", "both"], '"attention" needs a number of steps: write "attention:100"'),
        (["attention:5", "both:5"], 'the last stage, "both:5", lasts until the end of the run: write "both"'),
        ([], r'policy = "stages" with stages = \[\]: name the stages'),
    ],
)
def test_malformed_stages_are_refused(stages: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezingConfig(policy="stages", stages=stages).validate()


def test_stages_without_the_policy_are_refused() -> None:
    with pytest.raises(ValueError, match='policy = "mat" with stages .*set policy = "stages"'):
        FreezingConfig(policy="mat", stages=["both"]).validate()


@pytest.mark.parametrize("model_cls, args", [(Transformer, TransformerModelArgs), (MixtureOfTransformers, MotArgs)])
def test_a_stage_trains_one_part_of_every_layer_and_what_is_no_layer(model_cls: type, args: type) -> None:
    model: nn.Module = model_cls(args(**SIZES))
    units = find_units(model, seq_len=8)
    names = [unit.name for unit in units]
    assert names[0] == "tok_embeddings" and names[-1] == "output" and len(names) == 6
    for part, other in (("attention", "feed_forward"), ("feed_forward", "attention")):
        active = dict(zip(names, units_of_stage(units, Stage(part, None)), strict=True))
        assert active == {name: not name.endswith(other) for name in names}
    assert all(units_of_stage(units, None)) and all(units_of_stage(units, Stage("both", 3)))
    in_units = {id(parameter) for unit in units for parameter in unit.parameters}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in in_units]
    assert outside == (["gates.0.weight", "gates.1.weight"] if model_cls is MixtureOfTransformers else [])


def test_flops_are_those_of_one_expert() -> None:
    """A unit of four experts costs what llama3's costs, and has four times its parameters beside the norm."""
    llama, mot = Transformer(TransformerModelArgs(**SIZES)), MixtureOfTransformers(MotArgs(**SIZES, num_experts=4))
    for one, other in zip(find_units(llama, seq_len=8), find_units(mot, seq_len=8), strict=True):
        costs = [(unit.name, unit.forward, unit.weight, unit.inputs) for unit in (one, other)]
        assert costs[0] == costs[1]
        if one.name.startswith("layers."):
            assert other.numel - 16 == 4 * (one.numel - 16)
    linear = nn.Linear(4, 3)
    assert matrix_flops(linear, None, seq_len=2) == 2 * 12 * 2
