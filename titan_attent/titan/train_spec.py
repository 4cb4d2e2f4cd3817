"""The TrainSpec of a model whose name ends in ``_attent``.

The model, its parallelisation, optimizer, schedule and loss function stay torchtitan's own, or the family's
(models/family.py); under a pipeline the loss is wrapped. This package replaces the data loader and tokenizer (token
shards), the validator (the same examples each time) and the metrics (it adds those of the systems).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.components.loss import LossFunction
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import LossFunctionBuilder, TrainSpec, get_train_spec

from titan_attent.data.text.tokenizer import Tokenizer, open_tokenizer
from titan_attent.foundations.checks import closest
from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.checks import preflight
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.loader import TeachingLoader, build_loader
from titan_attent.titan.metrics import build_teaching_metrics_processor
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.models.flavors import flavors_of, follow_data, scorers
from titan_attent.titan.patches import compat
from titan_attent.titan.patches.registry import apply_patches
from titan_attent.titan.pipeline import PipelineLoss
from titan_attent.titan.user_errors import fail
from titan_attent.titan.validator import build_validator


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
    return ShardTokenizer(open_tokenizer(datasets.shards(path).tokenizer_info, path))


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


def attent_spec(name: str, datasets: DataSets | None = None, *, data: str = "") -> TrainSpec:
    """The stock TrainSpec of "<model>_attent" with this package's replacements; ValueError for an unknown name.

    Args:
        datasets: the data sets of the run, which earlier checks may have opened already.
        data: ``data.path`` of text. If given, the flavors get the vocabulary of its models (models/flavors.py), and the
            scorers' flavors are added. ValueError if it cannot be opened.
    """
    datasets = datasets or DataSets()
    names = [family + SUFFIX for family in FAMILIES]
    if name not in names:
        choices = ", ".join(names)
        raise ValueError(f'[model] name = "{name}" is unknown{closest(name, names) or "."} Use one of {choices}')
    model = name.removesuffix(SUFFIX)
    apply_patches(family=model)
    of_family = FAMILIES[model].train_spec
    stock = get_train_spec(model) if of_family is None else of_family()
    flavors = flavors_of(model, stock.model_args)
    if data:
        shards = datasets.shards(data)
        follow_data(flavors, shards)
        if model == "llama3":
            flavors |= scorers(shards)
    return replace(
        stock,
        model_args=flavors,
        parallelize_fn=compat.patched_parallelize(stock.parallelize_fn),
        build_dataloader_fn=partial(build_dataloader, datasets),
        build_tokenizer_fn=stock.build_tokenizer_fn and partial(build_tokenizer, datasets),
        build_validator_fn=partial(build_validator, datasets, flavors),
        build_metrics_processor_fn=build_teaching_metrics_processor,
        build_loss_fn=partial(build_loss, stock.build_loss_fn),
    )
