"""The FLOPs that a frozen prefix should save, against the FLOPs that torch counts."""

from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.parallel_world import plain_model
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.policy import History, decide
from titan_attent.systems.freezing.units import backward_flops, find_units, saved_flops

SEQ_LEN = 16
CELLS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "qwen3": {"model.name": "qwen3_attent"},
    "qwen3, tied": {"model.name": "qwen3_attent", "model.flavor": "tied"},
}


@pytest.mark.parametrize("share", [0.4, 0.55, 0.8])
@pytest.mark.parametrize("cell", CELLS)
def test_below_the_cut_nothing_is_computed(cell: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tied embeddings the output is frozen with the lowest module, but its input gradient is still computed."""
    monkeypatch.setattr(ScaledDotProductAttentionWrapper, "sdpa_backends", [SDPBackend.MATH])
    model: Any = plain_model({"training.seq_len": SEQ_LEN, **CELLS[cell]})
    units = find_units(model, seq_len=SEQ_LEN)
    active = decide(
        units, History(active=[True] * len(units)), FreezingConfig(policy="truncated", backward_share=share)
    )
    assert not active[0] and active[-1]
    for unit, on in zip(units, active, strict=True):
        for parameter in unit.parameters:
            parameter.requires_grad_(on)
    loss = model(torch.arange(SEQ_LEN)[None]).square().sum()
    with FlopCounterMode(display=False) as flops:
        loss.backward()
    # The lowest active module still computes input gradients of its first matrices, for its norm's weights.
    assert flops.get_total_flops() == backward_flops(units) - sum(saved_flops(units, active))
