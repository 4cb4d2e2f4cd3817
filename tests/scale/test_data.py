"""Start-up on 100,000 shards (15 trillion tokens) and 512 ranks: counts of opened files and of stats."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.parallel_world import FLAVORS, config_of

from titan_attent.data.text.format import ShardEntry, write_index
from titan_attent.titan import train_spec
from titan_attent.titan.checks import preflight
from titan_attent.titan.dataset_cache import DataSets

NUM_SHARDS, SHARD_TOKENS, RANKS = 100_000, 150_000_000, 512
SOURCES = ("code", "web")
HALF = {"training.local_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only an index: there are no shards, so any real access to a shard would fail."""
    folder = tmp_path_factory.mktemp("many_shards")
    entries = [
        ShardEntry(f"shard-{number:05d}.bin", SHARD_TOKENS, "0" * 64, SOURCES[number * 2 // NUM_SHARDS])
        for number in range(NUM_SHARDS)
    ]
    info = {"name": "none", "vocab_size": 500, "eos_id": 499}
    write_index(folder, dtype=np.dtype("<u2"), shards=entries, num_documents=1, max_token_id=499, tokenizer=info)
    return folder


class FileAccess:
    """Counts the stats and opened indices below ``folder``, and gives synthetic sizes of the shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stats, self.opened = str(folder), Counter[str](), Counter[str]()
        self._stat, self._open = os.stat, os.open

    def stat(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        name = os.path.basename(path) if isinstance(path, (str, os.PathLike)) else ""
        if name.startswith("shard-"):
            self.stats[name] += 1
            return SimpleNamespace(st_size=SHARD_TOKENS * 2)
        return self._stat(path, *args, **kwargs)

    def read_index(self, stock: Any) -> Any:
        def counted(path: Path) -> Any:
            self.opened[str(path)] += 1
            return stock(path)

        return counted


@pytest.fixture
def access(folder: Path) -> Iterator[FileAccess]:
    import titan_attent.data.text.shards as shards

    access = FileAccess(folder)
    with (
        mock.patch("os.stat", access.stat),
        mock.patch.object(shards, "read_index", access.read_index(shards.read_index)),
    ):
        yield access


def test_all_ranks_together_stat_every_shard_once(folder: Path, access: FileAccess, tmp_path: Path) -> None:
    config, datasets = config_of({"validation.enable": True}, data=str(folder), folder=str(tmp_path)), DataSets()
    config.data.validation_path = str(folder)
    max_stats = 0
    for rank in range(RANKS):
        before = access.stats.total()
        with (
            mock.patch("torch.distributed.is_initialized", lambda: True),
            mock.patch("torch.distributed.get_rank", lambda rank=rank: rank),
            mock.patch("torch.distributed.get_world_size", lambda: RANKS),
            mock.patch("torch.distributed.all_reduce", lambda x, op: x),
        ):
            preflight.check_files(config, datasets)
        max_stats = max(max_stats, access.stats.total() - before)
    # Twice: once as the training data, once as the validation data.
    assert len(access.stats) == NUM_SHARDS and set(access.stats.values()) == {2}
    assert max_stats == 2 * -(-NUM_SHARDS // RANKS)
    assert access.opened == {str(folder): 1}  # the ranks of this test share one DataSets


def test_a_rank_opens_the_index_once_and_accesses_no_shard(folder: Path, access: FileAccess, tmp_path: Path) -> None:
    """Preflight, tokenizer, loader and validator, as train.py uses them."""
    config = config_of(
        {"validation.enable": True, "validation.steps": 2, **HALF}, data=str(folder), folder=str(tmp_path)
    )
    config.data.validation_path = str(folder)
    config.model.flavor = "cell"
    datasets = DataSets()
    spec = train_spec.attent_spec("llama3_attent", datasets)
    spec.model_args.update(FLAVORS["llama3"])
    preflight.check_run(config, spec, world_size=2, datasets=datasets)
    with pytest.raises(ValueError, match="names no tokenizer file"):  # the synthetic data set has none
        assert spec.build_tokenizer_fn is not None
        spec.build_tokenizer_fn(config)
    assert access.stats.total() == 0
    with mock.patch.object(preflight, "check_files"):  # above
        loader = spec.build_dataloader_fn(dp_world_size=2, dp_rank=1, tokenizer=None, job_config=config)
    assert spec.build_validator_fn is not None
    parts = {name: mock.MagicMock() for name in ("parallel_dims", "loss_fn", "validation_context")}
    parts |= {name: mock.MagicMock() for name in ("maybe_enable_amp", "metrics_processor")}
    validator: Any = spec.build_validator_fn(job_config=config, dp_world_size=2, dp_rank=1, tokenizer=None, **parts)
    assert access.opened == {str(folder): 1} and access.stats.total() == 0
    # Later queries on the data set do not access a shard, either.
    assert loader.dataset.shards is validator.sets[0].loader.dataset.shards
    assert loader.dataset.sources[0] == ("code", 0) and len(loader.dataset.sources) == 2
    last = len(loader.dataset) - 1
    assert loader.dataset.location(last)["shard"] == f"shard-{NUM_SHARDS - 1:05d}.bin"
    assert int(validator.sets[0].loader.pool.ids(torch.tensor([0]))) <= last and access.stats.total() == 0
