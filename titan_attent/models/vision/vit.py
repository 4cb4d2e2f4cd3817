"""A plain vision transformer: images -> patches -> pre-norm blocks -> logits.

After Dosovitskiy et al. 2021 ("An Image is Worth 16x16 Words", arXiv 2010.11929) with the changes of Beyer et al. 2022
("Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580): fixed 2-D sin-cos positions, mean pooling, and an
optional class token. Registers, extra learned tokens, follow Darcet et al. 2024 (arXiv 2309.16588). For stochastic
depth (Huang et al. 2016, arXiv 1603.09382) the caller draws which blocks are kept.

Modules have the names of torchtitan's llama, on which its FSDP, activation checkpointing and compile depend:
``tok_embeddings``, ``layers``, ``norm``, ``output``, and in a block ``attention.wq/wk/wv/wo``, ``feed_forward.w1/w2``
and their norms. Positions are a buffer outside of the state dict, so that weights load at other image sizes. The head
is initialized to 0 (section 3.2 of the first paper), all other weights as in blocks.py.

Shapes: B images, C channels, S pixels per side, P patches, V of them visible, D values per patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_attent.foundations.checks import check_number, check_one_of
from titan_attent.models.vision.blocks import (
    NORM_EPS,
    EdgeLinear,
    flops_of_layers,
    init_linear_,
    init_normal_,
    make_layers,
    patchify,
    sincos_positions,
)

POOLINGS = ("mean", "class")


@dataclass
class ViTArgs:
    """The sizes of a :class:`VisionTransformer`.

    Attributes:
        dim: width of a token; a multiple of 4 and of ``n_heads``.
        hidden_ratio: width of the MLP divided by ``dim``.
        patch_size, image_size: pixels per side; the first divides the second.
        pooling: output of the trunk: ``"mean"`` over the patches, or the ``"class"`` token.
        num_registers: number of extra learned tokens.
        drop_path: rate of stochastic depth in the last block, in [0, 1).
    """

    dim: int = 192
    n_layers: int = 12
    n_heads: int = 3
    hidden_ratio: int = 4
    patch_size: int = 4
    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    pooling: str = "mean"
    num_registers: int = 0
    drop_path: float = 0.0

    @property
    def num_patches(self) -> int:
        """The number P of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """The number D of values per patch."""
        return self.patch_size**2 * self.channels

    @property
    def num_extra(self) -> int:
        """The number of tokens before the patches: the class token and the registers."""
        return int(self.pooling == "class") + self.num_registers

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """The rate of stochastic depth of each block, linear from 0 in the first to ``drop_path`` in the last."""
        return tuple(self.drop_path * block / max(1, self.n_layers - 1) for block in range(self.n_layers))

    def flops_per_image(self) -> int:
        """The FLOPs of the matrix products of a training step, per image.

        Recomputation by checkpointing or attention is not counted. The patch embedding counts 4 FLOPs per weight and
        patch instead of 6, since the gradient of its input is not needed.
        """
        embedding = 4 * self.patch_dim * self.dim * self.num_patches
        tokens = self.num_extra + self.num_patches
        layers = flops_of_layers(self.n_layers, tokens, self.dim, self.hidden_ratio)
        return embedding + layers + 6 * self.dim * self.num_classes

    def check(self) -> None:
        """Raise a ValueError for sizes that do not fit; it names the key, its value and the fix."""
        for key in ("n_layers", "hidden_ratio"):
            check_number(key, getattr(self, key), at_least=1, whole=True, section="model")
        for key in ("patch_size", "image_size"):
            check_number(key, getattr(self, key), at_least=1, whole=True, section="vision")
        for key in ("channels", "num_classes"):
            check_number(key, getattr(self, key), at_least=1, whole=True, section="data")
        check_number("num_registers", self.num_registers, at_least=0, whole=True, section="model")
        check_number("drop_path", self.drop_path, at_least=0, below=1, section="vision")
        check_one_of("pooling", self.pooling, POOLINGS, section="model")
        check_width("dim", self.dim, "n_heads", self.n_heads)
        if remainder := self.image_size % self.patch_size:
            lower = self.image_size - remainder
            fits = [size for size in (lower, lower + self.patch_size) if size]
            raise ValueError(
                f"[vision] image_size = {self.image_size}: patches of patch_size = {self.patch_size} do not fill it. "
                f"Set image_size = {' or '.join(map(str, fits))}, or a patch_size that divides it"
            )


