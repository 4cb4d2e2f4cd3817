"""models/hyla: the definition against loops, tiles against the definition in float64, memory, bfloat16, layers."""

import math
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_attent.models.hyla import layer, tiled, tiles
from titan_attent.models.hyla.attention import (
    NORMALIZATIONS,
    VALUE_NETWORKS,
    Form,
    allowed,
    distances,
    plain_attention,
)
from titan_attent.models.hyla.layer import HyperAttention, Spread
from titan_attent.models.hyla.tiled import tile_sizes, tiled_attention

ROWS, HEADS, WIDTH, VALUE_WIDTH = 2, 4, 6, 5


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.to(dtype).requires_grad_()


def qkv(num_queries: int, num_keys: int, *, kv_heads: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        normal(ROWS, num_queries, HEADS, WIDTH, seed=1, dtype=dtype),
        normal(ROWS, num_keys, kv_heads, WIDTH, seed=2, dtype=dtype),
        normal(ROWS, num_keys, kv_heads, VALUE_WIDTH, seed=3, dtype=dtype),
    ]


def loops(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, bias: Tensor, form: Form, hyper: bool) -> Tensor:
    """The formulas of attention.py, number by number."""
    rows, num_queries, heads, width = q.shape
    output = torch.zeros(rows, num_queries, heads, v.shape[3], dtype=torch.float64)
    group = heads // k.shape[2]
    for b, i in product(range(rows), range(num_queries)):
        scores = [
            [float(q[b, i, h] @ k[b, j, h // group]) / math.sqrt(width) + float(bias[h, i, j]) for h in range(heads)]
            for j in range(k.shape[1])
        ]
        sees = [bool(mask[b, i, j]) for j in range(k.shape[1])]
        sums = [
            sum(math.exp(of_key[h]) for of_key, seen in zip(scores, sees, strict=True) if seen) for h in range(heads)
        ]
        for j, of_key in enumerate(scores):
            code = [score if sees[j] else 0.0 for score in of_key]
            if form.normalization == "rms_head":
                code = [score / math.sqrt(sum(one**2 for one in code) / heads + 1e-6) for score in code]
            elif form.normalization == "softmax":
                code = [math.exp(score) / total if sees[j] else 0.0 for score, total in zip(of_key, sums, strict=True)]
            hidden = sum((code[h] * v[b, j, h // group] for h in range(heads)), torch.zeros(1, dtype=torch.float64))
            if form.value_network == "relu":
                hidden = hidden.clamp(min=0)
            for h in range(heads):
                output[b, i, h] += code[h] * (hidden if hyper else v[b, j, h // group])
    return output


@pytest.mark.parametrize("form", [Form(*pair) for pair in product(NORMALIZATIONS, VALUE_NETWORKS)])
@pytest.mark.parametrize("hyper", [True, False])
def test_the_definition(form: Form, hyper: bool) -> None:
    q, k, v = (tensor.detach() for tensor in qkv(3, 5, kv_heads=2))
    mask = allowed(
        3, 5, start=2, causal=True, segments=(torch.tensor([[0, 1, 1]] * 2), torch.tensor([[0, 0, 0, 1, 1]] * 2))
    )
    assert mask[0].int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    bias = normal(HEADS, 3, 5, seed=4).detach()
    found = plain_attention(q, k, v, mask=mask, bias=bias, form=form, is_hypernetwork=hyper)
    expected = loops(q, k, v, mask=mask.expand(ROWS, -1, -1), bias=bias, form=form, hyper=hyper)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_torchs_own_softmax_attention() -> None:
    q, k, v = qkv(7, 7)
    found = plain_attention(
        q, k, v, mask=allowed(7, 7, start=0, causal=True), form=Form("softmax"), is_hypernetwork=False
    )
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


CASES: list[dict[str, Any]] = [
    {},
    {"kv_heads": 1},
    {"kv_heads": 2, "start": 5, "bias": True},
    {"causal": False},
    {"causal": False, "segments": True, "bias": True},
    {"segments": True, "kv_heads": 2, "start": 4},
]


@pytest.mark.parametrize("form", [Form(*pair) for pair in product(NORMALIZATIONS, VALUE_NETWORKS)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_are_the_definition(form: Form, case: dict[str, Any]) -> None:
    """Values and gradients; 37 positions are cut into tiles of 13, and rows one by one."""
    start, causal = case.get("start", 0), case.get("causal", True)
    num_queries, num_keys = 37, 37 + start
    leaves = qkv(num_queries, num_keys, kv_heads=case.get("kv_heads", HEADS))
    table = normal(HEADS, num_keys + 3, seed=4) if case.get("bias") else None
    segments = None
    if case.get("segments"):
        numbers = torch.tensor([[0] * 11 + [1] * 20 + [4] * (6 + start), [2] * 30 + [3] * (7 + start)])
        segments = (numbers[:, start:], numbers)
    bias = None if table is None else table[:, distances(num_queries, num_keys, start=start)]
    mask = allowed(num_queries, num_keys, start=start, causal=causal, segments=segments)
    plain = plain_attention(*leaves, mask=mask, bias=bias, form=form)
    by_tiles = tiled_attention(
        *leaves, bias=table, segments=segments, start=start, causal=causal, form=form, max_values=16 * 16 * 6
    )
    leaves += [] if table is None else [table]
    grad = normal(*plain.shape, seed=5).detach()
    expected = plain, *torch.autograd.grad(plain, leaves, grad)
    found = by_tiles, *torch.autograd.grad(by_tiles, leaves, grad)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-12 * other.abs().max()


def test_tiles_of_one_row_and_of_all() -> None:
    assert tile_sizes(8, 1000, 2000, 64, max_values=64 * 100 * 100) == (1, 100, 100)
    assert tile_sizes(8, 30, 37, 64, max_values=64 * 5000) == (4, 30, 37)
    assert tile_sizes(2, 37, 42, 64, max_values=1) == (1, 13, 14)
    leaves = [*qkv(37, 37), normal(HEADS, 37, seed=4)]
    plain = plain_attention(
        *leaves[:3], mask=allowed(37, 37, start=0, causal=True), bias=leaves[3][:, distances(37, 37, start=0)]
    )
    for max_values in (ROWS * 6 * 37 * 37, 6 * 37 * 37, 6 * 16 * 16):
        found = tiled_attention(*leaves[:3], bias=leaves[3], max_values=max_values)
        torch.testing.assert_close(found, plain)
        of_tiles, of_plain = (torch.autograd.grad(x.sin().sum(), leaves, retain_graph=True) for x in (found, plain))
        torch.testing.assert_close(of_tiles, of_plain)


def test_tiles_at_every_start() -> None:
    """Among them tiles of queries that see one key of a tile of keys, and all but one."""
    for start in range(18):
        q, k, v = (tensor.detach() for tensor in qkv(27, 27 + start))
        plain = plain_attention(q, k, v, mask=allowed(27, 27 + start, start=start, causal=True))
        torch.testing.assert_close(tiled_attention(q, k, v, start=start, max_values=1), plain)


@pytest.mark.parametrize(("causal", "tiles_of_a_row"), [(True, 6), (False, 9)])
def test_tiles_that_the_mask_hides_are_skipped(
    causal: bool, tiles_of_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    for name in ("forward_tile", "backward_tile"):
        function = getattr(tiles, name)
        monkeypatch.setattr(
            tiles, name, lambda *args, name=name, function=function: computed.append(name) or function(*args)
        )
    tiled_attention(*qkv(37, 37), causal=causal, max_values=1).sum().backward()
    expected = ROWS * tiles_of_a_row
    assert [computed.count(name) for name in ("forward_tile", "backward_tile")] == [expected, expected]


def test_bfloat16_is_accumulated_in_float32() -> None:
    """With as many tiles as there are, the error stays that of one rounding of the inputs."""
    q, k, v = (tensor.detach() for tensor in qkv(64, 64, dtype=torch.bfloat16))
    exact = plain_attention(*(x.double() for x in (q, k, v)), mask=allowed(64, 64, start=0, causal=True))
    found = tiled_attention(q, k, v, max_values=16 * 16 * 6)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.01 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        full = tiled_attention(*(x.float() for x in (q, k, v)))
    torch.testing.assert_close(full, exact.float(), rtol=1e-4, atol=1e-4)


def test_small_parts_of_many_tiles_are_not_lost_in_bfloat16() -> None:
    """One head's weights are 1 here; 256 + 1 is 256 in bfloat16, so that a sum in it would stay at the first part."""
    length = 17 * 16
    q, k = (torch.ones(1, length, 1, 1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    parts = torch.full((1, length, 1, 1), 1 / 16, dtype=torch.bfloat16)
    parts[:, :16] = 16
    v = parts.clone().requires_grad_()
    output = tiled_attention(q, k, v, causal=False, max_values=1)
    output.backward(parts)
    assert (output == 256 + 16).all() and v.grad is not None and (v.grad == 256 + 16).all()


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that was made, inside the operators too."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def test_no_tensor_is_quadratic() -> None:
    length, max_values = 128, 6 * 16 * 16
    q, k, v = qkv(length, length)
    inputs = ROWS * length * HEADS * WIDTH
    with Largest() as seen, torch.no_grad():
        settings = (0, True, "rms_head", "relu", max_values, "")
        output, lse = tiled._attention._init_fn(q, k, v, None, None, None, *settings)
        tiled._attention_backward._init_fn(output, lse, q, k, v, None, None, None, *settings)
    assert seen.largest <= max(inputs, max_values)
    with Largest() as seen, torch.no_grad():
        plain_attention(q, k, v)
    assert seen.largest >= ROWS * length * length * VALUE_WIDTH


def test_the_operators_fake_results() -> None:
    for form in (Form(), Form("softmax")):
        q, k, v = qkv(5, 5, kv_heads=2)
        table = normal(HEADS, 5, seed=4)
        arguments = (q, k, v, table, None, None, 0, True, form.normalization, form.value_network, 0, "")
        torch.library.opcheck(
            torch.ops.titan_attent.hyla_attention.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_norm_of_the_output() -> None:
    q, k, v = qkv(200, 200)
    sizes = {
        output_norm: HyperAttention(Form(), output_norm=output_norm)(q, k, v).square().mean(dim=(0, 2, 3)).sqrt()
        for output_norm in (False, True)
    }
    assert sizes[False][150:].mean() > 3 * sizes[False][:20].mean()  # it grows with the number of keys
    torch.testing.assert_close(sizes[True], torch.ones(200, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_module_of_a_layer() -> None:
    """Documents, the table of biases, no later keys, and a norm of each head alone."""
    leaves, table = [x.detach() for x in qkv(9, 9, kv_heads=2)], normal(HEADS, 9, seed=4).detach()
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [2] * 2])
    mask = allowed(9, 9, start=0, causal=True, segments=(documents, documents))
    plain = plain_attention(*leaves, mask=mask, bias=table[:, distances(9, 9, start=0)])
    by_head = plain / (plain.square().mean(dim=3, keepdim=True) + 1e-6).sqrt()
    for output_norm, expected in ((False, plain), (True, by_head)):
        found = HyperAttention(Form(), output_norm=output_norm)(*leaves, segments=documents, bias=table)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("size", "balanced"), [(2, True), (3, True), (3, False)])
def test_ranks_with_parts_of_the_rows_are_the_whole(size: int, balanced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes: an all-gather that puts the ranks' parts one after the other, as torch's own does."""
    length, bias = 24, normal(HEADS, 24, seed=4)
    q, k, v = qkv(length, length, kv_heads=2)
    form, spans = Form(), torch.arange(length).chunk(2 * size if balanced else size)
    whole = HyperAttention(form, output_norm=True)(q, k, v, bias=bias)
    held = [torch.cat((spans[r], spans[-1 - r])) if balanced else spans[r] for r in range(size)]

    def all_gather(x: Tensor, *, gather_dim: int, group: str) -> Tensor:
        assert (gather_dim, group) == (1, "cp") and torch.equal(x, torch.cat((k, v), dim=3)[:, held[rank]])
        return torch.cat([torch.cat((k, v), dim=3)[:, part] for part in held], dim=1)

    monkeypatch.setattr(layer, "_all_gather", all_gather)
    for rank in range(size):
        module = HyperAttention(form, output_norm=True)
        mesh: Any = SimpleNamespace(get_local_rank=partial(int, rank), size=lambda: size, get_group=lambda: "cp")
        module.spread = Spread(mesh, balanced)
        found = module(*(x[:, held[rank]] for x in (q, k, v)), bias=bias)
        torch.testing.assert_close(found, whole[:, held[rank]])


def test_a_tile_of_bfloat16_has_scores_and_their_gradients_in_float32() -> None:
    q, k, v = (tensor.detach() for tensor in qkv(5, 5, dtype=torch.bfloat16))
    bias = torch.full((HEADS, 5, 5), 1e-3)
    scores = tiles.scores_of(q, k, None, bias, normalization="rms_head")
    exact = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()).bfloat16().float() * WIDTH**-0.5 + bias
    torch.testing.assert_close(scores, exact, rtol=1e-6, atol=1e-7)
    *_, grad_scores = tiles.backward_tile(q, k, v, None, bias, None, torch.ones_like(v), None, "none", "relu")
    assert grad_scores.dtype == torch.float32


def test_the_functions_of_a_tile_are_compiled_by_the_backend_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(function: Any, backend: str) -> Any:
        compiled.append((function.__name__, backend))
        return function

    monkeypatch.setattr(tiled, "_compiled", compile_)
    module = HyperAttention(Form())
    module(*qkv(5, 5)).sum().backward()
    assert compiled == []
    module.backend = "inductor"
    module(*qkv(5, 5)).sum().backward()
    assert compiled == [(name, "inductor") for name in ("forward_tile", "backward_tile", "weighted_gradients")]
