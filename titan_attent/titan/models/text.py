"""The text modality: windows of tokens, each labelled with the next token."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchtitan.config import JobConfig

from titan_attent.data.examples import Examples
from titan_attent.data.plan.packed import BEST_FIT, PACKINGS
from titan_attent.data.text.document_examples import DOCUMENT
from titan_attent.data.text.tokenizer_check import check_same_tokenizer
from titan_attent.foundations.checks import check_number, check_one_of
from titan_attent.losses.build import build_example_loss
from titan_attent.losses.cross_entropy import WeightedLoss
from titan_attent.scores.stored import CROSS_ENTROPY
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets

UNITS = ("window", DOCUMENT)


class Text:
    """The text modality: windows of tokens (``[data]`` of titan_attent.data.text) with next-token labels."""

    learner = "language model"
    metrics: tuple[str, ...] = ()
    is_of_images = False
    writer = "python -m titan_attent.data.text"
    systems: tuple[type[System], ...] = ()

    def check(self, job_config: JobConfig) -> None:
        """Refuse units that are unknown, and what documents do not combine with."""
        data = job_config.data
        check_one_of("unit", data.unit, UNITS, section="data")
        if data.validation_unit:
            check_one_of("validation_unit", data.validation_unit, UNITS, section="data")
        check_number("max_examples_per_window", data.max_examples_per_window, at_least=0, whole=True, section="data")
        parallelism = job_config.parallelism
        balancer = parallelism.context_parallel_load_balancer
        if data.unit == DOCUMENT and parallelism.context_parallel_degree > 1 and balancer == "ptrr":
            raise ValueError(
                f'[parallelism] context_parallel_load_balancer = "{balancer}" with [data] unit = "document": it orders '
                "tokens by the attention mask, and the numbers of their documents do not follow. Use "
                '"headtail"'
            )
        check_one_of("packing", data.packing, PACKINGS, section="data")
        if data.unit != DOCUMENT and data.packing != BEST_FIT:
            raise ValueError(
                f'[data] packing = "{data.packing}" with unit = "{data.unit}", where a window is one example: remove '
                'it, or set unit = "document"'
            )
        if data.unit != DOCUMENT and data.max_examples_per_window:
            raise ValueError(
                f'[data] max_examples_per_window = {data.max_examples_per_window} with unit = "{data.unit}", where a '
                'window is one example: remove it, or set unit = "document"'
            )

        if data.exact_match and not job_config.validation.enable:
            raise ValueError("[data] exact_match = true: it is a metric of validation. Set validation.enable = true")
        if data.exact_match and (data.validation_unit or data.unit) != DOCUMENT:
            raise ValueError(
                "[data] exact_match = true: a window is no example with an answer, as it may cut documents. Set "
                'validation_unit = "document", or exact_match = false'
            )

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        path, section = (
            (job_config.data.validation_path, job_config.validation)
            if validation
            else (job_config.data.path, job_config.training)
        )
        if validation:
            check_same_tokenizer(datasets.shards(path), datasets.shards(job_config.data.path), what="")
        unit = (job_config.data.validation_unit or job_config.data.unit) if validation else job_config.data.unit
        if unit == DOCUMENT:
            return datasets.documents(path, seq_len=section.seq_len)
        if datasets.shards(path).has_mask:
            key = "validation_unit" if validation else "unit"
            datasets.warn_once(
                f"{path}: has a mask of labels, as prompts with completions have, and windows do not read it: the "
                f'prompts count, too. Set [data] {key} = "document" for the completions alone'
            )
        return datasets.dataset(path, seq_len=section.seq_len)

    def check_fit(self, examples: Any, model_args: Any, *, model: str, key: str) -> None:
        shards, vocab_size = examples.shards, model_args.vocab_size
        if shards.max_token_id >= vocab_size:
            raise ValueError(
                f"[data] {key} = {shards.path} holds token id {shards.max_token_id}, beyond the {vocab_size} token ids "
                f"of {model}: choose a flavor with a larger vocabulary, or write the data with a smaller tokenizer"
            )

    def example_loss(self, job_config: JobConfig, *, validation: bool = False) -> Callable[..., WeightedLoss]:
        return build_example_loss

    def loss(self, job_config: JobConfig) -> str:
        return CROSS_ENTROPY

    def validated(self, job_config: JobConfig) -> str:
        return CROSS_ENTROPY

    def measured(self, job_config: JobConfig, examples: Any) -> dict[str, Any]:
        unit = job_config.data.validation_unit or job_config.data.unit
        tokenizer = examples.shards.tokenizer_info
        name = f"{tokenizer['name']}, {tokenizer['vocab_size']} ids, {str(tokenizer.get('sha256', ''))[:8]}"
        measured = {"validation.seq_len": job_config.validation.seq_len, "tokenizer": name}
        return measured | ({"data.validation_unit": unit} if unit != "window" else {})

    def count_correct(self, pred: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("text has no metrics to count")
