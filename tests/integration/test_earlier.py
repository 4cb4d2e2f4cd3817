"""What an earlier state of the package wrote loads, and goes on as it would have then (make_earlier.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import read_scalars, read_trace, run, write_config
from make_earlier import ARGUMENTS, SAVED_AT, STEPS, TRAIN_LOSS, add_flavor

from titan_attent.data.text.shards import TokenDataset
from titan_attent.scores.stored import StoredScores

EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize("num_processes", [2, 1])
def test_a_checkpoint_and_a_data_set_go_on_with_equal_ids_and_losses(tmp_path: Path, num_processes: int) -> None:
    dump = tmp_path / "run"
    shutil.copytree(EARLIER / "run", dump)
    config = write_config(tmp_path, data={"train": EARLIER / "tokens", "validation": EARLIER / "tokens"}, dump=dump)
    run("--job.config_file", str(config), *ARGUMENTS, num_processes=num_processes, prepare=add_flavor)
    expected = [json.loads(line) for line in (EARLIER / "steps.jsonl").read_text().splitlines()][SAVED_AT:]
    trace, losses = read_trace(dump), read_scalars(dump, TRAIN_LOSS)
    assert [line["step"] for line in trace] == list(range(SAVED_AT + 1, STEPS + 1))
    assert [line["ids"] for line in trace] == [line["ids"] for line in expected]
    # Another processor, or another number of processes, rounds otherwise.
    assert [losses[line["step"]] for line in trace] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_reference_losses_load(tmp_path: Path) -> None:
    dataset = TokenDataset(EARLIER / "tokens", seq_len=32)
    reference = StoredScores(EARLIER / "reference")
    reference.check(dataset.scored)
    reference.verify_checksum()
    losses = reference.read(0, len(dataset))
    assert losses.shape == (len(dataset),) and bool(torch.isfinite(losses).all())
