"""The TrainSpec of a model whose name ends in ``_attent``.

The model, its parallelisation, optimizer, schedule and loss function stay torchtitan's own; under a pipeline the loss
is wrapped. This package replaces the data loader and tokenizer (token shards), the validator (the same examples each
time) and the metrics (it adds those of the systems).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.components.loss import LossFunction
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import LossFunctionBuilder, TrainSpec, get_train_spec

from titan_attent.data.text.tokenizer import Tokenizer
from titan_attent.foundations.checks import closest
from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.checks import preflight
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.loader import TeachingLoader, build_loader
from titan_attent.titan.metrics import build_teaching_metrics_processor
from titan_attent.titan.models import vision
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.patches import compat
from titan_attent.titan.patches.registry import apply_patches
from titan_attent.titan.pipeline import PipelineLoss
from titan_attent.titan.user_errors import fail
from titan_attent.titan.validator import build_validator

EXTRA_FLAVORS: dict[str, dict[str, BaseModelArgs]] = {
    "llama3": {
        # About 2.6 M parameters: a few hundred steps take several minutes on two CPU cores.
        "tiny": TransformerModelArgs(dim=192, n_layers=4, n_heads=6, vocab_size=4096, multiple_of=64, rope_theta=10000),
        # About 0.9 M parameters, for benchmarks/convergence.
        "bench": TransformerModelArgs(
            dim=128, n_layers=3, n_heads=4, vocab_size=1024, multiple_of=64, rope_theta=10000
        ),
        # About 126 M parameters, for benchmarks/long_windows/gpu.py.
        "bench_125m": TransformerModelArgs(
            dim=768, n_layers=16, n_heads=12, vocab_size=8192, multiple_of=256, rope_theta=10000
        ),
        # About 160 M parameters, for benchmarks/speed/gpu_steps.py.
        "bench_gpu": TransformerModelArgs(
            dim=1024, n_layers=12, n_heads=16, vocab_size=4096, multiple_of=256, rope_theta=10000
        ),
    }
}

FAMILIES_WITH_TWINS = ("llama3", "qwen3")
"""The families in which each flavor with sdpa attention gets a twin with flex attention (:func:`flex_twins`)."""

SCORER_FLAVORS = {"scorer_xs": (32, 1, 2), "scorer_s": (64, 2, 2), "scorer_m": (256, 4, 4), "scorer_l": (512, 8, 8)}
"""The flavors of scorers (scorers.py): (width, layers, heads) of a llama3 with the vocabulary of its data."""


def flex_twins(flavors: Mapping[str, BaseModelArgs]) -> dict[str, BaseModelArgs]:
    """A flavor "<name>_flex" for each of ``flavors`` with sdpa attention that has no such flavor yet.

    Its weights and its causal mask are those of "<name>"; ``[data] document_mask`` needs flex attention.
    """
    twins: dict[str, BaseModelArgs] = {}
    for name, args in flavors.items():
        if vars(args)["attn_type"] == "sdpa" and not {f"{name}_flex", f"{name}_flex_attn"} & flavors.keys():
            twin = copy.deepcopy(args)
            vars(twin)["attn_type"] = "flex"
            twins[f"{name}_flex"] = twin
    return twins


class ShardTokenizer(BaseTokenizer):
    """Gives torchtitan's tokenizer interface to the tokenizer that the data set was written with.

    torchtitan reads its end-of-document id when attention is masked by document (flex, varlen).
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def get_vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def build_tokenizer(datasets: DataSets, job_config: JobConfig) -> ShardTokenizer:
    """torchtitan's ``build_tokenizer_fn``: the tokenizer of ``data.path``."""
    path = Path(job_config.data.path)
    return ShardTokenizer(Tokenizer.from_info(datasets.shards(path).tokenizer_info, path))


def build_dataloader(
    datasets: DataSets, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer | None, job_config: JobConfig
) -> TeachingLoader:
    """torchtitan's ``build_dataloader_fn``, the first hook after process group setup. It also checks the shards."""
    del tokenizer  # the data set is tokens already
    try:
        preflight.check_files(job_config, datasets)
    except ValueError as error:
        fail(error)
    return build_loader(job_config, datasets, dp_rank=dp_rank, dp_world_size=dp_world_size)


def build_loss(
    build_stock_loss: LossFunctionBuilder, job_config: JobConfig, *, parallel_dims: ParallelDims, **kwargs: Any
) -> LossFunction:
    """torchtitan's ``build_loss_fn``: the stock loss; under a pipeline it is wrapped in :class:`PipelineLoss`."""
    loss = build_stock_loss(job_config, parallel_dims=parallel_dims, **kwargs)
    return PipelineLoss(loss) if parallel_dims.pp_enabled else loss


def _vision_spec(model: str, datasets: DataSets) -> TrainSpec:
    """torchtitan's llama3 TrainSpec with a vision model, its loss and image data."""
    flavors = vision.flavors(model)
    return replace(
        get_train_spec("llama3"),
        model_cls=vision.MODELS[model],
        model_args=flavors,
        parallelize_fn=compat.patched_parallelize(vision.parallelize),
        pipelining_fn=None,
        build_dataloader_fn=partial(build_dataloader, datasets),
        build_tokenizer_fn=None,
        build_validator_fn=partial(build_validator, datasets, flavors),
        build_metrics_processor_fn=build_teaching_metrics_processor,
        build_loss_fn=vision.build_loss,
        state_dict_adapter=None,
    )


def attent_spec(name: str, datasets: DataSets | None = None, *, data: str = "") -> TrainSpec:
    """The stock TrainSpec of "<model>_attent" with this package's replacements; ValueError for an unknown name.

    Args:
        datasets: the data sets of the run, which earlier checks may have opened already.
        data: ``data.path``; if given, the scorers' flavors, whose vocabulary is that of the data, are added.
    """
    datasets = datasets or DataSets()
    names = [family + SUFFIX for family in FAMILIES]
    if name not in names:
        choices = ", ".join(names)
        raise ValueError(f'[model] name = "{name}" is unknown{closest(name, names) or "."} Use one of {choices}')
    model = name.removesuffix(SUFFIX)
    apply_patches(family=model)
    if model in vision.MODELS:
        return _vision_spec(model, datasets)
    stock = get_train_spec(model)
    # torchtitan writes the run's settings into the selected flavor, so the twin gets its own copies.
    flavors = copy.deepcopy(dict(stock.model_args)) | copy.deepcopy(EXTRA_FLAVORS.get(model, {}))
    if model in FAMILIES_WITH_TWINS:
        flavors |= flex_twins(flavors)
    if model == "llama3" and data:
        vocab_size = datasets.shards(data).index.tokenizer["vocab_size"]
        for flavor, (dim, n_layers, n_heads) in SCORER_FLAVORS.items():
            flavors[flavor] = TransformerModelArgs(
                dim=dim, n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size, multiple_of=dim, rope_theta=10000
            )
    return replace(
        stock,
        model_args=flavors,
        parallelize_fn=compat.patched_parallelize(stock.parallelize_fn),
        build_dataloader_fn=partial(build_dataloader, datasets),
        build_tokenizer_fn=partial(build_tokenizer, datasets),
        build_validator_fn=partial(build_validator, datasets, flavors),
        build_metrics_processor_fn=build_teaching_metrics_processor,
        build_loss_fn=partial(build_loss, stock.build_loss_fn),
    )
