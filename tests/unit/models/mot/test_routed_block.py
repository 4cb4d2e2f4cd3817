"""The grouped block of the mixture of transformers against a loop over sequences and their experts."""

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from titan_attent.models.mot.block import RoutedBlock
from titan_attent.models.mot.grouped import RoutedLinear, group
from titan_attent.titan.models.mot import MixtureOfTransformers, MotArgs

B, L, E = 5, 7, 3
SIZES = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 8, "max_seq_len": 12}
ROUTES = torch.tensor([2, 0, 2, 2, 0])  # expert 1 gets nothing


def model_of(**changes: object) -> MixtureOfTransformers:
    torch.manual_seed(0)
    model = MixtureOfTransformers(MotArgs(**SIZES, num_experts=E, prefix=3, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions of one sequence [L, heads, d], by complex numbers in fp64."""
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * table[: len(x), None].to(torch.complex128)
    return torch.stack((pairs.real, pairs.imag), dim=-1).flatten(2).to(x.dtype)


def norm_of(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def matrix(linear: RoutedLinear, expert: int) -> Tensor:
    return linear.weight.chunk(linear.num_experts)[min(expert, linear.num_experts - 1)]


def plain_sequence(block: RoutedBlock, x: Tensor, table: Tensor, expert: int, probability: Tensor) -> Tensor:
    """One sequence [L, D] through one expert: no groups, no sorting, attention as a masked matrix per head."""
    attention, ffn = block.attention, block.feed_forward
    normed = norm_of(block.attention_norm, x)
    q, k, v = ((normed @ matrix(w, expert).T).unflatten(1, (-1, 4)) for w in (attention.wq, attention.wk, attention.wv))
    q, k = rotated(q, table), rotated(k, table)
    repeats = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // repeats].T / 2.0
        future = torch.ones(len(x), len(x)).triu(1).bool()
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, head // repeats])
    mixed = torch.cat(heads, dim=1) @ matrix(attention.wo, expert).T
    h = x + (mixed if block.shared_attention else probability * mixed)
    normed = norm_of(block.ffn_norm, h)
    hidden = F.silu(normed @ matrix(ffn.w1, expert).T) * (normed @ matrix(ffn.w3, expert).T)
    return h + probability * (hidden @ matrix(ffn.w2, expert).T)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grouped_equals_the_loop(dtype: torch.dtype, shared: bool) -> None:
    block = model_of(shared_attention=shared).layers["0"].to(dtype)
    table = torch.polar(torch.ones(L, 2, dtype=dtype), torch.randn(L, 2, dtype=dtype))
    block.attention.rotate = lambda q, k, t: tuple(torch.stack([rotated(one, t) for one in x]) for x in (q, k))
    x = torch.randn(B, L, 16, dtype=dtype, requires_grad=True)
    p = torch.rand(B, dtype=dtype, requires_grad=True)
    weights = torch.randn(B, L, 16, dtype=dtype)
    leaves = [x, p, *block.parameters()]
    out = block(x, table, ROUTES, p)
    expected = torch.stack([plain_sequence(block, x[b], table, int(ROUTES[b]), p[b]) for b in range(B)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    for grad, other in zip(grads, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, other, rtol=10 * tolerance, atol=10 * tolerance)


def test_an_expert_without_sequences_has_a_gradient_of_zeros() -> None:
    block = model_of().layers["0"]
    table = torch.polar(torch.ones(L, 2), torch.ones(L, 2))
    block(torch.randn(B, L, 16), table, ROUTES, torch.rand(B)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        if "norm" not in name:
            got = [chunk.abs().sum() > 0 for chunk in parameter.grad.chunk(E)]
            assert got == [True, False, True], name


def test_bfloat16_takes_one_grouped_product_per_layer() -> None:
    """grouped_mm and the products per sequence agree, values and gradients, with an empty group."""
    linear = RoutedLinear(16, 24, E)
    nn.init.normal_(linear.weight)
    groups = group(ROUTES, num_experts=E, seq_len=8)
    assert groups.ends.tolist() == [16, 16, 40] and groups.experts.tolist() == [0, 0, 2, 2, 2]
    x = torch.randn(B, 8, 16)[groups.order]
    weights = torch.randn(B, 8, 24)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        copy, inputs = RoutedLinear(16, 24, E).to(dtype), x.detach().to(dtype, copy=True).requires_grad_()
        copy.load_state_dict(linear.state_dict())
        out = copy(inputs, groups)
        (out * weights.to(dtype)).sum().backward()
        assert copy.weight.grad is not None and inputs.grad is not None and out.dtype == dtype
        results.append((out.float(), copy.weight.grad.float(), inputs.grad.float()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0.03, atol=0.15)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, groups).dtype == torch.bfloat16


def test_one_expert_is_torchtitans_llama() -> None:
    """With one expert the probability is 1, and the model is llama3 with the same weights."""
    torch.manual_seed(0)
    llama = Transformer(TransformerModelArgs(**SIZES))  # type: ignore[arg-type]
    model = MixtureOfTransformers(MotArgs(**SIZES, num_experts=1))  # type: ignore[arg-type]
    with torch.no_grad():
        llama.init_weights()
        model.init_weights()
    missing = model.load_state_dict(llama.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["gates.0.weight", "gates.1.weight"]
    tokens = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(model(tokens), llama(tokens), rtol=1e-5, atol=1e-5)


def test_nothing_leaks_into_tokens_that_count() -> None:
    """Logits at the position of the last token of the prefix, and later ones, depend on no later token."""
    model, prefix = model_of(), 3
    table, model.freqs_cis = model.freqs_cis, torch.empty(0)  # a cast of the model would drop the imaginary part
    model.double()
    model.freqs_cis = table
    tokens = torch.randint(0, 40, (16, 10))
    logits, routes = model(tokens), model.routes
    assert routes.unique().numel() > 1, "one route: the test would show nothing"
    changes = 0
    for position in range(10):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + torch.randint(1, 40, changed[:, position:].shape)) % 40
        other = model(changed)
        if position >= prefix:
            assert torch.equal(model.routes, routes)
            assert torch.allclose(other[:, :position], logits[:, :position], atol=1e-12)
        changes += int((model.routes != routes).sum())
    assert changes > 0, "the prefix decides nothing"


def test_checkpointed_and_compiled_blocks_compute_the_same() -> None:
    model, tokens = model_of(), torch.randint(0, 40, (B, L))
    expected = model(tokens)
    expected.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for name, block in list(model.layers.named_children()):
        model.layers.register_module(name, torch.compile(block, backend="aot_eager", fullgraph=True))
    out = model(tokens)
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name.replace("_orig_mod.", "")])
