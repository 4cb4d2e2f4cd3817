"""titan/document_mask.py: examples of a packed row do not see each other, in every family that has such masks.

In fp64: nothing leaks between examples, the logits of a packed row are those of each example alone in a row, and the
gradients of its loss are the sums of theirs. Masks and positions are compared with plain loops.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torchtitan.models.moe.moe as titan_moe
from distributed.parallel_world import FLAVORS, config_of
from integration import mixer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.protocols import BaseModelArgs

from titan_attent.titan import document_mask
from titan_attent.titan.document_mask import (
    check_document_mask,
    document_batch,
    document_kwargs,
    flex_masks,
    positions_of,
    varlen_metadata,
)
from titan_attent.titan.frozen_model import FrozenModel
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.models.flavors import flex_twins
from titan_attent.titan.train_spec import attent_spec

MASKED = {family: flavors for family, flavors in FLAVORS.items() if family != "mot"}
"""mot_attent routes a row as one, so it has no flavor with such masks."""
SEQ_LEN, VOCABULARY = 24, 512
INDEX = torch.tensor(
    [
        [0] * 5 + [1] * 1 + [2] * 11 + [3] * 7,  # an example of one token, then one longer than every inner block
        [0] * 24,
        [0] * 3 + [2] * 2 + [5] * 19,  # numbers may have gaps
    ]
)


# -- the functions against plain loops ---------------------------------------------------------------------------------


def spans_of(row: list[int]) -> list[tuple[int, int]]:
    """The first token of each example of a row, and the one behind its last."""
    firsts = [i for i in range(len(row)) if i == 0 or row[i] != row[i - 1]]
    return list(zip(firsts, [*firsts[1:], len(row)], strict=True))


def allowed(row: list[int], q: int, k: int, *, block: int = 0, window: int = 0) -> bool:
    """Whether token ``q`` of a row may attend to token ``k``."""
    ((first, end),) = [(first, end) for first, end in spans_of(row) if first <= q < end]
    if not first <= k <= q:
        return False
    if block and (q - first) // block != (k - first) // block:
        return False
    return not window or q - k < window


def by_loops(index: Tensor, **narrower: int) -> Tensor:
    length = index.shape[1]
    mask = torch.zeros(len(index), length, length, dtype=torch.bool)
    for b, row in enumerate(index.tolist()):
        for q in range(length):
            for k in range(length):
                mask[b, q, k] = allowed(row, q, k, **narrower)
    return mask


def dense(mask: Any, index: Tensor) -> Tensor:
    length = index.shape[1]
    return create_mask(mask.mask_mod, len(index), 1, length, length, device="cpu")[:, 0]


@pytest.mark.parametrize("index", [INDEX, INDEX[:1], INDEX.T.contiguous().T, torch.zeros(2, 6, dtype=torch.int64)])
def test_positions_restart_at_each_example(index: Tensor) -> None:
    expected = [[i - first for first, end in spans_of(row) for i in range(first, end)] for row in index.tolist()]
    assert positions_of(index).tolist() == expected
    assert positions_of(index).dtype == torch.int64


def test_masks_by_loops() -> None:
    llama3, llama4, gpt_oss = (FLAVORS[family]["cell"] for family in ("llama3", "llama4", "gpt_oss"))
    assert torch.equal(dense(flex_masks(llama3, INDEX), INDEX), by_loops(INDEX))
    masks: Any = flex_masks(replace(llama4, fixed_attn_block_size=4), INDEX)  # type: ignore[type-var]
    assert torch.equal(dense(masks["rope"], INDEX), by_loops(INDEX, block=4))
    assert torch.equal(dense(masks["nope"], INDEX), by_loops(INDEX))
    masks = flex_masks(replace(gpt_oss, sliding_window_size=3), INDEX)  # type: ignore[type-var]
    assert torch.equal(dense(masks["sliding_window_mask"], INDEX), by_loops(INDEX, window=3))
    assert torch.equal(dense(masks["basic_mask"], INDEX), by_loops(INDEX))


def test_the_blocks_of_a_mask_are_those_that_hold_an_allowed_pair() -> None:
    index = torch.tensor([[0] * 130 + [1] * 200 + [2] * 70, [0] * 400])
    mask: Any = flex_masks(FLAVORS["llama3"]["cell"], index)
    pairs = F.pad(by_loops(index), (0, 112, 0, 112)).view(2, 4, 128, 4, 128)
    assert torch.equal(mask.to_dense()[:, 0].bool(), pairs.any(dim=4).any(dim=2))


def test_varlen_metadata_by_loops() -> None:
    bounds = [b * SEQ_LEN + first for b, row in enumerate(INDEX.tolist()) for first, _ in spans_of(row)]
    for index, expected, longest in ((INDEX, [*bounds, INDEX.numel()], 24), (INDEX[:1], [0, 5, 6, 17, 24], 11)):
        metadata = varlen_metadata(index)
        assert metadata.cu_seq_q.tolist() == metadata.cu_seq_k.tolist() == expected
        assert metadata.cu_seq_q.dtype == torch.int32
        assert metadata.max_q == metadata.max_k == longest


# -- models in fp64 ----------------------------------------------------------------------------------------------------


def flavors() -> dict[str, BaseModelArgs]:
    """A tiny flavor of each family, with and without experts, that has flex or varlen attention, or hyla's."""
    args: dict[str, Any] = {family: copy.deepcopy(flavors["cell"]) for family, flavors in MASKED.items()}
    args["qwen3 with experts"] = copy.deepcopy(FLAVORS["qwen3"]["moe"])
    args["llama3 varlen"] = copy.deepcopy(args["llama3"])
    args["llama4 dense"] = replace(args["llama4"], interleave_moe_layer_step=9)
    args["deepseek_v3 dense"] = replace(args["deepseek_v3"], n_dense_layers=4)
    for name, one in args.items():
        if name != "hyla":
            one.attn_type = "varlen" if name.endswith("varlen") else "flex"
        one.max_seq_len, one.n_layers = SEQ_LEN, 3
        if name.startswith("llama4"):
            one.every_n_layers_nope, one.fixed_attn_block_size = 2, 4
        if name.startswith("deepseek_v3"):
            one.moe_impl = "standard"  # update_from_config sets it
    args["gpt_oss"].sliding_window_size = 4
    return args


