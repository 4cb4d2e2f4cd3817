"""titan/models/hyla.py and models/hyla/reference.py: the models of hyla_attent, their sizes and their refusals."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.parallel_world import FLAVORS, config_of
from torch import nn
from torchtitan.models.llama3.infra import parallelize as llama

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.hyla.attention import Form, allowed, distances, plain_attention
from titan_attent.models.hyla.layer import HyperAttention
from titan_attent.models.hyla.reference import ReferenceBlock, bucket_of
from titan_attent.tasks.fuzzy_logic import FuzzyLogic
from titan_attent.titan.models.hyla import (
    HylaAttention,
    HylaModelArgs,
    HylaText,
    HylaTransformer,
    flavors,
    parallelize,
)
from titan_attent.titan.train_spec import attent_spec


def number_of_parameters(name: str, flavor: str) -> int:
    spec = attent_spec(name)
    args: Any = spec.model_args[flavor]
    args.vocab_size = args.vocab_size or 64
    with torch.device("meta"):
        return sum(weight.numel() for weight in spec.model_cls(args).parameters())


@pytest.mark.parametrize("flavor", ["bench", "tiny", "125M", "8B"])
def test_flavors_have_the_weights_of_llama3(flavor: str) -> None:
    assert number_of_parameters("hyla_attent", flavor) == number_of_parameters("llama3_attent", flavor)


def test_the_sections_keys_reach_the_attention() -> None:
    keys = {"hyla.normalization": "softmax", "hyla.value_network": "linear", "hyla.output_norm": True}
    for flavor, causal in (("bench", True), ("reference_sraven", False)):
        args: Any = flavors()[flavor]
        args.update_from_config(config_of(keys | {"training.seq_len": 24}, data="", folder=""))
        args.vocab_size = 64
        for block in HylaTransformer(args).layers.values():
            inner: Any = block.attention.inner_attention  # type: ignore[union-attr]
            assert (inner.form, inner.causal, inner.output_norm) == (Form("softmax", "linear"), causal, True)


def test_a_later_token_changes_no_earlier_logit() -> None:
    model = HylaTransformer(replace(FLAVORS["hyla"]["cell"], max_seq_len=16))  # type: ignore[call-arg, arg-type]
    with torch.no_grad():
        model.init_weights()
        tokens = torch.arange(16)[None]
        changed = torch.cat((tokens[:, :9], tokens[:, 9:] + 100), dim=1)
        difference = (model(tokens) - model(changed)).abs().amax(dim=2)[0]
    assert (difference[:9] == 0).all() and (difference[9:] > 0).all()


@pytest.mark.parametrize("restarts", [False, True])
def test_a_llama_layer_by_hand(restarts: bool) -> None:
    """RoPE of queries and keys by their positions, grouped keys, a causal mask, documents whose positions restart."""
    args: Any = FLAVORS["hyla"]["cell"]
    length, width = 9, args.dim // args.n_heads
    layer = HylaAttention(args)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [2] * 2])
    positions = torch.tensor([[*range(4), *range(5)], [*range(7), *range(2)]])
    given = (documents, positions) if restarts else (None, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    x = torch.randn(2, length, args.dim, generator=generator)
    angles = torch.arange(length)[:, None] * args.rope_theta ** (-torch.arange(0, width, 2) / width)
    found = layer(x, torch.polar(torch.ones_like(angles), angles), *given)

    turns = angles[positions if restarts else torch.arange(length).expand(2, -1)][:, :, None]  # [B, T, 1, width / 2]
    q, k, v = ((x @ w.weight.T).reshape(2, length, -1, width) for w in (layer.wq, layer.wk, layer.wv))
    q, k = (
        torch.stack((a * turns.cos() - b * turns.sin(), a * turns.sin() + b * turns.cos()), dim=4).flatten(3)
        for a, b in ((y[..., 0::2], y[..., 1::2]) for y in (q, k))
    )
    mask = allowed(length, length, start=0, causal=True, segments=(documents, documents) if restarts else None)
    expected = plain_attention(q, k, v, mask=mask).flatten(2) @ layer.wo.weight.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiles", [False, True])
def test_what_a_parallel_model_gets(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of its tiles, its ranks' positions, and a saved result under selective activation checkpointing."""
    mesh: Any = object()
    model: Any = HylaTransformer(replace(FLAVORS["hyla"]["cell"], max_seq_len=16))  # type: ignore[call-arg, arg-type]
    modules = [block.attention.inner_attention for block in model.layers.values()]

    def parallelize_llama(model: Any, dims: Any, config: Any) -> Any:
        llama.apply_cp_to_attention_module(modules, mesh, "hyla")
        return model

    monkeypatch.setattr(llama, "parallelize_llama", parallelize_llama)
    monkeypatch.setattr(llama, "_op_sac_save_list", set())
    settings = {"compile.enable": compiles, "compile.backend": "aot_eager"}
    dims: Any = None
    assert parallelize(model, dims, config_of(settings, data="", folder="")) is model
    for module in modules:
        assert module.backend == ("aot_eager" if compiles else "")
        assert module.spread is not None and module.spread.mesh is mesh and module.spread.balanced
    assert torch.ops.titan_attent.hyla_attention.default in llama._op_sac_save_list


# -- the authors' blocks ---------------------------------------------------------------------------------------------


