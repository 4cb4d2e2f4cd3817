"""Refuses paths that a TOML or the command line gives and that the run would not read.

torchtitan's own keys of data and tokenizer have successors in ``[data]``, and validation data are read only if
validation is on. A run that leaves them unread trains on other data than its configuration says.

Cost: reads the configuration.
"""

from collections.abc import Collection

from torchtitan.config import JobConfig

STOCK_DATA = ("training.dataset", "training.dataset_path", "validation.dataset", "validation.dataset_path")
STOCK_TOKENIZER = ("model.hf_assets_path", "model.tokenizer_path")


def check_unread_paths(job_config: JobConfig, given: Collection[str]) -> None:
    """Refuse paths that are given and not read; ValueError.

    Args:
        given: the keys that a TOML file or the command line names, as ``section.key``.
    """
    if unread := _names(STOCK_DATA, given):
        raise ValueError(
            f"{unread}: not read, since titan_attent reads [data] path and validation_path, written by python -m "
            "titan_attent.data.text or titan_attent.data.images. Leave it out"
        )
    checkpoint = job_config.checkpoint
    reads_assets = checkpoint.enable and (checkpoint.initial_load_in_hf or checkpoint.last_save_in_hf)
    if (unread := _names(STOCK_TOKENIZER, given)) and not reads_assets:
        raise ValueError(
            f"{unread}: not read, since the tokenizer is the one that wrote [data] path. Leave it out; it is for "
            "checkpoint.initial_load_in_hf and last_save_in_hf"
        )
    data, is_decided = job_config.data, job_config.validation.enable or "validation.enable" in given
    for key in ("validation_path", "validation_sets"):
        if (value := getattr(data, key)) and f"data.{key}" in given and not is_decided:
            shown = f"{key} = {value}" if isinstance(value, str) else f"{key}: {', '.join(value)}"
            raise ValueError(
                f"[data] {shown} would not be read: set enable = true in [validation], or enable = false "
                "to train without validation"
            )


def _names(keys: Collection[str], given: Collection[str]) -> str:
    """The given ones among ``keys``, for a message."""
    return ", ".join("[{}] {}".format(*key.split(".")) for key in keys if key in given)