def check_width(key: str, dim: int, heads_key: str, heads: int) -> None:
    """Raise a ValueError for a width that is not a multiple of 4 (for 2-D sin-cos positions) and of the heads."""
    check_number(key, dim, at_least=4, whole=True, section="model")
    check_number(heads_key, heads, at_least=1, whole=True, section="model")
    if dim % 4:
        raise ValueError(f"[model] {key} = {dim}: 2-D sin-cos positions need a multiple of 4. Set {dim - dim % 4 + 4}")
    if dim % heads:
        raise ValueError(f"[model] {key} = {dim} is not a multiple of {heads_key} = {heads}. Set one that is")


class Trunk(nn.Module):
    """The common part of classifier and masked autoencoder: patch embedding, positions, blocks and the last norm.

    Raises:
        ValueError: sizes that do not fit (:meth:`ViTArgs.check`).
    """

    positions: Tensor

    def __init__(self, args: ViTArgs):
        super().__init__()
        args.check()
        self.model_args = args
        self.tok_embeddings = EdgeLinear(args.patch_dim, args.dim)
        self.class_token = nn.Parameter(torch.zeros(args.dim)) if args.pooling == "class" else None
        self.registers = nn.Parameter(torch.zeros(args.num_registers, args.dim)) if args.num_registers else None
        self.register_buffer("positions", self._positions(args.dim), persistent=False)
        self.layers = make_layers(args.n_layers, args.dim, args.n_heads, args.hidden_ratio)
        self.norm = nn.LayerNorm(args.dim, eps=NORM_EPS)

    def _positions(self, dim: int) -> Tensor:
        return sincos_positions(self.model_args.image_size // self.model_args.patch_size, dim)

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] -> patches [B, P, D]; ValueError if the sizes are not the model's."""
        args = self.model_args
        if images.shape[1:] != (args.channels, args.image_size, args.image_size):
            raise ValueError(
                f"images {tuple(images.shape)}: the model takes [B, {args.channels}, {args.image_size}, "
                f"{args.image_size}]. Create the model with the channels and image_size of the data"
            )
        return patchify(images, args.patch_size)

    def encode(self, patches: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        """The tokens before the last norm, [B, num_extra + V, dim].

        Args:
            patches: float [B, V, D].
            positions: fp32 [V, dim] or [B, V, dim].
            keep: as in :meth:`VisionTransformer.forward`.
        """
        x = self.tok_embeddings(patches)
        x = x + positions.to(x.dtype)
        extra = [] if self.class_token is None else [self.class_token[None]]
        extra += [] if self.registers is None else [self.registers]
        if extra:
            x = torch.cat((torch.cat(extra).to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        scales = [None] * len(self.layers) if keep is None else [scale.contiguous() for scale in keep.unbind(1)]
        for layer, scale in zip(self.layers.values(), scales, strict=True):
            x = layer(x, scale)
        return x

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialize every parameter and buffer. ``buffer_device``: device of the positions; default: unchanged."""
        with torch.device(buffer_device or self.positions.device):
            self.positions = self._positions(self.model_args.dim)
        init_linear_(self.tok_embeddings)
        for tokens in (self.class_token, self.registers):
            if tokens is not None:
                init_normal_(tokens)
        for layer in self.layers.values():
            layer.init_weights()  # type: ignore[operator]
        self.norm.reset_parameters()


class VisionTransformer(Trunk):
    """An image classifier."""

    def __init__(self, args: ViTArgs):
        super().__init__(args)
        self.output = EdgeLinear(args.dim, args.num_classes)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images, fp32 or bf16 [B, C, S, S] -> logits [B, 1, num_classes]; the 1 is the length that losses expect.

        Args:
            keep: fp32 [B, n_layers], factors of the branches of each block, for stochastic depth 0 or 1 / (1 - rate);
                None means 1. Mixed precision rounds them to the dtype of the tokens.
        """
        x = self.encode(self.patches(images), self.positions, keep)
        if self.model_args.pooling == "class":
            return self.output(self.norm(x[:, :1]))
        return self.output(self.norm(x[:, self.model_args.num_extra :]).mean(dim=1, keepdim=True))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
