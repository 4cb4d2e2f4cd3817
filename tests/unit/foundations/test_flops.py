"""FLOPs of every model family against torch's FLOP counter, also where the widths of the attention heads do not add up
to ``dim``."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.parallel_world import FLAVORS, config_of, spec_of
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.attention import FlexAttentionWrapper, ScaledDotProductAttentionWrapper

from titan_attent.foundations.flops import product_flops
from titan_attent.models.hyla.attention import plain_attention
from titan_attent.models.hyla.layer import HyperAttention
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.policy import History, decide
from titan_attent.systems.freezing.units import backward_flops, find_units, saved_flops
from titan_attent.systems.highway.account import HighwayAccount
from titan_attent.titan.patches.cpu_attention import dense_attention

SEQ_LEN = 16
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("llama3", "cell", {}),
    "llama3, as many keys as queries": ("llama3", "cell", {"n_kv_heads": None}),
    "llama4": ("llama4", "cell", {}),
    "llama4, experts in each layer": ("llama4", "cell", {"interleave_moe_layer_step": 1}),
    "qwen3": ("qwen3", "cell", {}),
    "qwen3, heads wider than dim": ("qwen3", "cell", {"head_dim": 24}),
    "qwen3, heads narrower than dim": ("qwen3", "cell", {"head_dim": 4}),
    "qwen3, tied, wide": ("qwen3", "tied", {"head_dim": 24}),
    "qwen3, experts, wide": ("qwen3", "moe", {"head_dim": 16}),
    "deepseek_v3": ("deepseek_v3", "cell", {}),
    "deepseek_v3, narrow values": ("deepseek_v3", "cell", {"qk_nope_head_dim": 16, "v_head_dim": 4}),
    "deepseek_v3, wide values": ("deepseek_v3", "cell", {"qk_rope_head_dim": 4, "v_head_dim": 24}),
    "deepseek_v3, queries of low rank": ("deepseek_v3", "cell", {"q_lora_rank": 12, "v_head_dim": 12}),
    "hyla": ("hyla", "cell", {}),
    "hyla, the authors' blocks": ("hyla", "reference", {}),
    "gpt_oss, biases": ("gpt_oss", "cell", {}),
    "gpt_oss, wide": ("gpt_oss", "cell", {"head_dim": 16}),
    "gpt_oss, narrow": ("gpt_oss", "cell", {"head_dim": 6, "n_heads": 2, "n_kv_heads": 1}),
}


@pytest.fixture(autouse=True)
def countable_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as matrix products: torch does not count fused attention on CPU, and does not halve for a mask."""
    monkeypatch.setattr(ScaledDotProductAttentionWrapper, "sdpa_backends", [SDPBackend.MATH])
    monkeypatch.setattr(FlexAttentionWrapper, "forward", dense_attention)
    monkeypatch.setattr(HyperAttention, "forward", lambda self, q, k, v, **masks: plain_attention(q, k, v))


def model_of(case: str) -> Any:
    family, flavor, changes = CASES[case]
    args: Any = replace(FLAVORS[family][flavor], n_layers=2, **changes)
    if hasattr(args, "moe_args"):  # scores applied after the experts are a product outside any layer
        args = replace(args, moe_args=replace(args.moe_args, score_before_experts=True))
    args.update_from_config(config_of({"training.seq_len": SEQ_LEN}, data="", folder=""))
    model = spec_of(f"{family}_attent").model_cls(args)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model


def passes(model: Any) -> tuple[int, int]:
    """FLOPs of one example, forward and backward, as torch counts them."""
    tokens = torch.arange(SEQ_LEN)[None] * 7 % 512
    masks = {}
    if getattr(model.model_args, "attn_type", "sdpa") == "flex":
        masks["attention_masks"] = model.get_attention_masks(tokens, None, {})
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, **masks).square().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_torch_counts(case: str) -> None:
    model = model_of(case)
    units = find_units(model, seq_len=SEQ_LEN)
    blocks = list(model.layers.children())
    account = HighwayAccount(model, blocks, seq_len=SEQ_LEN, is_compiled=False)
    forward, backward = passes(model)
    assert sum(unit.forward for unit in units) == account.forward == forward
    assert backward_flops(units) == account.full == backward


@pytest.mark.parametrize("case", [case for case in CASES if "wide" in case or "narrow" in case])
def test_saved_flops_are_those_that_torch_no_longer_counts(case: str) -> None:
    model = model_of(case)
    units = find_units(model, seq_len=SEQ_LEN)
    config = FreezingConfig(policy="truncated", backward_share=0.6)
    active = decide(units, History(active=[True] * len(units)), config)
    assert not active[0] and active[-1]
    for unit, on in zip(units, active, strict=True):
        for parameter in unit.parameters:
            parameter.requires_grad_(on)
    assert passes(model)[1] == backward_flops(units) - sum(saved_flops(units, active))


@pytest.mark.parametrize("family", FLAVORS)
def test_the_products_of_stock_flavors_are_torchtitans(family: str) -> None:
    """torchtitan's FLOPs per token grow by 6 x layers x heads x widths per token of context."""
    for flavor, args in spec_of(f"{family}_attent").model_args.items():
        with torch.device("meta"):
            empty: Any = nn.Linear(1, 1)
        by_token = [args.get_nparams_and_flops(empty, length)[1] for length in (1024, 2048)]
        products = 3 * args.n_layers * product_flops(args, seq_len=1024)
        assert products == (by_token[1] - by_token[0]) * 1024, flavor
    assert product_flops(None, seq_len=SEQ_LEN) == 0
    assert product_flops(SimpleNamespace(dim=8), seq_len=SEQ_LEN) == 0, "a model without attention"
