"""``[data] group_size``: a run whose batches and data hold whole groups passes the checks, every other is refused."""

import copy
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torchtitan.config import ConfigManager, JobConfig

from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.system import Teaching
from titan_attent.tasks.recall import Recall
from titan_attent.tasks.writer import write_task
from titan_attent.titan.checks import preflight
from titan_attent.titan.loader import check_geometry
from titan_attent.titan.settings import document_settings
from titan_attent.titan.train_spec import attent_spec

TOML = Path(__file__).parents[3] / "train_configs" / "recall_seeds.toml"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_task(Recall(pairs=8, keys=16, values=8, seeds=4), output=folder, examples=3200, validation_examples=40)
    return folder


@pytest.fixture(scope="module")
def config(written: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    paths = {"job.dump_folder": tmp_path_factory.mktemp("run"), "data.path": written / "train"}
    paths["data.validation_path"] = written / "validation"
    words = [word for key, value in paths.items() for word in (f"--{key}", str(value))]
    return ConfigManager().parse_args(["--job.config_file", str(TOML), *words])


def check(config: JobConfig, values: dict[str, Any]) -> None:
    config = copy.deepcopy(config)
    for path, value in values.items():
        section, _, key = path.partition(".")
        assert hasattr(getattr(config, section), key), path
        setattr(getattr(config, section), key, value)
    preflight.check_run(config, attent_spec("llama3_attent"), world_size=2)


TO_DOCUMENTS = {"data.exact_match": False, "validation.enable": False}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"teacher.q": 1.0},
        {"teacher.loss_chunks": 4},
        {"teacher.weighting": "none"},
        {"data.group_size": 2},
        {"data.group_size": 1, "data.exact_match": False},
        {"data.group_size": 1, "training.seq_len": 128, "teacher.q": 2.0},
        {"validation.local_batch_size": 6, "data.exact_match": False},
        {"parallelism.tensor_parallel_degree": 2},
    ],
)
def test_runs_that_keep_groups_whole(config: JobConfig, values: dict[str, Any]) -> None:
    check(config, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.group_size": 0}, r"\[data\] group_size = 0: it must be a whole number at least 1"),
        ({"data.unit": "window"} | TO_DOCUMENTS, 'group_size = 4 with unit = "window": a group is of whole rows'),
        ({"data.packing": "concatenate", "teacher.weighting": "none"}, "with packing = concatenate: with groups each"),
        ({"data.max_examples_per_window": 2}, "with max_examples_per_window = 2: with groups each row"),
        ({"data.sources": {"train": {"proportion": 1.0}}}, r"with \[data.sources\]: the rows that a batch takes"),
        ({"teacher.strategy": "hard", "teacher.weighting": "none"}, 'strategy = "hard": it selects rows one by one'),
        ({"training.global_batch_size": 130, "training.local_batch_size": 65, "teacher.weighting": "none"}, "of 130: "),
        ({"data.group_size": 3, "teacher.weighting": "none"}, "make training.global_batch_size a multiple of 3"),
        ({"data.group_size": 128, "training.local_batch_size": 64, "teacher.q": 1.0}, "says --seeds 4"),
        ({"training.seq_len": 20, "validation.seq_len": 20}, "3200 documents are 6400 examples, as some have more"),
        ({"data.group_size": 64, "data.exact_match": False, "training.global_batch_size": 384}, "says --seeds 4, so"),
        ({"data.group_size": 16}, "path = .*: .*task.json says --seeds 4, so .* Set group_size = 4, or write the data"),
        ({"validation.local_batch_size": 30}, "and validation.local_batch_size = 30: a vote is taken within a batch"),
        ({"parallelism.context_parallel_degree": 2}, r'\[teacher\] weighting = "worst_case" with context_parallel'),
        (
            {"parallelism.context_parallel_degree": 2, "teacher.weighting": "none"},
            "context_parallel_degree = 2, with which no rank has a whole answer",
        ),
        ({"parallelism.pipeline_parallel_degree": 2}, "the last stage alone knows the losses"),
        ({"optimizer.early_step_in_backward": True}, "early_step_in_backward = true: the gradient is scaled by"),
        ({"data.group_size": 1, "data.packing": "concatenate"}, 'with data.packing = "concatenate": no window has'),
        ({"training.local_batch_size": 2, "training.global_batch_size": 128}, "Make local_batch_size a multiple of 4"),
    ],
)
def test_what_would_cut_a_group_is_refused(config: JobConfig, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config, values)


def test_rows_that_no_task_describes_are_counted(config: JobConfig, written: Path, tmp_path: Path) -> None:
    """3,200 rows are 200 groups of 16, and 40 validation rows are none."""
    paths: dict[str, Any] = {}
    for key, name in (("data.path", "train"), ("data.validation_path", "validation")):
        (tmp_path / name).symlink_to(written / name)
        paths[key] = str(tmp_path / name)
    check(config, paths | {"data.group_size": 16, "data.exact_match": False})
    with pytest.raises(ValueError, match="validation_path = .*: its 40 rows are no groups of group_size = 16"):
        check(config, paths | {"data.group_size": 16})


def test_with_q_of_one_no_system_takes_part_and_the_step_is_torchtitans_own() -> None:
    assert not Teaching.is_on(TeacherConfig(weighting="worst_case", q=1.0))
    assert Teaching.is_on(TeacherConfig(weighting="worst_case", q=1.5))


def test_a_run_resumes_with_the_groups_that_it_began_with(config: JobConfig) -> None:
    grouped = document_settings(config)
    check_geometry(grouped, grouped, where="the checkpoint")
    without = {key: value for key, value in grouped.items() if key != "data.group_size"}  # and any earlier version's
    check_geometry(without, without, where="the checkpoint")
    with pytest.raises(ValueError, match="data.group_size is 4 in this run but 1 in the checkpoint"):
        check_geometry(without, grouped, where="the checkpoint")
    with pytest.raises(ValueError, match="data.group_size is 1 in this run but 4 in the checkpoint"):
        check_geometry(grouped, without, where="the checkpoint")
