"""Initial weights from a checkpoint of another head: ``[vision] new_head`` with ``checkpoint.initial_load_path``.

The trunk of ``vit_attent`` and of ``mae_attent`` has the same names, so that one's checkpoint starts the other, or the
same model with other classes.
"""

from typing import Any

from torch import Tensor
from torchtitan.tools.logging import logger

from titan_attent.models.vision.config import VisionConfig
from titan_attent.systems.system import System
from titan_attent.titan.checkpoint_metadata import read_metadata

HEAD = ("output.", "decoder_", "mask_token")
"""How the names begin that are no part of the trunk."""


def trunk_of(weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Those of ``weights`` that are of the trunk; ValueError if the checkpoint ``path`` has not all of them."""
    there: dict[str, Any] = read_metadata(path).state_dict_metadata
    trunk = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
    differing = [
        f"{name} is {list(weight.shape)} here and {list(there[name].size) if name in there else 'absent'} there"
        for name, weight in trunk.items()
        if name not in there or list(there[name].size) != list(weight.shape)
    ]
    if differing:
        raise ValueError(
            f"[checkpoint] initial_load_path = {path} has another trunk: {'; '.join(differing[:3])} (of "
            f"{len(differing)} differences). Set [model] flavor, [vision] patch_size and the channels of the data to "
            "what it was trained with"
        )
    return trunk


class NewHead(System):
    """``[vision] new_head``: the initial checkpoint gives the trunk, and the head starts as it was initialised."""

    name = "vision"

    @classmethod
    def is_on(cls, config: VisionConfig) -> bool:
        return config.new_head

    def weights_to_load(self, path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        trunk = trunk_of(weights, path)
        logger.info(f"Starting with the trunk of {path}, and a new head")
        return trunk
