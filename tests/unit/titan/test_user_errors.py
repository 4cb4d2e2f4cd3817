"""A user's mistake: one message, also in torchrun's report of the failure."""

import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from titan_attent.titan.user_errors import fail

MISTAKE = "data.path = nowhere has no index.json: write the data first"


def test_the_message_is_in_the_report_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))  # as torchrun sets it
    before = int(time.time())
    with pytest.raises(SystemExit) as end:
        fail(ValueError(MISTAKE))
    assert end.value.code == 2 and capsys.readouterr().err == f"titan_attent: error: {MISTAKE}\n"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message == MISTAKE and before <= failure.timestamp <= time.time()
    box = ChildFailedError("titan_attent.train", {0: failure}).format_msg()
    assert MISTAKE in box and "To enable traceback" not in box


def test_another_rank_of_a_node_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    for name, value in {"TORCHELASTIC_ERROR_FILE": str(file), "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        fail(ValueError(MISTAKE))
    assert not capsys.readouterr().err and not file.exists()
