"""torchtitan's conversion of Hugging Face's weights, by the family and flavor of a model."""

import copy

from torchtitan.protocols import BaseStateDictAdapter

from titan_attent.foundations.checks import closest
from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.train_spec import attent_spec


def adapter_of(path: str, *, family: str, flavor: str) -> BaseStateDictAdapter:
    """The adapter for the folder ``path``, which is named in messages.

    Raises:
        ValueError: the family or flavor is missing, unknown, or has no adapter.
    """
    if not family or not flavor:
        raise ValueError(
            f"{path} is a folder of *.safetensors: name its model, such as --family llama3 --flavor 8B, so that its "
            "weights get torchtitan's names"
        )
    if family not in FAMILIES:
        hint = closest(family, FAMILIES) or "."
        raise ValueError(f"--family {family} is unknown{hint} Use one of {', '.join(FAMILIES)}")
    spec = attent_spec(family + SUFFIX)
    if flavor not in spec.model_args:
        hint = closest(flavor, spec.model_args) or "."
        raise ValueError(f"--flavor {flavor} is none of {family}{hint} Use one of {', '.join(spec.model_args)}")
    if spec.state_dict_adapter is None:
        raise ValueError(f"{path}: {family} has no Hugging Face format in torchtitan; give DCP checkpoints")
    return spec.state_dict_adapter(copy.deepcopy(spec.model_args[flavor]), None)
