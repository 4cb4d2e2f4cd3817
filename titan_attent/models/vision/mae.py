"""A masked autoencoder: vit.py's trunk encodes some of the patches, a small decoder predicts the pixels of the others.

After He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377). Its ``tok_embeddings``,
``layers``, ``norm``, ``class_token`` and ``registers`` load into a vision transformer of vit.py. The decoder does not
sort the tokens back into image order: only their position embeddings depend on it.

The masked patches and the blocks that an image skips (stochastic depth, Huang et al. 2016) are drawn outside of the
models, by hashes of (key, example id). They do not depend on the number of ranks and are the same after a resume. No
shape depends on them.

Shapes: B images, C channels, S pixels per side, P patches, V of them visible and M masked (V + M = P), D values per
patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_attent.foundations.checks import check_number
from titan_attent.foundations.counter_rng import derive_key, hash_ids, uniform
from titan_attent.models.vision.blocks import (
    NORM_EPS,
    EdgeLinear,
    flops_of_layers,
    init_linear_,
    init_normal_,
    make_layers,
    patchify,
)
from titan_attent.models.vision.vit import Trunk, ViTArgs, check_width

VARIANCE_EPS = 1e-6
_MASKS, _KEEP = 1, 2
"""The use of a derived key."""


@dataclass
class MAEArgs(ViTArgs):
    """The sizes of a :class:`MaskedAutoencoder`.

    Attributes:
        decoder_dim: width of a token in the decoder; a multiple of 4 and of ``decoder_heads``.
        mask_ratio: share of the patches to predict, in (0, 1).
    """

    decoder_dim: int = 128
    decoder_layers: int = 4
    decoder_heads: int = 4
    mask_ratio: float = 0.75

    @property
    def num_masked(self) -> int:
        """The number M of masked patches, from 1 to P - 1."""
        return min(max(1, round(self.mask_ratio * self.num_patches)), self.num_patches - 1)

    def flops_per_image(self) -> int:
        """See :meth:`ViTArgs.flops_per_image`."""
        visible = self.num_patches - self.num_masked
        tokens, all_tokens = self.num_extra + visible, self.num_extra + self.num_patches
        return (
            4 * self.patch_dim * self.dim * visible
            + flops_of_layers(self.n_layers, tokens, self.dim, self.hidden_ratio)
            + 6 * self.dim * self.decoder_dim * tokens
            + flops_of_layers(self.decoder_layers, all_tokens, self.decoder_dim, self.hidden_ratio)
            + 6 * self.decoder_dim * self.patch_dim * self.num_masked
        )

    def check(self) -> None:
        super().check()
        check_number("decoder_layers", self.decoder_layers, at_least=1, whole=True, section="model")
        check_width("decoder_dim", self.decoder_dim, "decoder_heads", self.decoder_heads)
        check_number("mask_ratio", self.mask_ratio, above=0, below=1, section="vision")
        if self.num_patches < 2:
            raise ValueError(
                f"[vision] patch_size = {self.patch_size}: an image of side {self.image_size} has only one patch, "
                f"but masking needs at least two. Set a patch_size of at most {self.image_size // 2}"
            )


def keyed_masks(ids: Tensor, key: int, num_patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    """Draw a random subset of the patches of each example, by a hash of (key, example, patch).

    Args:
        ids: int64 [B], example ids.
        key: key from ``derive_key``, different for each pass.
        num_patches, num_masked: P and M.

    Returns:
        (visible, masked): indices of patches, int64 [B, P - M] and [B, M], in random order, on the device of ``ids``.
    """
    patches = torch.arange(num_patches, device=ids.device)
    order = hash_ids(hash_ids(ids, key)[:, None] ^ patches, derive_key(key, _MASKS)).argsort(dim=1, stable=True)
    return order[:, num_masked:].contiguous(), order[:, :num_masked].contiguous()


def keyed_keep(ids: Tensor, key: int, rates: Sequence[float]) -> Tensor:
    """Draw the blocks of stochastic depth, by a hash of (key, example, block).

    Args:
        ids: int64 [B], example ids.
        key: key from ``derive_key``, different for each pass.
        rates: probability of skipping each block, in [0, 1): :attr:`ViTArgs.drop_rates`.

    Returns:
        fp32 [B, blocks] on the device of ``ids``: 0 or 1 / (1 - rate), so that the mean is 1.
    """
    blocks = torch.arange(len(rates), device=ids.device)
    rate = torch.tensor(rates, dtype=torch.float64, device=ids.device)
    kept = uniform(hash_ids(ids, key)[:, None] ^ blocks, derive_key(key, _KEEP)) >= rate
    return torch.where(kept, 1.0 / (1.0 - rate), 0.0).float()


def gather_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """The patches [B, n, D] with ``indices``, int64 [B, n], per example, out of [B, P, D]."""
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[-1]))


def patch_targets(images: Tensor, masked: Tensor, patch_size: int, normalize: bool) -> Tensor:
    """The pixels of the masked patches, which the model predicts.

    Args:
        images: float [B, C, S, S].
        masked: indices of patches, int64 [B, M].
        patch_size: side of a patch in pixels.
        normalize: normalize each patch to (x - mean) / sqrt(variance + 1e-6), with the unbiased variance, as in the
            paper's code.

    Returns:
        fp32 [B, M, D].

    Raises:
        ValueError: patches of a single value have no variance to normalize by.
    """
    targets = gather_patches(patchify(images, patch_size), masked).float()
    if not normalize:
        return targets
    if targets.shape[-1] == 1:
        raise ValueError(
            "[vision] normalize_patches = true: patches of a single value have no variance. Set patch_size = 2 or "
            "more, or normalize_patches = false"
        )
    variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
    return (targets - mean) / (variance + VARIANCE_EPS).sqrt()


class MaskedAutoencoder(Trunk):
    """The trunk applied to the visible patches, and a decoder applied to all patches.

    Raises:
        ValueError: sizes that do not fit (:meth:`MAEArgs.check`).
    """

    decoder_positions: Tensor

    def __init__(self, args: MAEArgs):
        super().__init__(args)
        self.decoder_embed = nn.Linear(args.dim, args.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(args.decoder_dim))
        self.register_buffer("decoder_positions", self._positions(args.decoder_dim), persistent=False)
        self.decoder_layers = make_layers(args.decoder_layers, args.decoder_dim, args.decoder_heads, args.hidden_ratio)
        self.decoder_norm = nn.LayerNorm(args.decoder_dim, eps=NORM_EPS)
        self.output = EdgeLinear(args.decoder_dim, args.patch_dim)

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images, fp32 or bf16 [B, C, S, S] -> predictions [B, M, D] of the masked patches, in the order of ``masked``.

        Args:
            visible, masked: indices of patches, int64 [B, V] and [B, M]; together each patch once.
            keep: factors of the trunk's blocks, as in ``VisionTransformer.forward``.
        """
        x = self.norm(self.encode(gather_patches(self.patches(images), visible), self.positions[visible], keep))
        x = self.decoder_embed(x)
        num_extra, positions = self.model_args.num_extra, self.decoder_positions.to(x.dtype)
        x = torch.cat(
            (
                x[:, :num_extra],
                x[:, num_extra:] + positions[visible],
                self.mask_token.to(x.dtype) + positions[masked],
            ),
            dim=1,
        )
        for layer in self.decoder_layers.values():
            x = layer(x)
        return self.output(self.decoder_norm(x[:, -masked.shape[1] :]))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        with torch.device(self.positions.device):
            self.decoder_positions = self._positions(self.mask_token.shape[0])
        init_normal_(self.mask_token)
        for linear in (self.decoder_embed, self.output):
            init_linear_(linear)
        for layer in self.decoder_layers.values():
            layer.init_weights()  # type: ignore[operator]
        self.decoder_norm.reset_parameters()
