"""The sizes of the image models by flavor: of the trunk that both models share, and of the autoencoder's decoder."""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # Trains on 8 x 8 digits in a minute on a CPU. For 28 x 28 set patch_size = 4 or 7.
    "tiny": {"dim": 64, "n_layers": 4, "n_heads": 4, "patch_size": 2},
    "xs": {"dim": 128, "n_layers": 6, "n_heads": 4, "patch_size": 4},
    "s16": {"dim": 384, "n_layers": 12, "n_heads": 6, "patch_size": 16},
    "b16": {"dim": 768, "n_layers": 12, "n_heads": 12, "patch_size": 16},
    "l16": {"dim": 1024, "n_layers": 24, "n_heads": 16, "patch_size": 16},
    "h14": {"dim": 1280, "n_layers": 32, "n_heads": 16, "patch_size": 14},
}
"""Sizes of the trunk: b16, l16, h14 of Dosovitskiy et al. 2021, table 1; s16 of Touvron et al. 2021."""
DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {"decoder_dim": 32, "decoder_layers": 2, "decoder_heads": 2},
    "xs": {"decoder_dim": 64, "decoder_layers": 2, "decoder_heads": 2},
    "s16": {"decoder_dim": 256, "decoder_layers": 4, "decoder_heads": 8},
}
"""Sizes of the decoder of mae_attent. Larger flavors use ``PAPERS_DECODER``, 8 layers of 512 (He et al. 2022)."""
PAPERS_DECODER: dict[str, Any] = {"decoder_dim": 512, "decoder_layers": 8, "decoder_heads": 16}
