"""Loads initial weights from a checkpoint with another head: ``[vision] new_head``, ``checkpoint.initial_load_path``.

The trunks of ``vit_attent`` and ``mae_attent`` have the same parameter names. A checkpoint of one can therefore start
the other, or the same model with other classes.
"""

from typing import Any

from torch import Tensor
from torchtitan.tools.logging import logger

from titan_attent.models.vision.config import VisionConfig
from titan_attent.systems.system import System
from titan_attent.titan.checkpoint_metadata import read_metadata

HEAD = ("output.", "decoder_", "mask_token")
"""Prefixes of the parameter names outside the trunk."""


def trunk_of(weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The ``weights`` of the trunk; ValueError if the checkpoint ``path`` lacks one or has another shape of it."""
    stored: dict[str, Any] = read_metadata(path).state_dict_metadata
    trunk = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
    differing = [
        f"{name} is {list(weight.shape)} here and {list(stored[name].size) if name in stored else 'absent'} there"
        for name, weight in trunk.items()
        if name not in stored or list(stored[name].size) != list(weight.shape)
    ]
    if differing:
        raise ValueError(
            f"[checkpoint] initial_load_path = {path} has another trunk: {'; '.join(differing[:3])} (of "
            f"{len(differing)} differences). Use the [model] flavor, the [vision] patch_size and data with the number "
            "of channels that it was trained with"
        )
    return trunk


class NewHead(System):
    """``[vision] new_head``: the trunk comes from the initial checkpoint, the head keeps its random initialisation."""

    name = "vision"

    @classmethod
    def is_on(cls, config: VisionConfig) -> bool:
        return config.new_head

    def weights_to_load(self, path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        trunk = trunk_of(weights, path)
        logger.info(f"Starting from the trunk of {path} with a new head")
        return trunk
