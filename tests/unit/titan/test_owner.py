"""owner.py: two processes and one folder; the lock ends with its process; file systems without locks."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest

from titan_attent.foundations.file_lock import LOCK_FILE
from titan_attent.titan import owner
from titan_attent.titan.owner import _lock_files, own

# It takes only the lock, as importing the package takes seconds.
HOLDER = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.pwrite(handle, b"process 7 on elsewhere, since then", 0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def released() -> Any:
    yield
    owner._forget()


def hold(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_the_second_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "out" / LOCK_FILE
    path.parent.mkdir()
    holder = hold(path)
    with pytest.raises(ValueError) as caught:
        own(path, "[job] dump_folder")
    message = str(caught.value)
    assert message.startswith(
        f"[job] dump_folder = {path.parent}: another run is using this folder (process 7 on elsewhere"
    )
    assert "name another folder" in message
    holder.kill()
    holder.wait()
    own(path, "[job] dump_folder")  # the file still exists, without a lock
    assert f"process {os.getpid()} on " in path.read_text()
    assert "elsewhere" not in path.read_text()


def test_others_cannot_take_the_lock_and_the_holder_may_take_it_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out" / LOCK_FILE
    own(path, "key")
    (tmp_path / "alias").symlink_to(tmp_path / "new")
    own(path, "key")
    own(tmp_path / "alias" / "out" / LOCK_FILE, "key")
    with open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_forked_child_that_outlives_the_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    own(path, "key")
    is_up, signal = os.pipe()
    child = os.fork()
    if not child:
        os.write(signal, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(is_up, 1)
    try:
        owner._forget()  # as the end of this process would
        own(path, "key")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    own(tmp_path / LOCK_FILE, "[job] dump_folder")
    assert "supports no locks" in caplog.text and str(tmp_path) in caplog.text


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own(tmp_path / "file" / "out" / LOCK_FILE, "key")
    assert not owner._held


def config(dump: Path, folder: str, *, enable: bool = True) -> Any:
    checkpoint = SimpleNamespace(enable=enable, folder=folder)
    return SimpleNamespace(job=SimpleNamespace(dump_folder=str(dump)), checkpoint=checkpoint)


def test_a_checkpoint_folder_elsewhere_has_a_lock_of_its_own(tmp_path: Path) -> None:
    own_lock = tmp_path / "a" / LOCK_FILE
    assert list(_lock_files(config(tmp_path / "a", "checkpoint"))) == [own_lock]
    for folder in ("../shared", str(tmp_path / "shared")):
        files = list(_lock_files(config(tmp_path / "a", folder)))
        assert files[0] == own_lock and files[1].resolve() == tmp_path / f".shared.{LOCK_FILE}"
        assert list(_lock_files(config(tmp_path / "a", folder, enable=False))) == [own_lock]


def test_a_checkpoint_folder_has_one_lock_through_any_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    for run in "ab":
        (tmp_path / run).mkdir()
        (tmp_path / run / "checkpoint").symlink_to(tmp_path / "shared")
    a, b = (list(_lock_files(config(tmp_path / run, "checkpoint"))) for run in "ab")
    assert a[0] != b[0] and a[1] == b[1] == tmp_path / f".shared.{LOCK_FILE}"


def test_a_checkpoint_folder_in_the_dump_folder_of_another_run(tmp_path: Path) -> None:
    other_lock = tmp_path / "b" / LOCK_FILE
    beside = tmp_path / "b" / f".checkpoint.{LOCK_FILE}"
    own(other_lock, "[job] dump_folder")
    assert list(_lock_files(config(tmp_path / "a", "../b/checkpoint")))[1:] == [beside, other_lock]
    own(beside, "[checkpoint] folder")
    assert list(_lock_files(config(tmp_path / "b", "checkpoint"))) == [other_lock, beside]


def test_the_lock_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stock_open = tmp_path / LOCK_FILE, os.open
    holder = hold(path)

    def open_refusing_writes(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stock_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_refusing_writes)
    with pytest.raises(ValueError, match="another run is using this folder .process 7 on elsewhere"):
        own(path, "key")
    holder.kill()
    holder.wait()
    own(path, "key")
    assert owner._held