def buckets_by_loops(length: int, num_buckets: int) -> list[int]:
    """T5's buckets, one by one, with as many buckets as the largest distance."""
    found = []
    for distance in range(length):
        exact = num_buckets // 2
        if distance < exact:
            found.append(distance)
            continue
        share = np.log(np.float32(distance) / exact + np.finfo(np.float32).eps) / np.log(num_buckets / exact)
        found.append(min(exact + int(share * (num_buckets - exact)), num_buckets - 1))
    return found


@pytest.mark.parametrize("num_buckets", [2, 16, 32, 36, 97])
def test_buckets(num_buckets: int) -> None:
    length = 2 * num_buckets
    assert bucket_of(torch.arange(length), num_buckets).tolist() == buckets_by_loops(length, num_buckets)


@pytest.mark.parametrize("num_buckets", [7, 4])
def test_a_block_by_hand(num_buckets: int) -> None:
    """LayerNorm, scores with the table's bias, HYLA, GELU by its tanh formula, two residuals; far keys share a bias."""
    torch.manual_seed(0)
    dim, heads, width, length = 12, 3, 2, 7
    inner = HyperAttention(Form(), causal=False)
    block = ReferenceBlock(dim, n_heads=heads, head_dim=width, hidden_dim=20, num_buckets=num_buckets, inner=inner)
    block.double().init_weights()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, length, dim, dtype=torch.float64)

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=2, keepdim=True)
        return centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias

    def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,od->bto", x, module.weight) + module.bias

    a, f = block.attention, block.feed_forward
    n = norm(block.attention_norm, x)
    q, k, v = (linear(w, n).reshape(2, length, heads, width) for w in (a.wq, a.wk, a.wv))
    bias = a.relative_bias[:, torch.tensor(buckets_by_loops(length, num_buckets))[distances(length, length, start=0)]]
    y = x + linear(a.wo, plain_attention(q, k, v, bias=bias).reshape(2, length, -1))
    hidden = linear(f.w1, norm(block.ffn_norm, y))
    gelu = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x), y + linear(f.w2, gelu), rtol=1e-9, atol=1e-9)
    documents = torch.tensor([0] * 3 + [1] * 4).expand(2, -1)
    alone = torch.cat((block(x[:, :3]), block(x[:, 3:])), dim=1)
    torch.testing.assert_close(block(x, attention_masks=documents), alone, rtol=1e-9, atol=1e-9)


def test_the_sizes_of_the_authors_configurations() -> None:
    """qk_dim and v_dim of their files are those of all heads together."""
    for name, layers, heads, qk_dim in (("reference_fuzzy_logic", 2, 8, 16), ("reference_sraven", 4, 16, 64)):
        args: Any = flavors()[name]
        assert (args.n_layers, args.n_heads, args.n_heads * args.head_dim) == (layers, heads, qk_dim)
        assert (args.dim, args.hidden_dim, args.is_reference, args.causal) == (128, 256, True, False)


def test_initial_weights_of_the_authors_model() -> None:
    args = HylaModelArgs(dim=128, n_layers=2, n_heads=8, head_dim=2, hidden_dim=256, is_reference=True, vocab_size=64)
    args.max_seq_len = 32
    model = HylaTransformer(args)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    w1 = model.layers["0"].feed_forward.w1.weight  # type: ignore[union-attr]
    assert w1.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert model.output.bias.abs().max() == 0
    biases = torch.stack([block.attention.relative_bias for block in model.layers.values()])  # type: ignore[union-attr, misc]
    assert biases.std().item() == pytest.approx(32**-0.5, rel=0.15)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hyla.normalization": "rms"}, r"\[hyla\] normalization = 'rms' is unknown"),
        ({"hyla.value_network": "gelu"}, r"\[hyla\] value_network = 'gelu' is unknown"),
        ({"parallelism.context_parallel_load_balancer": "ptrr"}, 'balancer = "ptrr": hyla_attent has no block mask'),
    ],
)
def test_values_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HylaText().check(config_of(settings, data="", folder=""))


class Labelled:
    """Examples of one row, whose labels are given."""

    columns = ("example_index",)
    shards: Any = SimpleNamespace(max_token_id=3, path="data")

    def __init__(self, labels: list[int]):
        self.labels = torch.tensor([labels])

    def __len__(self) -> int:
        return 1

    def read(self, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        assert ids.shape == (1, 1)
        return {}, self.labels


def test_labels_that_a_model_finds_in_its_input() -> None:
    def check(labels: list[int], flavor: str) -> None:
        args: Any = flavors()[flavor]
        args.vocab_size = 64
        HylaText().check_fit(Labelled(labels), args, model=f"hyla_attent {flavor}", key="path")

    check([IGNORE_INDEX, IGNORE_INDEX, 1], "reference_fuzzy_logic")
    check([2, 3, 1], "bench")
    for labels in ([IGNORE_INDEX, 3, 1], [IGNORE_INDEX, 1, IGNORE_INDEX]):
        with pytest.raises(ValueError, match=r"data: hyla_attent reference_fuzzy_logic sees later tokens"):
            check(labels, "reference_fuzzy_logic")


def test_the_authors_task_fits_the_authors_model() -> None:
    rows = FuzzyLogic(samples=4).rows("train", np.arange(3))
    assert rows.counts.reshape(3, -1)[:, :-1].sum() == 0 and rows.counts.reshape(3, -1)[:, -1].all()
