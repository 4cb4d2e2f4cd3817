"""Every mistake of a user ends in one message (what is wrong, where, the fix) before any process group exists."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from launch import launch, run, write_config
from torchtitan.config import ConfigManager

from titan_attent.titan.checks import preflight, toml_checks
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.train_spec import attent_spec

CLI = ["--job.custom_config_module", "titan_attent.job_config"]


@pytest.fixture
def data(token_data: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the data that a test may damage."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in token_data.items()}


@pytest.fixture
def config(data: dict[str, Path], tmp_path: Path) -> Path:
    return write_config(tmp_path, data=data, dump=tmp_path / "run", flavor="bench")


def check(config: Path, *args: str, world_size: int = 2) -> None:
    """What titan_attent.train does before it starts training."""
    toml_checks.check_toml(str(config))
    job_config = ConfigManager().parse_args(["--job.config_file", str(config), *CLI, *args])
    datasets = DataSets()
    spec = attent_spec(job_config.model.name, datasets)
    preflight.check_run(job_config, spec, world_size=world_size, datasets=datasets)
    preflight.check_files(job_config, datasets)  # with one rank here, all of them


def refuses(*words: str) -> Iterator[None]:
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(ValueError, match=f"(?s){pattern}")  # type: ignore[return-value]


def test_good_input_passes(config: Path) -> None:
    check(config, "--validation.enable")


def test_missing_data_folder(config: Path, data: dict[str, Path]) -> None:
    shutil.rmtree(data["train"])
    with refuses(r"\[data\] path", str(data["train"]), "titan_attent.data.text"):
        check(config)


def test_no_data_path(config: Path) -> None:
    with refuses(r"\[data\] path is empty", "titan_attent.data.text"):
        check(config, "--data.path", "")


def test_missing_shard(config: Path, data: dict[str, Path]) -> None:
    (data["train"] / "shard-00000.bin").unlink()
    with refuses("shard-00000.bin", "missing", "copy the data set again"):
        check(config)


def test_truncated_shard(config: Path, data: dict[str, Path]) -> None:
    shard = data["train"] / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with refuses("shard-00000.bin", "truncated", "copy the data set again"):
        check(config)


def test_checksum_mismatch(config: Path, data: dict[str, Path]) -> None:
    """Rank 1 hashes the second shard; rank 0 prints the error."""
    shard = data["train"] / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    check(config)  # its size is right
    result = launch("--job.config_file", str(config), "--data.verify_checksums")
    assert result.returncode != 0
    (message,) = re.findall("titan_attent: error: (.*)", result.stdout + result.stderr)
    assert re.search("shard-00001.bin: its sha256 is .* the shard is damaged; copy the data set again", message)


def test_token_beyond_the_vocabulary(config: Path) -> None:
    # The data has 512 token ids; this copy of the flavor has fewer.
    spec = attent_spec("llama3_attent")
    spec.model_args["bench"].vocab_size = 256  # type: ignore[attr-defined]
    job_config = ConfigManager().parse_args(["--job.config_file", str(config), *CLI])
    with refuses(
        r"\[data\] path", "token id 51", "beyond the 256 token ids of llama3_attent bench", "larger vocabulary"
    ):
        preflight.check_run(job_config, spec, world_size=2)


def test_seq_len_longer_than_the_data(config: Path) -> None:
    with refuses(r"\[data\] path", "seq_len 999998 needs 999999", "lower seq_len"):
        check(config, "--training.seq_len", "999998")


def test_fewer_examples_than_a_global_batch(config: Path) -> None:
    args = ("--training.global_batch_size", "4096", "--training.local_batch_size", "8")
    with refuses("fewer than one global batch of 4096", r"\[data\] path", "lower training.global_batch_size"):
        check(config, *args)


@pytest.mark.parametrize("key", ["strategy", "importance", "ratio_schedule", "interval_schedule", "normalization"])
def test_unknown_choice(config: Path, key: str) -> None:
    with refuses(rf"\[teacher\] {key} = 'sofd' is unknown", "use one of"):
        check(config, f"--teacher.{key}", "sofd")


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.1", "nan"])
def test_ratio_outside_its_range(config: Path, ratio: str) -> None:
    with refuses(r"\[teacher\] initial_ratio", "above 0 and at most 1"):
        check(config, "--teacher.initial_ratio", ratio)


def test_negative_temperature(config: Path) -> None:
    with refuses(r"\[teacher\] temperature = -1.0", "above 0"):
        check(config, "--teacher.temperature", "-1")


def test_typo_in_the_toml(config: Path) -> None:
    config.write_text(config.read_text().replace("initial_ratio", "inital_ratio"))
    with refuses(str(config), 'unknown key "inital_ratio" in .teacher.', 'did you mean "initial_ratio"'):
        check(config)


def test_typo_in_a_section(config: Path) -> None:
    config.write_text(config.read_text().replace("[teacher]", "[techer]"))
    with refuses(str(config), 'unknown key "techer"', 'did you mean "teacher"'):
        check(config)


def test_malformed_toml(config: Path) -> None:
    config.write_text("[job\n")
    with refuses(str(config), "not valid TOML"):
        check(config)


def test_missing_toml(tmp_path: Path) -> None:
    with refuses("nowhere.toml does not exist", "--job.config_file"):
        check(tmp_path / "nowhere.toml")


def test_missing_validation_data(config: Path, data: dict[str, Path]) -> None:
    shutil.rmtree(data["validation"])
    with refuses(r"\[data\] validation_path", str(data["validation"]), "titan_attent.data.text"):
        check(config, "--validation.enable")


def test_unknown_model_and_flavor(config: Path) -> None:
    with refuses('name = "llama3"', 'did you mean "llama3_attent"'):
        check(config, "--model.name", "llama3")
    with refuses('flavor = "tiney"', 'did you mean "tiny"'):
        check(config, "--model.flavor", "tiney")


def test_batch_that_does_not_split(config: Path) -> None:
    with refuses("global_batch_size = 8", "4 x 3 = 12", "change one of the three"):
        check(config, world_size=3)


def test_degrees_that_do_not_make_the_processes(config: Path) -> None:
    with refuses(r"\[parallelism\]", "tensor_parallel_degree 4", "the number of processes, 2", "--nproc_per_node"):
        check(config, "--parallelism.tensor_parallel_degree", "4")


def test_unread_data_settings_are_named(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(config)
    assert "is not read" not in caplog.text
    check(config, "--validation.dataloader.num_workers", "4")
    assert "[validation] dataloader is not read" in caplog.text


def test_command_line_reports_once_and_fails(config: Path) -> None:
    """Runs under torchrun with one process; the next test forks several."""
    args = ("--job.config_file", str(config), "--teacher.strategy", "sofd")
    result = launch(*args, num_processes=1, launcher="torchrun")
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("titan_attent: error: ") == 1
    assert "[teacher] strategy = 'sofd' is unknown: use one of" in result.stderr
    assert "titan_attent/train.py" not in result.stderr, "a traceback of this package"


def late_first_rank() -> None:
    """Rank 0 finds the mistake a second after the others, as where its imports are slow."""
    time.sleep(os.environ["RANK"] == "0")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--teacher.strategy", "sofd"), "titan_attent: error: "),
        (("--teacher.stratgy", "soft"), "Unrecognized options:"),
    ],
)
def test_the_first_rank_reports_however_late_it_is(config: Path, args: tuple[str, ...], message: str) -> None:
    """torchrun ends all ranks once one has exited, and only rank 0 prints."""
    result = launch("--job.config_file", str(config), *args, prepare=late_first_rank)
    assert result.returncode != 0
    assert result.stderr.count(message) == 1


def test_foreign_checkpoints_are_refused(config: Path, data: dict[str, Path], tmp_path: Path) -> None:
    args = ["--checkpoint.enable", "--training.steps", "2"]
    run("--job.config_file", str(config), *args, num_processes=1)
    check(config, *args)  # the same run resumes
    with refuses(
        "checkpoint/step-2", "training.seq_len is 32 in this run but 256 in the checkpoint", "another job.dump_folder"
    ):
        check(config, *args, "--training.seq_len", "32")
    with refuses("training.global_batch_size is 16 in this run but 8 in the checkpoint", "Resume with the same values"):
        check(config, *args, "--training.global_batch_size", "16")
    with refuses("teacher.seed is 7 in this run but 0 in the checkpoint"):
        check(config, *args, "--teacher.seed", "7")
    with refuses("data fingerprint is '.*' in this run but '.*' in the checkpoint"):
        check(config, *args, "--data.path", str(data["validation"]))
    with refuses("step-1 does not exist or was never finished", "checkpoint.load_step"):
        check(config, *args, "--checkpoint.load_step", "1")

    model_only = tmp_path / "model_only"
    run(
        "--job.config_file",
        str(config),
        *args,
        "--checkpoint.last_save_model_only",
        "--job.dump_folder",
        str(model_only),
        num_processes=1,
    )
    with refuses("step-2 holds no (teacher|dataloader) state", "last_save_model_only", "exclude_from_loading"):
        check(config, *args, "--job.dump_folder", str(model_only))
