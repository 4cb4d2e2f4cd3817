"""Cuts at the branches: every gradient against a model with explicit branches, and the FLOPs saved."""

import copy

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models import llama3, llama4, qwen3
from torchtitan.models.moe import MoEArgs

from titan_attent.systems.highway.branches import BranchCuts
from titan_attent.systems.highway.links import Cuts
from titan_attent.systems.highway.sweep import sweep

SMALL = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "max_seq_len": 8}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama3":
        model: nn.Module = llama3.Transformer(llama3.TransformerModelArgs(**SMALL, multiple_of=16))
    else:
        model = qwen3.Qwen3Model(qwen3.Qwen3ModelArgs(**SMALL, head_dim=8, hidden_dim=64))
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape) / max(1, weight.shape[-1]) ** 0.5
    return model.double()


def loss_of(model: nn.Module, head_input: Tensor | None = None) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8) * 5 % 64
    logits = model(tokens) if head_input is None else model.output(model.norm(head_input))
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens.roll(1, 1), reduction="sum")


def cut_backward(model: nn.Module, *, microbatches: int = 1) -> tuple[dict[str, Tensor], int]:
    """(gradients, FLOPs of the backward)."""
    blocks = list(model.layers.children())
    branches = BranchCuts(blocks)
    cuts = Cuts(blocks, root=model, needs_input_gradients=lambda: False)
    for _ in range(microbatches):
        branches.switch.is_on = True
        loss = loss_of(model)
        with FlopCounterMode(display=False) as flops:
            loss.backward()
            top = cuts.gradient()
            assert top is not None
            cuts.send_below(sweep(cuts.links, top, iterations=0))
    branches.norm_gradients()
    branches.remove()
    cuts.remove()
    return {n: w.grad for n, w in model.named_parameters() if w.grad is not None}, flops.get_total_flops()


def written_out(model: nn.Module) -> dict[str, Tensor]:
    """The expected gradients: each branch gets that of the last block's output, and passes none to its input."""
    rope = model.freqs_cis if hasattr(model, "freqs_cis") else model.rope_cache
    tokens = torch.arange(16).reshape(2, 8) * 5 % 64
    bottom = model.tok_embeddings(tokens)
    h, outputs = bottom.detach(), [bottom]
    for block in model.layers.children():
        for norm, branch in ((block.attention_norm, block.attention), (block.ffn_norm, block.feed_forward)):
            extra_args = (rope, None) if branch is block.attention else ()
            outputs.append(branch(norm(h), *extra_args))
            h = (h + outputs[-1]).detach()
    top = h.requires_grad_()
    loss_of(model, top).backward()
    assert top.grad is not None
    torch.autograd.backward(outputs, [top.grad] * len(outputs))
    return {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_all_gradients_with_those_of_the_norms(name: str) -> None:
    model = model_of(name)
    found, _ = cut_backward(copy.deepcopy(model), microbatches=2)
    expected = written_out(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], 2 * gradient, rtol=1e-9, atol=1e-9, msg=weight)


def test_a_norms_weight_of_zero_gets_zero() -> None:
    model = model_of("llama3")
    model.layers["1"].ffn_norm.weight.data[3] = 0.0
    found, _ = cut_backward(model)
    gradient = found["layers.1.ffn_norm.weight"]
    assert gradient[3] == 0 and gradient.isfinite().all() and (gradient != 0).sum() == 31


def test_a_norm_before_a_frozen_projection_gets_no_gradient() -> None:
    model = model_of("llama3")
    model.layers["1"].attention.wk.requires_grad_(False)
    found, _ = cut_backward(model)
    assert "layers.1.attention_norm.weight" not in found and "layers.1.ffn_norm.weight" in found


def test_saved_flops() -> None:
    """Cuts at branches save a quarter of the backward or more; cuts at blocks save no matrix product."""
    whole, model = model_of("llama3"), model_of("llama3")
    loss = loss_of(whole)
    with FlopCounterMode(display=False) as exact:
        loss.backward()
    cuts = Cuts(list(model.layers.children()), root=model, needs_input_gradients=lambda: False)
    loss = loss_of(model)
    with FlopCounterMode(display=False) as at_blocks:
        loss.backward()
        cuts.send_below(sweep(cuts.links, cuts.gradient(), iterations=0))
    cuts.remove()
    assert at_blocks.get_total_flops() == exact.get_total_flops()
    _, at_branches = cut_backward(model_of("llama3"))
    tokens, dim = 16, SMALL["dim"]
    block = whole.layers["0"]
    projections = dim * (dim + 2 * dim // 2) + 2 * block.feed_forward.w1.weight.numel()
    assert exact.get_total_flops() - at_branches == 2 * tokens * projections * SMALL["n_layers"]


def test_switched_off_it_cuts_nothing() -> None:
    model, expected = model_of("llama3"), model_of("llama3")
    loss_of(expected).backward()
    BranchCuts(list(model.layers.children()))
    loss_of(model).backward()
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert weight.grad is not None and other.grad is not None and weight.grad.equal(other.grad)


def test_experts_are_refused() -> None:
    experts = MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, use_grouped_mm=False)
    model = llama4.Transformer(llama4.TransformerModelArgs(**SMALL, multiple_of=16, moe_args=experts))
    with pytest.raises(ValueError, match=r'cut = "branch".*feed_forward.*Set cut = "block"'):
        BranchCuts(list(model.layers.children()))
