"""The configurations of train_configs/ pass every check of a run on the numbers of processes that they promise."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torchtitan.config import ConfigManager, JobConfig

from titan_attent.titan import train_spec
from titan_attent.titan.checks import groups, preflight, toml_checks
from titan_attent.titan.settings import systems_of

ROOT = Path(__file__).parents[3]
LARGE = "llama3_8b_attent.toml"
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8

# File, processes, what the command line adds; as the files' comments and the quickstarts' scripts have it.
GRANTED: list[tuple[str, int, dict[str, Any]]] = [
    *((LARGE, nodes * GPUS, {}) for nodes in NODES),
    *((LARGE, nodes * GPUS, {"parallelism.data_parallel_replicate_degree": nodes}) for nodes in NODES),
    *((LARGE, nodes * GPUS, {"training.local_batch_size": 2}) for nodes in NODES if nodes * GPUS <= 256),
    *(("quickstart.toml", world, {}) for world in (1, 2, 4)),
    *(("quickstart.toml", world, {"training.local_batch_size": 4 // world}) for world in (1, 2, 4)),
    *(("own_data.toml", world, {}) for world in (1, 2, 4, 8)),
    *(("own_data.toml", 1, {"model.flavor": flavor}) for flavor in ("10M", "350M", "8B", "125M_flex")),
    *(("recall.toml", world, {}) for world in (1, 2)),
    *(("recall_seeds.toml", world, {}) for world in (1, 2)),
    *(("fuzzy_logic.toml", world, {}) for world in (1, 2)),
    ("fuzzy_logic.toml", 2, {"parallelism.context_parallel_degree": 2}),
    ("fuzzy_logic.toml", 1, {"model.flavor": "reference_fuzzy_logic"}),
    ("fuzzy_logic.toml", 1, {"model.name": "llama3_attent"}),
    *(("quickstart_vision.toml", world, {}) for world in (1, 2)),
    *(("quickstart_vision.toml", world, {"training.local_batch_size": 64 // world}) for world in (1, 2, 4, 8, 16)),
]


def parsed(name: str, dump: Path, values: dict[str, Any]) -> JobConfig:
    path = str(ROOT / "train_configs" / name)
    toml_checks.check_toml(path)
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    words += ["--job.dump_folder", str(dump)]
    return ConfigManager().parse_args(["--job.config_file", path, *words])


class Sized(SimpleNamespace):
    """A data set large enough for any run, without shards."""

    def __len__(self) -> int:
        return 10**8

    num_rows = 10**8


def check(config: JobConfig, *, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """preflight.check_run without the checks that read data and losses."""
    data = Sized(stored=SimpleNamespace(fingerprint="synthetic"), seq_len=config.training.seq_len, tokens_per_example=1)
    monkeypatch.setattr(preflight, "open_examples", lambda *args, **kwargs: data)
    monkeypatch.setattr(groups, "check_data", lambda *args, **kwargs: None)
    for system, _ in systems_of(config):
        monkeypatch.setattr(system, "check_data", lambda *args: None)
    preflight.check_run(config, train_spec.attent_spec(config.model.name), world_size=world_size)


@pytest.mark.parametrize("name, world_size, values", GRANTED)
def test_it_passes_the_checks_of_a_run(
    name: str, world_size: int, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(parsed(name, tmp_path, values), world_size=world_size, monkeypatch=monkeypatch)


@pytest.mark.parametrize("nodes", [3, 5, 12, 128])
def test_another_number_of_nodes_is_refused_by_the_batch(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="global_batch_size = 512 must be a multiple of"):
        check(parsed(LARGE, tmp_path, {}), world_size=nodes * GPUS, monkeypatch=monkeypatch)


def test_every_file_is_checked_here_and_the_large_one_says_its_numbers() -> None:
    assert {name for name, _, _ in GRANTED} == {path.name for path in (ROOT / "train_configs").glob("*.toml")}
    promised = ", ".join(map(str, NODES[:-1])) + f" or {NODES[-1]} nodes of {GPUS} GPUs"
    for path in (ROOT / "train_configs" / LARGE, ROOT / "scripts" / "multinode.slurm"):
        assert promised in path.read_text(), path
