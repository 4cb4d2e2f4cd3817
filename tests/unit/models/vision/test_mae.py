"""models/vision/mae.py against a loop over examples and patches, in float64."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_attent.foundations.counter_rng import derive_key
from titan_attent.models.vision.blocks import patchify
from titan_attent.models.vision.mae import MAEArgs, MaskedAutoencoder, keyed_keep, keyed_masks, patch_targets
from titan_attent.models.vision.vit import VisionTransformer, ViTArgs

TRUNK: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "patch_size": 4, "image_size": 16}
SIZES: dict[str, Any] = TRUNK | {"decoder_dim": 8, "decoder_layers": 2, "decoder_heads": 2}
IDS = torch.tensor([5, 2**40, 0])
KEY = derive_key(1, 2)


def make(*, dtype: torch.dtype = torch.float32, **changes: Any) -> MaskedAutoencoder:
    """A model with all weights random."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(MAEArgs(**(SIZES | changes)))
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def inputs_of(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args: Any = model.model_args
    images = torch.randn(3, args.channels, args.image_size, args.image_size, generator=torch.Generator().manual_seed(1))
    return images, *keyed_masks(IDS, KEY, args.num_patches, args.num_masked)


def plain_predictions(model: Any, images: torch.Tensor, masked: torch.Tensor, keep: Any) -> torch.Tensor:
    """The paper's way: encode the visible patches, restore image order, decode, pick the masked patches."""
    rows, num_patches = [], model.model_args.num_patches
    for b, image in enumerate(images):
        hidden = set(masked[b].tolist())
        seen = [number for number in range(num_patches) if number not in hidden]
        patches = patchify(image[None], model.model_args.patch_size)[0]
        extra = [] if model.class_token is None else [model.class_token]
        extra += [] if model.registers is None else list(model.registers)
        tokens = [model.tok_embeddings(patches[number]) + model.positions[number] for number in seen]
        x = torch.stack(extra + tokens)[None]
        for number, layer in enumerate(model.layers.values()):
            x = layer(x, None if keep is None else keep[b : b + 1, number])
        encoded = model.decoder_embed(model.norm(x))[0]
        full = list(encoded[: len(extra)])
        for number in range(num_patches):
            token = model.mask_token if number in hidden else encoded[len(extra) + seen.index(number)]
            full.append(token + model.decoder_positions[number])
        x = torch.stack(full)[None]
        for layer in model.decoder_layers.values():
            x = layer(x)
        decoded = model.output(model.decoder_norm(x))[0, len(extra) :]
        rows.append(torch.stack([decoded[number] for number in masked[b].tolist()]))
    return torch.stack(rows)


@pytest.mark.parametrize("keep", [None, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.5, 1.5]])], ids=["all", "depth"])
@pytest.mark.parametrize("changes", [{}, {"pooling": "class", "num_registers": 2}, {"mask_ratio": 0.4}])
def test_predictions_and_gradients_are_those_of_a_loop(changes: dict[str, Any], keep: Any) -> None:
    model = make(dtype=torch.float64, **changes)
    images, visible, masked = inputs_of(model)
    images = images.double().requires_grad_()
    predictions = model(images, visible, masked, keep)
    assert predictions.shape == (3, model.model_args.num_masked, 48)
    expected = plain_predictions(model, images, masked, keep)
    torch.testing.assert_close(predictions, expected, rtol=1e-9, atol=1e-10)
    tensors = [images, model.mask_token, model.tok_embeddings.weight]
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in (predictions, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_a_masked_patch_cannot_be_seen() -> None:
    model = make()
    images, visible, masked = inputs_of(model)
    other = images.clone()
    for b, numbers in enumerate(masked.tolist()):
        for number in numbers:
            y, x = divmod(number, 4)
            other[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 100.0
    assert not torch.equal(other, images)
    assert torch.equal(model(images, visible, masked), model(other, visible, masked))


@pytest.mark.parametrize("changes", [{}, {"pooling": "class", "num_registers": 2}])
def test_its_trunk_loads_into_a_classifier(changes: dict[str, Any]) -> None:
    model = make(**changes)
    classifier = VisionTransformer(ViTArgs(**(TRUNK | changes)))
    classifier.init_weights()
    missing, unexpected = classifier.load_state_dict(
        model.state_dict() | {"output.weight": torch.zeros(10, 16), "output.bias": torch.zeros(10)}, strict=False
    )
    assert not missing
    assert {name.split(".")[0] for name in unexpected} == {
        "decoder_embed",
        "mask_token",
        "decoder_layers",
        "decoder_norm",
    }
    patches = patchify(inputs_of(model)[0], 4)
    torch.testing.assert_close(classifier.encode(patches, classifier.positions), model.encode(patches, model.positions))


def test_from_the_meta_device_every_value_is_set() -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(MAEArgs(**(SIZES | {"pooling": "class", "num_registers": 1})))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights(buffer_device=torch.device("cpu"))
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model.decoder_positions, make().decoder_positions)
    assert 0 < model.mask_token.abs().max() <= 0.04
    for linear in (model.output, model.decoder_embed):
        assert 0 < linear.weight.abs().max() <= 2 * linear.in_features**-0.5


def test_one_graph_and_no_recompilation_for_other_masks() -> None:
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images, visible, masked = inputs_of(model)
    torch.testing.assert_close(compiled(images, visible, masked), model(images, visible, masked))
    visible, masked = keyed_masks(IDS, KEY + 1, 16, 12)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(images, visible, masked), model(images, visible, masked))


