"""The TOML section ``[data]``: where the token data sets are, and how they are read.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass


@dataclass
class DataConfig:
    path: str = ""
    """Folder of the token data set, written by ``python -m titan_attent.data.text``."""

    validation_path: str = ""
    """Folder of the validation token data set; read when ``validation.enable`` is set."""

    num_workers: int = 2
    """Reader threads of each rank, which fill batches ahead of the step; 0 reads in the training loop itself."""

    seed: int = 0
    """Seed of the order of the examples. Two runs with equal seeds see equal orders, on any number of ranks."""

    verify_checksums: bool = False
    """
    Re-hash every shard before training, the shards shared by the ranks (about 1 GB/s a rank). Missing, truncated and
    swapped files are found without it.
    """
