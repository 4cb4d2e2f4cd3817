"""Files that are written past the page cache, and what an edit drops from it."""

import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from unit.edit.made import save, weights

from titan_attent.edit import pieces, uncached
from titan_attent.edit.command import main
from titan_attent.edit.uncached import NewFile

PARTS = [1, 4095, 4096, 3, 20_000, 0, 8192, 77]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page of the disk: a few make a file."""
    monkeypatch.setattr(uncached, "BLOCK", 4096)


@pytest.mark.parametrize("parts", [PARTS, [4096, 4096], [5], []], ids=str)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_is_what_was_written(parts: list[int], direct: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Of any length, in parts of any length; where a file system refuses O_DIRECT, too."""
    opened: list[int] = []
    stock = os.open

    def open_(path: str, flags: int, mode: int) -> int:
        opened.append(flags)
        if flags & uncached._DIRECT and not direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return stock(path, flags, mode)

    monkeypatch.setattr(os, "open", open_)
    expected = [os.urandom(size) for size in parts]
    (tmp_path / "x").write_bytes(b"an older file" * 10_000)
    with NewFile(str(tmp_path / "x")) as stream:
        assert [stream.write(part) for part in expected] == parts
    assert (tmp_path / "x").read_bytes() == b"".join(expected)
    assert len(opened) == (1 if direct else 2)


@pytest.mark.parametrize("size", [4096, 3 * 4096, 5])
def test_what_cannot_be_written_is_an_error(size: int, tmp_path: Path, monkeypatch: Any) -> None:
    """It is written by a thread: the error is raised by a later write, or by the end."""
    stock = os.write

    def write(descriptor: int, data: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"), NewFile(str(tmp_path / "full")) as stream:
        for _ in range(size // 4096 + 1):
            stream.write(bytes(min(size, 4096)))
    assert threading.active_count() == before and stream.closed


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NewFile(str(tmp_path / "none" / "x"))


def test_operands_are_dropped_from_the_cache_after_every_weight(tmp_path: Path, monkeypatch: Any) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(pieces, "forget", lambda stream: dropped.append(Path(stream.name).parent.name))
    for seed, name in ((1, "x"), (2, "y")):
        save(tmp_path / name, weights(seed))
    assert main([f"{tmp_path}/x", "+", f"{tmp_path}/y", "--output", f"{tmp_path}/out"]) == 0
    assert dropped.count("x") == dropped.count("y") == len(weights(1))


@pytest.mark.parametrize(("where", "most"), [("x", 32), ("s3://x", 64)])
def test_few_files_are_open_and_what_is_closed_is_dropped_from_the_cache(
    where: str, most: int, monkeypatch: Any
) -> None:
    """A mean of 20 checkpoints, each of more ranks than this, stays below the usual limit of 1024 files."""
    dropped: list[Any] = []
    monkeypatch.setattr(pieces, "forget", dropped.append)
    streams = {str(number): io.BytesIO(b"x") for number in range(100)}
    files = pieces.OpenFiles(where, streams.__getitem__)
    for number in streams:
        assert files.stream(number).read() == b"x"
    closed = [stream for stream in streams.values() if stream.closed]
    assert len(closed) == 100 - most and dropped == closed
