"""The checks that the ranks of a run share before the first step, and the examples that they validate on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.parallel_world import FLAVORS, config_of
from distributed.spawn import run_on_ranks

from titan_attent.data.io.reader import Reader
from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.scores import stored
from titan_attent.scores.stored import Scoring
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.checks import preflight
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.measured_sets import sample
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.user_errors import on_all_ranks


def checked_once(mesh: Any, errors: dict[int, Exception]) -> str:
    def check() -> None:
        if (error := errors.get(dist.get_rank())) is not None:
            raise error

    try:
        on_all_ranks(check)
        return ""
    except ValueError as error:
        return str(error)


def checked_often(mesh: Any, cases: list[dict[int, Exception]]) -> list[str]:
    return [checked_once(mesh, errors) for errors in cases]


def test_any_failure_of_any_rank_is_raised_on_all() -> None:
    cases: list[dict[int, Exception]] = [
        {},
        {1: ValueError("shard 7 is damaged")},
        {2: OSError(5, "Input/output error", "/data/shard-00007.bin")},
        {1: MemoryError("too much"), 2: ValueError("shard 7 is damaged")},
        {0: ValueError("first"), 1: ValueError("second")},
        {},
    ]
    expected = [
        "",
        "shard 7 is damaged",
        "OSError: [Errno 5] Input/output error: '/data/shard-00007.bin'",
        "MemoryError: too much",
        "first",
        "",
    ]
    assert run_on_ranks(checked_often, 3, cases, timeout=60.0) == [expected] * 3


def checked(mesh: Any, data: str, folder: str) -> tuple[str, list[str]]:
    """The message of the check of the files, and the shards whose size this rank read."""
    config = config_of({"data.verify_checksums": True}, data=data, folder=folder)
    config.data.validation_path = data
    seen: list[str] = []
    stock = TokenShards._size
    with mock.patch.object(TokenShards, "_size", lambda self, name: seen.append(name) or stock(self, name)):
        try:
            preflight.check_files(config, DataSets())
            return "", seen
        except ValueError as error:
            return str(error), seen


def test_the_ranks_share_the_shards(token_data: dict[str, Path], tmp_path: Path) -> None:
    files = sorted(path.name for path in token_data["train"].glob("shard-*.bin"))
    assert len(files) == 2
    ranks = run_on_ranks(checked, 2, str(token_data["train"]), str(tmp_path))
    assert [said for said, _ in ranks] == ["", ""]
    read = [[name for name in names if name in files] for _, names in ranks]
    assert sorted(read[0] + read[1]) == files and read[0] != read[1]


def truncated(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 2)


def altered(shard: Path) -> None:
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])


def unreadable(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(shard)  # an OSError for everybody, root included


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "/shard-00001.bin: has "),
        (altered, "/shard-00001.bin: its sha256 is "),
        (unreadable, "OSError: [Errno 40] Too many levels of symbolic links"),
    ],
)
def test_a_damaged_shard_of_one_rank_is_an_error_on_all(
    token_data: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    """Rank 1 alone reads the second shard."""
    data = tmp_path / "data"
    shutil.copytree(token_data["train"], data)
    damage(data / "shard-00001.bin")
    (one, seen), (other, _) = run_on_ranks(checked, 2, str(data), str(tmp_path), timeout=60.0)
    assert said in one and one == other and "shard-00001.bin" not in seen


def test_a_rank_opens_the_reference_once(token_data: dict[str, Path], tmp_path: Path) -> None:
    """In preflight, in the check of the files, and where the teacher reads its losses."""
    folder = tmp_path / "reference"
    settings = {"teacher.importance": "excess_loss", "teacher.scores": str(folder)}
    settings |= {"data.verify_checksums": True}
    config = config_of(settings, data=str(token_data["train"]), folder=str(tmp_path))
    data = TokenDataset(token_data["train"], seq_len=config.training.seq_len)
    scoring = {"data_fingerprint": data.shards.fingerprint, "seq_len": data.seq_len, "num_examples": len(data)}
    names = {name: "x" for name in ("model", "precision", "checkpoint", "checkpoint_sha256")}
    with ScoresWriter(folder, scoring=Scoring(**scoring, **names)) as writer:  # type: ignore[arg-type]
        writer.append(torch.arange(len(data)) / 7)
        writer.finish()
    opened: list[Path] = []
    stock = stored.read_json
    with mock.patch.object(stored, "read_json", lambda path, **kwargs: opened.append(path) or stock(path, **kwargs)):
        datasets = DataSets()
        spec = attent_spec("llama3_attent", datasets)
        spec.model_args.update(FLAVORS["llama3"])
        preflight.check_run(config, spec, world_size=1, datasets=datasets)
        loader: Any = spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=None, job_config=config)
        assert torch.equal(loader.datasets.scores(folder).read(2, 9), torch.arange(2, 9) / 7)
    assert opened == [folder / "reference.json"]


def ids_of(dataset: TokenDataset, pool: Any, *, batch_size: int, ranks: int) -> list[int]:
    ids = []
    for rank in range(ranks):
        loader = FixedLoader(dataset, pool, batch_size=batch_size, dp_rank=rank, dp_world_size=ranks, reader=Reader(0))
        ids += [i for inputs, _ in loader for i in inputs["example_id"].tolist()]
    return sorted(i for i in ids if i < len(dataset))


def test_a_sample_for_validation_is_the_same_for_all_and_of_all_sources(tmp_path: Path) -> None:
    from titan_attent.data.text.format import ShardWriter, write_index

    dtype, entries = np.dtype("<u2"), []
    for source in ("code", "prose"):
        with ShardWriter(tmp_path / f"{source}.bin", dtype=dtype, source=source) as shard:
            shard.append(np.arange(2000) % 500)
            entries.append(shard.finish())
    info = {"name": "none", "vocab_size": 500, "eos_id": 499}
    write_index(tmp_path, dtype=dtype, shards=entries, num_documents=2, max_token_id=499, tokenizer=info)
    dataset = TokenDataset(tmp_path, seq_len=10)
    pool = sample(dataset, num_examples=48)
    expected = ids_of(dataset, pool, batch_size=48, ranks=1)
    assert len(expected) == 48 == len(set(expected))
    for batch_size, ranks in ((7, 1), (8, 2), (5, 3), (16, 4)):
        assert ids_of(dataset, pool, batch_size=batch_size, ranks=ranks) == expected
    second = dict(dataset.sources)["prose"]
    assert 12 <= sum(i < second for i in expected) <= 36  # of both, and not one end of the file
    everything = ids_of(dataset, sample(dataset, num_examples=10_000), batch_size=9, ranks=2)
    assert everything == list(range(len(dataset)))


@pytest.mark.parametrize(("ranks", "local", "accumulated"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 2, 1)])
def test_validation_steps_are_global_batches_whatever_their_cut(
    token_data: dict[str, Path], tmp_path: Path, ranks: int, local: int, accumulated: int
) -> None:
    from titan_attent.titan.validator import build_validator

    settings = {"training.local_batch_size": local, "training.global_batch_size": 8, "validation.steps": 3}
    config = config_of(
        settings | {"validation.local_batch_size": 5}, data=str(token_data["train"]), folder=str(tmp_path)
    )
    config.data.validation_path = str(token_data["validation"])
    mocks = (mock.MagicMock() for _ in range(5))
    validator = build_validator(DataSets(), mock.MagicMock(), config, ranks, 0, None, *mocks)
    dataset, pool = validator.sets[0].loader.dataset, validator.sets[0].loader.pool
    assert pool == sample(dataset, num_examples=24) and pool.size == 24 < len(dataset)
