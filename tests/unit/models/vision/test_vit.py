"""models/vision/vit.py against torch's encoder layers in float64, loops over patches, and torch's count of FLOPs."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_attent.models.vision.blocks import patchify, sincos_positions
from titan_attent.models.vision.vit import VisionTransformer, ViTArgs

SIZES: dict[str, Any] = {"dim": 16, "n_layers": 3, "n_heads": 2, "patch_size": 4, "image_size": 12, "num_classes": 5}
KEEP = torch.tensor([[1.0, 0.0, 1.25], [1.0, 1.5, 0.0]])


def make(*, dtype: torch.dtype = torch.float32, **changes: Any) -> VisionTransformer:
    """A model with all weights random, including the head."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTArgs(**(SIZES | changes)))
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def images_of(model: VisionTransformer, *, num: int = 2) -> torch.Tensor:
    args = model.model_args
    shape = num, args.channels, args.image_size, args.image_size
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def torchs_layer(block: Any, args: ViTArgs) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of ``block``."""
    layer = nn.TransformerEncoderLayer(
        args.dim,
        args.n_heads,
        args.hidden_ratio * args.dim,
        dropout=0.0,
        activation=nn.functional.gelu,
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    a, f = block.attention, block.feed_forward
    state = {
        "self_attn.in_proj_weight": torch.cat((a.wq.weight, a.wk.weight, a.wv.weight)),
        "self_attn.in_proj_bias": torch.cat((a.wq.bias, a.wk.bias, a.wv.bias)),
    }
    names = {"self_attn.out_proj": a.wo, "linear1": f.w1, "linear2": f.w2}
    names |= {"norm1": block.attention_norm, "norm2": block.ffn_norm}
    for name, module in names.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    layer.load_state_dict(state)
    return layer


def plain_logits(model: Any, images: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, num_classes], image by image: patches cut out by hand, torch's layers."""
    args, p, rows = model.model_args, model.model_args.patch_size, []
    layers = [torchs_layer(block, args) for block in model.layers.values()]
    for b, image in enumerate(images):
        tokens = [] if model.class_token is None else [model.class_token]
        tokens += [] if model.registers is None else list(model.registers)
        for number in range(args.num_patches):
            y, x = divmod(number, args.image_size // p)
            patch = image[:, y * p : (y + 1) * p, x * p : (x + 1) * p].permute(1, 2, 0).reshape(-1)
            tokens.append(model.tok_embeddings.weight @ patch + model.tok_embeddings.bias + model.positions[number])
        x = torch.stack(tokens)[None]
        for number, layer in enumerate(layers):
            scale = 1.0 if keep is None else keep[b, number]
            x = x + scale * layer._sa_block(layer.norm1(x), None, None)
            x = x + scale * layer._ff_block(layer.norm2(x))
        x = nn.functional.layer_norm(x[0], (args.dim,), model.norm.weight, model.norm.bias, eps=1e-6)
        extra = len(tokens) - args.num_patches
        pooled = x[0] if args.pooling == "class" else x[extra:].mean(dim=0)
        rows.append(model.output.weight @ pooled + model.output.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "depth"])
@pytest.mark.parametrize(("pooling", "num_registers"), [("mean", 0), ("mean", 2), ("class", 0), ("class", 3)])
def test_logits_and_gradients_are_those_of_torchs_layers(pooling: str, num_registers: int, keep: Any) -> None:
    model = make(pooling=pooling, num_registers=num_registers, dtype=torch.float64)
    images = images_of(model).double().requires_grad_()
    logits = model(images, keep)
    assert logits.shape == (2, 1, 5)
    expected = plain_logits(model, images, keep)
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), images)[0] for out in (logits, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_the_reference_layer_is_torchs_whole_forward() -> None:
    model = make(dtype=torch.float64)
    block: Any = model.layers["1"]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), torchs_layer(block, model.model_args)(x), rtol=1e-10, atol=1e-10)


