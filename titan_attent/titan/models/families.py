"""The families of models that this package trains. A new family needs a folder in models/, its TrainSpec in a
module beside this one, and an entry here. One from outside is listed in ``FAMILIES`` of the module that
``job.custom_config_module`` names, and needs no change here.

Text models are torchtitan's own and ``hyla_attent``, each trained by tests/distributed/titan/test_parallelism.py. Image
models are this package's, trained by tests/distributed/titan/test_vision_parallelism.py.
"""

import importlib
from functools import partial

from torchtitan.config import JobConfig

from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.models import hyla, mot
from titan_attent.titan.models.family import Family
from titan_attent.titan.models.text import Text
from titan_attent.titan.models.vision import AUTOENCODER, CLASSIFIER, Images, Patches, train_spec


def _no_pipeline(name: str) -> dict[str, str]:
    return {"pipeline_parallel": f"torchtitan 0.2.2 has no pipeline for {name}. Set it to 1"}


def _image_model_lacks(name: str) -> dict[str, str]:
    dimensions = ("tensor_parallel", "context_parallel", "pipeline_parallel", "expert_parallel")
    reason = f"{name}{SUFFIX} runs under FSDP2, HSDP and DDP. Set it to 1"
    return dict.fromkeys(dimensions, reason) | {"tokens": f"it is for text, and {name}{SUFFIX} trains on images"}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama3", modality=Text()),
        Family(name="qwen3", modality=Text(), lacks=_no_pipeline("qwen3")),
        Family(name="llama4", modality=Text()),
        Family(name="deepseek_v3", modality=Text()),
        Family(
            name="gpt_oss",
            modality=Text(),
            lacks=_no_pipeline("gpt_oss")
            | {
                "context_parallel": "torchtitan 0.2.2 cannot shard gpt_oss's flex attention. Set it to 1",
                "tensor_parallel": "torchtitan 0.2.2 leaves some parameters of gpt_oss out of the mesh and then cannot "
                "clip their gradients. Set it to 1, and use data_parallel_shard_degree and expert_parallel_degree",
            },
        ),
        Family(name=mot.NAME, modality=mot.RoutedText(), train_spec=mot.train_spec, lacks=mot.lacks()),
        Family(
            name="hyla",
            modality=hyla.HylaText(),
            train_spec=hyla.train_spec,
            lacks={
                "tensor_parallel": "hyla_attent normalises scores over all heads, and a head reads the values of all; "
                "ranks cannot split the heads. Set it to 1, and use data_parallel_shard_degree and "
                "context_parallel_degree"
            },
        ),
        *(
            Family(name=name, modality=modality, train_spec=partial(train_spec, name), lacks=_image_model_lacks(name))
            for name, modality in ((CLASSIFIER, Images()), (AUTOENCODER, Patches()))
        ),
    )
}


def add_families(module: str) -> None:
    """Add the families that the module of ``job.custom_config_module`` lists in ``FAMILIES``.

    Raises:
        ValueError: an entry is not a :class:`Family`, or its name is taken.
    """
    for family in getattr(importlib.import_module(module), "FAMILIES", ()):
        where = f"[job] custom_config_module = {module}"
        if not isinstance(family, Family):
            raise ValueError(f"{where}: {family!r} in its FAMILIES is not a titan_attent.titan.models.family.Family")
        if FAMILIES.setdefault(family.name, family) is not family:
            raise ValueError(f'{where}: the name "{family.name}" of a family is taken; choose another')


def family_of(job_config: JobConfig) -> Family:
    """The family of the run's model; an unknown name counts as a text model until attent_spec refuses it."""
    name = job_config.model.name.removesuffix(SUFFIX)
    return FAMILIES.get(name) or Family(name=name, modality=Text())