ARGS = flavors()
CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}


class TorchInDouble:
    """The module torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def by_segments(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, metadata: VarlenMetadata, scale: float | None = None
) -> Tensor:
    """Varlen attention, whose kernel is for GPUs, in a plain loop over the sequences: [B * L, heads, width]."""
    heads = q.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    bounds = metadata.cu_seq_q.tolist()
    out = []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        parts = [x[first:end].transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0) for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute in fp64 throughout; torchtitan computes RoPE and the scores of experts in fp32."""
    monkeypatch.setattr(titan_moe, "torch", TorchInDouble())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(VarlenAttentionWrapper, "forward", by_segments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def model_of(name: str) -> nn.Module:
    spec = attent_spec(name.split()[0] + "_attent")
    model: Any = spec.model_cls(ARGS[name]).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (len(INDEX), SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


SPANS = [(b, first, end) for b, row in enumerate(INDEX.tolist()) for first, end in spans_of(row)]


@pytest.mark.parametrize("name", ARGS)
def test_no_gradient_crosses_from_one_example_into_another(name: str, double: None) -> None:
    model: Any = model_of(name)
    inputs, labels = tokens_and_labels()
    embedded = []
    model.tok_embeddings.register_forward_hook(lambda module, args, out: embedded.append(out))
    losses = token_losses(model(inputs, **document_kwargs(model, INDEX)), labels)
    for b, first, end in SPANS:
        (gradient,) = torch.autograd.grad(losses[b, first:end].sum(), embedded, retain_graph=True)
        inside = torch.zeros(INDEX.shape, dtype=torch.bool)
        inside[b, first:end] = True
        assert (gradient[~inside] == 0).all(), "exactly"
        assert (gradient[inside] != 0).any(dim=-1).all()


@pytest.mark.parametrize("name", ARGS)
def test_logits_and_gradients_are_those_of_each_example_alone(name: str, double: None) -> None:
    model: Any = model_of(name)
    inputs, labels = tokens_and_labels()
    logits = model(inputs, **document_kwargs(model, INDEX))
    token_losses(logits, labels).sum().backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for b, first, end in SPANS:
        row = inputs[b : b + 1, first:end]
        alone = model(row, **document_kwargs(model, torch.zeros_like(row)))
        torch.testing.assert_close(logits[b : b + 1, first:end], alone, **CLOSE)
        token_losses(alone, labels[b : b + 1, first:end]).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[parameter_name], parameter.grad, **CLOSE)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3"])
def test_an_example_alone_is_what_sdpa_computes(family: str, double: None) -> None:
    """The flex flavor with a row of one example, which needs no mask, and torchtitan's own forward of the sdpa one."""
    name = {"deepseek_v3": "deepseek_v3 dense"}.get(family, family)
    model: Any = model_of(name)
    inputs, _ = tokens_and_labels()
    stock_args: Any = copy.deepcopy(ARGS[name])
    stock_args.attn_type = "sdpa"
    stock = type(model)(stock_args).double()
    stock.load_state_dict(model.state_dict())
    for buffer_name, buffer in model.named_buffers():
        stock.get_buffer(buffer_name).copy_(buffer)
    masked = model(inputs, **document_kwargs(model, torch.zeros_like(inputs)))
    torch.testing.assert_close(masked, stock(inputs), **CLOSE)


def test_positions_are_passed_where_they_are_taken() -> None:
    for family in MASKED:
        spec = attent_spec(f"{family}_attent")
        with torch.device("meta"):
            model = spec.model_cls(ARGS[family])
        kwargs = document_kwargs(model, INDEX)
        assert kwargs.keys() == ({"attention_masks"} if family == "gpt_oss" else {"attention_masks", "positions"})


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_without_the_index_has_one_example_per_row(double: None) -> None:
    model = model_of("llama3")
    inputs, labels = tokens_and_labels()
    batch = {"input": inputs, "example_index": INDEX}
    results = document_batch(model, batch, labels)
    assert results[0] is inputs and results[1] is labels and results[2] == {}
    assert torch.equal(results[3]["positions"], positions_of(INDEX))
    assert batch.keys() == {"input", "example_index"}, "the caller's dictionary stays as it is"
    *_, others, kwargs = document_batch(model, {"input": inputs, "extra": labels}, labels)
    assert others.keys() == {"extra"}
    assert torch.equal(kwargs["positions"], torch.arange(SEQ_LEN).expand_as(inputs))


def test_a_frozen_model_masks_documents_too(double: None) -> None:
    from contextlib import nullcontext

    model = model_of("llama3")
    inputs, _ = tokens_and_labels()
    frozen = FrozenModel(model, tokenizer=None, precision=nullcontext, document_mask=True)
    assert torch.equal(frozen(inputs, INDEX), model(inputs, **document_kwargs(model, INDEX)))
    assert torch.equal(frozen(inputs), model(inputs, **document_kwargs(model, torch.zeros_like(inputs))))
    assert not torch.equal(frozen(inputs), frozen(inputs, INDEX))


def test_llama4_looks_its_masks_up_without_the_key_too(double: None) -> None:
    """torchtitan 0.2.2 passes all masks to the attention, which fails."""
    model: Any = model_of("llama4 dense")
    inputs, _ = tokens_and_labels()
    masks = model.get_attention_masks(inputs, None, {})
    logits = model(inputs, attention_masks=masks)
    one = torch.zeros_like(inputs)
    torch.testing.assert_close(logits, model(inputs, **document_kwargs(model, one)), **CLOSE)


# -- flavors and refusals ----------------------------------------------------------------------------------------------


def test_twins_with_flex_attention() -> None:
    for family, names in {"llama3": ["tiny", "bench", "70B"], "qwen3": ["debugmodel", "0.6B", "30B-A3B"]}.items():
        args: Any = attent_spec(f"{family}_attent").model_args
        for name in names:
            twin = args[f"{name}_flex"]
            assert twin.attn_type == "flex" and args[name].attn_type == "sdpa"
            assert replace(twin, attn_type="sdpa") == args[name]
    assert "debugmodel_flex" not in attent_spec("llama3_attent").model_args, "torchtitan's own has another name"
    assert flex_twins({"a": ARGS["llama3"]}) == {}


def refusal(settings: dict[str, Any], *, unit: str = "document") -> str:
    config = config_of({"data.document_mask": True} | settings, data="", folder="")
    config.data.unit = unit
    with pytest.raises(ValueError) as error:
        check_document_mask(config, attent_spec(config.model.name))
    return str(error.value)


FLEX = {"model.flavor": "tiny_flex"}


def test_refused_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mixer", mixer.FAMILIES[0])
    assert 'with unit = "window": a window is one example' in refusal(FLEX, unit="window")
    message = refusal({"model.name": "vit_attent", "model.flavor": "tiny"})
    assert "vit_attent trains on images, which have no documents. Set it to false" in message
    message = refusal({"model.flavor": "tiny"})
    assert 'the attention (sdpa) of [model] flavor = "tiny" takes no mask' in message
    assert message.endswith(
        "with flex attention: debugmodel_flex_attn, 8B_flex, 70B_flex, 405B_flex, tiny_flex, bench_flex, "
        "bench_source_flex, bench_125m_flex, bench_gpu_flex, 10M_flex, 30M_flex, 60M_flex, 125M_flex, 350M_flex"
    )
    message = refusal({"model.name": "mixer_attent", "model.flavor": "small"})
    assert message.endswith("takes no mask. mixer_attent lacks a flavor with flex attention. Set it to false")
    message = refusal(FLEX | {"parallelism.context_parallel_degree": 2})
    assert "context_parallel_degree = 2 with [data] document_mask = true: torchtitan 0.2.2 numbers positions" in message
    message = refusal({"model.flavor": "debugmodel_varlen_attn", "parallelism.pipeline_parallel_degree": 2})
    assert "pipeline_parallel_degree = 2 with [data] document_mask = true: a pipeline cannot split the" in message


@pytest.mark.parametrize("family", MASKED)
def test_every_family_names_flavors_that_are_granted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_mask.compat, "IS_CPU", False)
    args: Any = attent_spec(f"{family}_attent").model_args
    granted = [name for name, one in args.items() if one.attn_type in ("flex", "varlen", "hyla")]
    assert granted
    for name in granted:
        config = config_of(
            {"data.document_mask": True, "model.name": f"{family}_attent", "model.flavor": name}, data="", folder=""
        )
        config.data.unit = "document"
        check_document_mask(config, attent_spec(config.model.name))
    for name in args.keys() - set(granted):
        assert ", ".join(granted) in refusal({"model.name": f"{family}_attent", "model.flavor": name})


def test_off_is_never_refused() -> None:
    for name in ("llama3_attent", "vit_attent"):
        config = config_of({"model.name": name, "model.flavor": "tiny"}, data="", folder="")
        check_document_mask(config, attent_spec(name))