def test_weights_decide_the_dtype() -> None:
    model = make(pooling="class", dtype=torch.bfloat16)
    images, visible, masked = inputs_of(model)
    predictions = model(images, visible, masked, torch.ones(3, 2))
    assert predictions.dtype == torch.bfloat16
    expected = make(pooling="class")(images, visible, masked)
    torch.testing.assert_close(predictions.float(), expected, rtol=0, atol=0.15 * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(pooling="class")(images, visible, masked).dtype == torch.bfloat16


def test_flops_are_those_that_torch_counts() -> None:
    model = make(pooling="class", num_registers=2)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs_of(model)).sum().backward()
    assert counter.get_total_flops() == 3 * model.model_args.flops_per_image()


@pytest.mark.parametrize(("ratio", "expected"), [(0.75, 12), (0.5, 8), (0.01, 1), (0.99, 15), (0.6, 10)])
def test_number_of_masked_patches(ratio: float, expected: int) -> None:
    assert MAEArgs(**(SIZES | {"mask_ratio": ratio})).num_masked == expected


@pytest.mark.parametrize("normalize", [False, True])
def test_targets_are_those_of_a_loop(normalize: bool) -> None:
    images = torch.randn(2, 3, 12, 12) * 5 + 3
    masked = torch.tensor([[8, 0, 4, 5], [1, 2, 3, 7]])
    targets = patch_targets(images, masked, 4, normalize)
    assert targets.dtype == torch.float32 and targets.shape == (2, 4, 48)
    for b in range(2):
        for m, number in enumerate(masked[b].tolist()):
            y, x = divmod(number, 3)
            patch = images[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double()
            values = torch.tensor([patch[c, i, j] for i in range(4) for j in range(4) for c in range(3)]).double()
            if normalize:
                variance = ((values - values.mean()) ** 2).sum() / 47
                values = (values - values.mean()) / (variance + 1e-6).sqrt()
            torch.testing.assert_close(targets[b, m].double(), values, rtol=1e-5, atol=1e-5)


def test_a_patch_of_one_colour_is_zero_and_one_value_has_no_variance() -> None:
    masked = torch.tensor([[0, 3]])
    assert (patch_targets(torch.full((1, 1, 4, 4), 7.0), masked, 2, True) == 0).all()
    with pytest.raises(ValueError, match=r"\[vision\] normalize_patches = true.*patch_size = 2"):
        patch_targets(torch.zeros(1, 1, 4, 4), masked, 1, True)


# -- draws ----------------------------------------------------------------------------------------------------------


def test_masks_are_a_partition_that_depends_on_key_and_id_only() -> None:
    ids = torch.arange(64)
    visible, masked = keyed_masks(ids, KEY, 16, 12)
    assert visible.shape == (64, 4) and masked.shape == (64, 12) and visible.dtype == masked.dtype == torch.int64
    assert torch.equal(torch.cat((visible, masked), dim=1).sort(dim=1).values, torch.arange(16).expand(64, -1))
    split = [keyed_masks(part, KEY, 16, 12) for part in (ids[40:], ids[:7], ids[7:40])]
    for whole, parts in zip((visible, masked), zip(*split, strict=True), strict=True):
        assert torch.equal(whole, torch.cat((parts[1], parts[2], parts[0])))
    assert not torch.equal(keyed_masks(ids, KEY + 1, 16, 12)[1], masked)
    assert len({tuple(sorted(row)) for row in masked.tolist()}) > 60  # of 1820 subsets


def test_every_patch_is_masked_equally_often_and_pairs_too() -> None:
    num = 20_000
    _, masked = keyed_masks(torch.arange(num), KEY, 9, 3)
    hits = torch.zeros(num, 9).scatter_(1, masked, 1.0)
    together = hits.T @ hits / num
    expected = torch.full((9, 9), 3 / 9 * 2 / 8).fill_diagonal_(3 / 9)
    assert (together - expected).abs().max() < 4.5 * (expected * (1 - expected) / num).sqrt().max()
    assert (hits[:-1] * hits[1:]).mean() == pytest.approx(1 / 9, abs=0.005)  # neighbouring ids


def test_kept_blocks_depend_on_key_and_id_only_and_average_one() -> None:
    ids, rates = torch.arange(20_000), ViTArgs(n_layers=4, drop_path=0.6).drop_rates
    keep = keyed_keep(ids, KEY, rates)
    assert keep.dtype == torch.float32 and keep.shape == (20_000, 4)
    assert torch.equal(keep, torch.cat([keyed_keep(part, KEY, rates) for part in ids.split(7_000)]))
    assert not torch.equal(keep, keyed_keep(ids, KEY + 1, rates))
    for column, rate in zip(keep.T, rates, strict=True):
        assert set(column.tolist()) == ({1.0} if rate == 0 else {0.0, torch.tensor(1 / (1 - rate)).item()})
        assert (column == 0).float().mean() == pytest.approx(rate, abs=0.015)
    kept = (keep > 0).double()
    assert (torch.corrcoef(kept[:, 1:].T) - torch.eye(3)).abs().max() < 0.03


BAD = [
    ({"decoder_dim": 10}, "[model] decoder_dim = 10", "Set 12"),
    ({"decoder_heads": 3}, "[model] decoder_dim = 8", "decoder_heads = 3. Set one that is"),
    ({"decoder_layers": 0}, "[model] decoder_layers = 0", "at least 1"),
    ({"mask_ratio": 1.0}, "[vision] mask_ratio = 1.0", "below 1"),
    ({"mask_ratio": 0}, "[vision] mask_ratio = 0", "above 0"),
    ({"patch_size": 16}, "[vision] patch_size = 16", "at most 8"),
    ({"dim": 18}, "[model] dim = 18", "Set 20"),
]


@pytest.mark.parametrize(("changes", "where", "fix"), BAD)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], where: str, fix: str) -> None:
    with pytest.raises(ValueError, match=re.escape(where) + ".*" + re.escape(fix)):
        MaskedAutoencoder(MAEArgs(**(SIZES | changes)))