def test_keep_of_ones_and_of_zeros() -> None:
    model = make()
    images, ones = images_of(model), torch.ones(2, 3)
    assert torch.equal(model(images, ones), model(images))
    torch.testing.assert_close(
        model(images, 0 * ones),
        model.output(model.norm(model.tok_embeddings(patchify(images, 4)) + model.positions).mean(1, True)),
    )


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    positions = sincos_positions(3, 8)
    for number, vector in enumerate(positions):
        expected = []
        for coordinate in divmod(number, 3):
            angles = [coordinate / 10000 ** (i / 2) for i in range(2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(vector, torch.tensor(expected))


def test_weights_move_between_image_sizes() -> None:
    small, large = make(), make(image_size=20)
    assert not any("positions" in name for name in small.state_dict())
    large.load_state_dict(small.state_dict())
    assert large(images_of(large)).shape == (2, 1, 5)
    assert large.positions.shape == (25, 16)


def test_names_are_those_of_torchtitans_llama() -> None:
    names = {name.replace("layers.2", "layers.N").removesuffix(".weight") for name, _ in make().named_parameters()}
    layer = {"attention_norm", "ffn_norm", "feed_forward.w1", "feed_forward.w2"} | {
        f"attention.w{letter}" for letter in "qkvo"
    }
    assert names >= {"tok_embeddings", "norm", "output"} | {f"layers.N.{name}" for name in layer}


@pytest.mark.parametrize("changes", [{}, {"pooling": "class", "num_registers": 2}])
def test_from_the_meta_device_every_value_is_set(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = VisionTransformer(ViTArgs(**(SIZES | changes)))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights(buffer_device=torch.device("cpu"))
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model.positions, sincos_positions(3, 16))
    for name, parameter in model.named_parameters():
        if name.startswith("output") or name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = parameter.shape[-1] ** -0.5 if name.endswith("weight") else 0.02
            assert 0 < parameter.abs().max() <= 2 * std, name
    for wide in (model.layers["0"].feed_forward.w1.weight, model.layers["0"].feed_forward.w2.weight):  # 1024 values
        std = wide.shape[-1] ** -0.5 * 0.8796  # truncation at two deviations reduces the deviation to 0.8796
        assert abs(wide.std().item() / std - 1) < 0.1


def test_one_graph_and_no_recompilation_for_other_values() -> None:
    model = make(pooling="class", num_registers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = images_of(model)
    torch.testing.assert_close(compiled(images, KEEP), model(images, KEEP), rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(
            compiled(2 * images, KEEP.flip(0)), model(2 * images, KEEP.flip(0)), rtol=1e-4, atol=1e-4
        )


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    model, images = make(), images_of(make())
    expected = model(images, KEEP)
    counter = torch._dynamo.testing.CompileCounter()
    for name, block in list(model.layers.named_children()):
        model.layers.register_module(name, torch.compile(block, backend=counter, fullgraph=True))  # type: ignore[arg-type]
    torch.testing.assert_close(model(images, KEEP), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16])
def test_weights_decide_the_dtype(weights: torch.dtype, pixels: torch.dtype) -> None:
    model = make(dtype=weights, pooling="class", num_registers=1)
    images = images_of(model)
    logits = model(images.to(pixels), KEEP)
    assert logits.dtype == weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images.to(pixels), KEEP).dtype == torch.bfloat16
    reference = make(pooling="class", num_registers=1)(images, KEEP)
    tolerance = 1e-5 if weights == pixels == torch.float32 else 0.15 * reference.abs().max().item()
    torch.testing.assert_close(logits.float(), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"pooling": "class", "num_registers": 2, "hidden_ratio": 3, "n_layers": 1}])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = make(**changes)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(images_of(model, num=3)).sum().backward()
    assert counter.get_total_flops() == 3 * model.model_args.flops_per_image()


def test_rates_of_stochastic_depth_rise_linearly() -> None:
    assert ViTArgs(n_layers=5, drop_path=0.4).drop_rates == pytest.approx((0.0, 0.1, 0.2, 0.3, 0.4))
    assert ViTArgs(n_layers=1, drop_path=0.4).drop_rates == (0.0,)


BAD = [
    ({"image_size": 30, "patch_size": 4}, "[vision] image_size = 30", "Set image_size = 28 or 32"),
    ({"image_size": 3, "patch_size": 4}, "[vision] image_size = 3", "Set image_size = 4,"),
    ({"patch_size": 0}, "[vision] patch_size = 0", "at least 1"),
    ({"dim": 18}, "[model] dim = 18", "Set 20"),
    ({"dim": 16, "n_heads": 3}, "[model] dim = 16", "n_heads = 3. Set one that is"),
    ({"n_heads": 0}, "[model] n_heads = 0", "at least 1"),
    ({"pooling": "mena"}, "[model] pooling = 'mena'", 'did you mean "mean"'),
    ({"num_registers": -1}, "[model] num_registers = -1", "at least 0"),
    ({"drop_path": 1.0}, "[vision] drop_path = 1.0", "below 1"),
    ({"num_classes": 0}, "[data] num_classes = 0", "at least 1"),
]


@pytest.mark.parametrize(("changes", "where", "fix"), BAD)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], where: str, fix: str) -> None:
    with pytest.raises(ValueError, match=re.escape(where) + ".*" + re.escape(fix)):
        VisionTransformer(ViTArgs(**(SIZES | changes)))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(2, 3, 16, 16\): the model takes \[B, 3, 12, 12\]"):
        make()(torch.zeros(2, 3, 16, 16))
