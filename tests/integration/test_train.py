"""The real command under the settings that users change: ranks, accumulation, HSDP, compile, another model."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import read_scalars, read_trace, run, write_config

from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.foundations.ledger import RUN_ACCOUNTS, TEACHING_ACCOUNTS

LOSS = "loss_metrics/global_avg_loss"


@pytest.fixture(scope="module")
def baseline(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps on two ranks: a warm-up, soft rounds and the anneal tail."""
    folder = tmp_path_factory.mktemp("baseline")
    config = write_config(folder, data=token_data, dump=folder / "run", flavor="bench")
    args = ("--training.steps", "24", "--data.num_workers", "0", "--validation.enable", "--validation.freq", "12")
    run("--job.config_file", str(config), *args)
    return folder


def train(
    folder: Path,
    name: str,
    *args: str,
    num_processes: int = 2,
    steps: int = 24,
    prepare: Callable[[], None] | None = None,
) -> Path:
    dump = folder / name
    run(
        *("--job.config_file", str(folder / "config.toml"), "--job.dump_folder", str(dump)),
        # A shorter run is the beginning of the baseline: the same learning rates, no anneal tail of its own.
        *("--training.steps", str(steps), "--lr_scheduler.total_steps", "24"),
        *(("--teacher.full_data_tail", "0") if steps < 24 else ()),
        *args,
        num_processes=num_processes,
        prepare=prepare,
    )
    return dump


def test_every_phase_is_logged_with_the_tags_of_the_design(baseline: Path) -> None:
    trace = read_trace(baseline / "run")
    assert [line["step"] for line in trace] == list(range(1, 25))
    strategies = [line["strategy"] for line in trace]
    assert strategies[0] == "uniform" and "soft" in strategies and strategies[-1] == "uniform"
    step = strategies.index("soft") + 1
    for tag in (
        *("teacher/round", "teacher/ratio", "teacher/selected", "teacher/importance_mean", "teacher/importance_p99"),
        *("teacher/effective_sample_size", "teacher/loss_age", "teacher/never_selected", "teacher/overlap"),
        *("teacher/max_weight", "ledger/select_seconds", "ledger/exchange_seconds", "ledger/overhead_percent"),
        *("ledger/examples_trained", "ledger/examples_covered", "ledger/tokens_covered_per_second"),
    ):
        assert step in read_scalars(baseline / "run", tag), tag
    assert read_scalars(baseline / "run", "ledger/examples_trained")[24] == 24 * 8
    assert sorted(read_scalars(baseline / "run", "validation_metrics/loss")) == [1, 12, 24]


def test_bits_per_byte_of_a_run_by_hand(baseline: Path, token_data: dict[str, Path]) -> None:
    """From the run's nats per token, and the text of the labels that it validated, decoded."""
    path = token_data["validation"]
    shards = TokenShards(path)
    num_labels = (shards.num_tokens - 1) // 256 * 256
    labels = shards.read(1, 1 + num_labels)
    tokenizer = open_tokenizer(shards.tokenizer_info, path)
    text = labels[labels != tokenizer.eos_id]
    num_bytes = len(tokenizer._encoding.decode_bytes(text.tolist())) + num_labels - len(text)
    losses, bits = (read_scalars(baseline / "run", f"validation_metrics/{tag}") for tag in ("loss", "bits_per_byte"))
    assert sorted(bits) == [1, 12, 24]
    for step, value in bits.items():
        assert value == pytest.approx(losses[step] * num_labels / math.log(2) / num_bytes, rel=1e-6)


def test_the_accounts_of_the_ledger_are_the_wall_time(baseline: Path) -> None:
    """Every second is in one account at most, and what no account has is under 5%."""
    wall = read_scalars(baseline / "run", "ledger/wall_seconds")
    accounts = {
        name: read_scalars(baseline / "run", f"ledger/{name}_seconds")
        for name in (*RUN_ACCOUNTS, *(account.name for account in TEACHING_ACCOUNTS))
    }
    for step in (12, 24):
        charged = sum(seconds[step] for seconds in accounts.values())
        assert 0.95 * wall[step] < charged <= wall[step], step
    assert all(accounts[name][24] > 0 for name in ("load", "train", "select", "exchange", "save", "validate"))


def test_accumulation_trains_the_same_examples(baseline: Path) -> None:
    dump = train(baseline, "accumulated", "--training.local_batch_size", "2", steps=8)
    assert read_trace(dump) == read_trace(baseline / "run")[:8]
    losses, expected = read_scalars(dump, LOSS), read_scalars(baseline / "run", LOSS)
    assert losses == {step: pytest.approx(expected[step], rel=1e-5) for step in range(1, 9)}


@pytest.mark.exhaustive
def test_hsdp_trains_the_same_examples(baseline: Path) -> None:
    dump = train(
        *(baseline, "hsdp", "--training.local_batch_size", "2"),
        *("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2"),
        num_processes=4,
        steps=4,
    )
    assert read_trace(dump) == read_trace(baseline / "run")[:4]
    expected = read_scalars(baseline / "run", LOSS)
    assert read_scalars(dump, LOSS) == {step: pytest.approx(expected[step], rel=1e-5) for step in range(1, 5)}


@pytest.mark.exhaustive
def test_compiled_loss_agrees(baseline: Path) -> None:
    """By Inductor. Models are compiled in tests/distributed, by a backend that takes a tenth of the time."""
    dump = train(baseline, "compiled", "--compile.enable", "--compile.components", "loss", steps=3)
    expected = read_scalars(baseline / "run", LOSS)
    assert read_scalars(dump, LOSS) == {step: pytest.approx(expected[step], rel=1e-4) for step in range(1, 4)}


def narrow_qwen3() -> None:
    """Its smallest flavor has 8 layers of 3072."""
    from torchtitan.models.qwen3 import qwen3_args

    flavor = qwen3_args["debugmodel"]
    flavor.n_layers, flavor.hidden_dim = 2, 512


@pytest.mark.exhaustive
def test_qwen3_learns_under_the_teacher(baseline: Path) -> None:
    dump = train(
        *(baseline, "qwen3", "--model.name", "qwen3_attent", "--model.flavor", "debugmodel"),
        *("--teacher.warmup_passes", "0", "--teacher.strategy", "hard"),
        *("--training.seq_len", "64"),
        steps=6,
        prepare=narrow_qwen3,
    )
    losses = read_scalars(dump, LOSS)
    assert losses[6] < losses[1] - 0.1
    assert read_trace(dump)[0]["strategy"] == "hard"
