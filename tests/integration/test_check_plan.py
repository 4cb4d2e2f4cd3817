"""``titan_attent.train --check``: its plan is what the run does, it writes nothing, and it refuses as a run does."""

import logging
import os
import re
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from launch import launch, read_scalars, read_trace, run
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_attent.data.text.shards import TokenDataset
from titan_attent.titan import launch as train_command
from titan_attent.titan.checkpoint_metadata import read_metadata
from titan_attent.titan.launch import check
from titan_attent.titan.run_plan import RunPlan, plan_of

STEPS = 6


def planned(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, code: int = 0
) -> str:
    """What ``--check 2`` prints, in this process; the error if ``code`` is 1."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))  # the command adds one to the captured stderr
    capsys.readouterr()
    assert check(arguments, world_size=2) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def without_torchrun() -> None:
    """Prepare a worker: the environment of a shell."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]


def size(text: str) -> float:
    """Bytes of "1.25 MiB"."""
    number, unit = text.split()
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


def test_the_plan_is_what_the_run_does(
    small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = tmp_path / "run"
    arguments = [
        *(*small_run, "--job.dump_folder", str(dump), "--training.steps", str(STEPS)),
        *("--checkpoint.enable", "--checkpoint.interval", "4", "--checkpoint.keep_latest_k", "2"),
        *("--teacher.full_data_tail", "0", "--teacher.warmup_passes", "0", "--teacher.scoring", "forward"),
    ]
    alone = launch("--check", "2", *arguments, num_processes=1, prepare=without_torchrun)
    assert alone.returncode == 0, alone.stderr
    plan = alone.stdout
    assert not dump.exists()
    log = run(*arguments)

    (parameters,) = re.findall(r"model .*: ([\d,]+) parameters", plan)
    assert f"size: {parameters} total parameters" in re.sub(r"\x1b\[\d+m", "", log)
    dataset = TokenDataset(next(Path(small_run[1]).parent.glob("data")), seq_len=64)
    trace = read_trace(dump)
    num_trained = sum(len(line["ids"]) for line in trace)
    assert read_scalars(dump, "ledger/examples_trained")[STEPS] == num_trained
    (steps, batch, tokens, passes) = re.findall(
        r"steps +(\d+) of (\d+) x 64 = .*: ([\d,]+) tokens, (\S+) passes", plan
    )[0]
    assert (int(steps), int(batch)) == (len(trace), len(trace[0]["ids"]))
    assert int(tokens.replace(",", "")) == num_trained * 64
    assert float(passes) == pytest.approx(num_trained / len(dataset), abs=0.005)
    # What it writes.
    (listed,) = re.findall(rf"files +in {re.escape(str(dump))}: (.*)", plan)
    written = {str(path.relative_to(dump)) for path in dump.rglob("*") if path.is_file()}
    others = {name for name in written if not name.startswith("checkpoint/")}
    found = {"tb/" if name.startswith("tb/") else name for name in others}
    assert found - {"checkpoint/branch.json"} == set(listed.split(", "))
    (num_saved, last, kept, each) = re.findall(
        r"step-N: (\d+) checkpoints, the last after step (\d+); at most (\d+) kept, about (\S+ \S+) each", plan
    )[0]
    assert (int(num_saved), int(last), int(kept)) == (2, STEPS, 2)
    folders = list((dump / "checkpoint").glob("step-*"))
    assert {folder.name for folder in folders} == {"step-4", "step-6"}
    stored = read_metadata(dump / "checkpoint" / f"step-{STEPS}").state_dict_metadata
    tensors = [entry for entry in stored.values() if isinstance(entry, TensorStorageMetadata)]
    on_disk = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    assert size(each) == pytest.approx(on_disk, rel=0.05)

    # On a resume, and at the end.
    plans: list[RunPlan] = []
    monkeypatch.setattr(
        train_command, "plan_of", lambda *args, **more: plans.append(plan_of(*args, **more)) or plans[0]
    )
    text = planned([*arguments, "--training.steps", "9"], capsys, monkeypatch)
    # Memory on each of two ranks, by the tensors that the checkpoint of all ranks holds.
    memory = {name: num_bytes for name, num_bytes, _ in plans[0].memory}
    sizes = {name: entry.size.numel() for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    moments = sum(num for name, num in sizes.items() if name.endswith((".exp_avg", ".exp_avg_sq")))
    assert memory["optimizer"] == 4 * moments // 2 and memory["weights"] == memory["gradients"] == 2 * moments // 2
    per_example = sum(4 for name, num in sizes.items() if name.startswith("teacher.") and num == len(dataset))
    assert per_example >= 36
    shard = -(-len(dataset) // 2) * per_example
    assert memory["teacher"] == shard + len(dataset) // 8 + len(dataset) // 64
    assert f"start       {dump}/checkpoint/step-6, at step 6" in text and "3 steps remain, 1,536 tokens" in text
    assert "nothing is left to train: the run has finished" in planned(arguments, capsys, monkeypatch)
    assert {str(path.relative_to(dump)) for path in dump.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize(
    "bad",
    [
        ("--training.global_batch_size", "7"),
        ("--parallelism.tensor_parallel_degree", "3"),
        ("--data.path", "/nowhere"),
        ("--teacher.initial_ratio", "2"),
        ("--checkpoint.load_step", "3"),
    ],
    ids=lambda bad: bad[0],
)
def test_it_refuses_as_a_run_does(
    small_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bad: tuple[str, str],
) -> None:
    arguments = [*small_run, "--job.dump_folder", str(tmp_path / "run"), *bad]
    message = planned(arguments, capsys, monkeypatch, code=1)
    refused = launch(*arguments)
    assert refused.returncode and [line for line in refused.stderr.splitlines() if "titan_attent: error" in line] == [
        line for line in message.splitlines() if "titan_attent: error" in line
    ]
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_is_found_before_the_run(
    small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in (Path(small_run[1]).parent / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes()[: -2 if file.name == "shard-00000.bin" else None])
    message = planned([*small_run, "--data.path", str(data)], capsys, monkeypatch, code=1)
    assert "shard-00000.bin" in message and "truncated or replaced" in message
