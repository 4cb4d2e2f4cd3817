"""Scores on disk: complete or absent, bound to their examples, and one message for every mistake."""

import errno
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch

from titan_attent.data.examples import ScoredData
from titan_attent.scores import writer as reference_writer
from titan_attent.scores.stored import Scoring, StoredScores
from titan_attent.scores.writer import ScoresWriter

SCORING = Scoring(
    data_fingerprint="f00d",
    seq_len=16,
    num_examples=23,
    model="llama3_attent tiny",
    precision="float32",
    checkpoint="/run/checkpoint/step-3",
    checkpoint_sha256="beef",
)
LOSSES = torch.linspace(0.5, 9.0, 23)


def write(
    folder: Path, losses: torch.Tensor = LOSSES, *, scoring: Scoring = SCORING, size: int = 5, stop: int | None = None
) -> None:
    """Resume the losses in ``folder``, ``size`` at a time; to the end, or to id ``stop`` as a killed writer."""
    with ScoresWriter(folder, scoring=scoring) as writer:
        while writer.num_scored < (len(losses) if stop is None else stop):
            writer.append(losses[writer.num_scored :][:size])
        writer.wait()
        if stop is None:
            writer.finish()


def interrupt(folder: Path, *, stop: int = 10, scoring: Scoring = SCORING) -> Path:
    """The files of a writer that was killed within a write; returns the file of its losses."""
    write(folder, scoring=scoring, stop=stop)
    file = folder / "losses.bin"
    file.write_bytes(file.read_bytes() + b"\0\0\xc0\x7f of a killed write")
    (folder / "scoring.json.tmp").write_bytes(b"of a killed writer")
    return file


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write(tmp_path / "ref")
    return tmp_path / "ref"


def damage(folder: Path, **changes: object) -> None:
    file = folder / "reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_files_are_what_the_docstring_says(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["losses.bin", "reference.json"]
    np.testing.assert_array_equal(np.fromfile(finished / "losses.bin", dtype="<f4"), LOSSES.numpy())
    assert json.loads((finished / "reference.json").read_text()) == {
        "format": "titan_attent.reference",
        "version": 1,
        "data_fingerprint": "f00d",
        "seq_len": 16,
        "num_examples": 23,
        "model": "llama3_attent tiny",
        "precision": "float32",
        "checkpoint": "/run/checkpoint/step-3",
        "checkpoint_sha256": "beef",
        "sha256": hashlib.sha256((finished / "losses.bin").read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("size", [1, 5, 23, 4096])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    write(tmp_path, size=size)
    losses = pickle.loads(pickle.dumps(StoredScores(tmp_path)))
    losses.verify_checksum()
    losses.check(ScoredData("f00d", 16, 23))
    assert losses.num_examples == 23 and losses.scoring == SCORING
    for start, stop in ((0, 23), (3, 11), (22, 23), (7, 7), (23, 23)):
        read = losses.read(start, stop)
        assert read.dtype == torch.float32 and torch.equal(read, LOSSES[start:stop])
    read += 1  # a copy, not the read-only map
    for start, stop in ((-1, 3), (5, 24), (4, 3)):
        with pytest.raises(IndexError, match=re.escape(f"[{start}, {stop}) are outside [0, 23)")):
            losses.read(start, stop)


def test_losses_of_any_float_type_are_kept_as_fp32(tmp_path: Path) -> None:
    write(tmp_path, LOSSES.double())
    assert torch.equal(StoredScores(tmp_path).read(0, 23), LOSSES)


def test_check_names_every_difference(finished: Path) -> None:
    losses = StoredScores(finished)
    with pytest.raises(ValueError) as error:
        losses.check(ScoredData("cafe", 32, 11))
    for words in (
        *(
            str(finished),
            "data_fingerprint is 'cafe' in this run and 'f00d' in the folder",
            "seq_len is 32 in this run and 16 in the folder",
        ),
        *("num_examples is 11 in this run and 23 in the folder", "Score this data", "torchrun -m titan_attent.score"),
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="of other examples: seq_len is 32 in this run and 16 in the folder. Score"):
        losses.check(ScoredData("f00d", 32, 23))


def test_missing_and_unfinished(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: not a folder of scores, no such folder; correct the path"):
        StoredScores(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="no reference.json in it; .*write one with `torchrun -m titan_attent.score pair`"
    ):
        StoredScores(tmp_path)
    interrupt(tmp_path / "killed")
    with pytest.raises(ValueError, match="killed: its scoring was interrupted; run the same .* command again"):
        StoredScores(tmp_path / "killed")
    assert not (finished / "scoring.json").exists()
    (finished / "losses.bin").unlink()
    with pytest.raises(ValueError, match="losses.bin: this file is missing; copy the folder again"):
        StoredScores(finished)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "\x00\xff"])
def test_a_reference_that_is_no_json_object(finished: Path, content: str) -> None:
    (finished / "reference.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="reference.json: not a file with a JSON object in it .*score again"):
        StoredScores(finished)


@pytest.mark.parametrize("changes", [{"format": "somebody.elses"}, {"version": 2}, {"version": None}])
def test_another_format(finished: Path, changes: dict[str, object]) -> None:
    damage(finished, **changes)
    with pytest.raises(ValueError, match="expected format 'titan_attent.reference' version 1; use the package"):
        StoredScores(finished)


def test_a_data_set_in_the_place_of_losses(finished: Path) -> None:
    damage(finished, format="titan_attent.tokens")
    with pytest.raises(ValueError, match="holds a data set of text, .*; expected is a scorer's losses"):
        StoredScores(finished)


@pytest.mark.parametrize(
    "changes", [{"num_examples": 0}, {"num_examples": "23"}, {"seq_len": -1}, {"model": None}, {"extra": 1}]
)
def test_malformed_fields(finished: Path, changes: dict[str, object]) -> None:
    damage(finished, **changes)
    with pytest.raises(ValueError, match="reference.json: malformed .*copy the folder again"):
        StoredScores(finished)


@pytest.mark.parametrize("name", ["sha256", "data_fingerprint"])
def test_missing_fields(finished: Path, name: str) -> None:
    file = finished / "reference.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name}))
    with pytest.raises(ValueError, match=f"malformed .*'{name}'"):
        StoredScores(finished)


def test_truncated_and_altered_losses(finished: Path) -> None:
    file = finished / "losses.bin"
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(content)
    losses = StoredScores(finished)  # its size is right
    with pytest.raises(ValueError, match="losses.bin: its sha256 is .* the file is damaged; copy the folder again"):
        losses.verify_checksum()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="losses.bin: has 88 bytes instead of 92: truncated or replaced"):
        StoredScores(finished)


def test_a_finished_reference_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(ValueError, match="ref: holds finished scores; choose another --output"):
        ScoresWriter(finished, scoring=SCORING)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ref").touch()
    with pytest.raises(ValueError, match="ref: is a file"):
        ScoresWriter(tmp_path / "ref", scoring=SCORING)


def test_making_a_writer_writes_nothing(tmp_path: Path) -> None:
    ScoresWriter(tmp_path / "ref", scoring=SCORING)
    assert not (tmp_path / "ref").exists()


def test_a_folder_whose_finish_was_killed_is_finished(finished: Path) -> None:
    (finished / "scoring.json").write_text("of a killed writer")
    StoredScores(finished).verify_checksum()
    with pytest.raises(ValueError, match="holds finished scores"):
        ScoresWriter(finished, scoring=SCORING)


@pytest.mark.parametrize("stop", [5, 20, 23])
def test_a_resume_continues_after_the_durable_losses(tmp_path: Path, stop: int) -> None:
    file = interrupt(tmp_path, stop=stop)
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        assert writer.num_scored == min(stop, 23) and file.stat().st_size == 4 * min(stop, 23)
    marked = torch.cat([-LOSSES[:5], LOSSES[5:]])  # losses that are written again would lose their sign
    file.write_bytes(marked[:stop].numpy().tobytes())
    write(tmp_path, size=7)
    losses = StoredScores(tmp_path)
    losses.verify_checksum()
    assert torch.equal(losses.read(0, 23), marked)


@pytest.mark.parametrize(
    "change",
    [
        *({"data_fingerprint": "cafe"}, {"seq_len": 8}, {"num_examples": 24}, {"model": "llama3_attent 8B"}),
        *({"precision": "bfloat16"}, {"checkpoint_sha256": "dead"}),
    ],
)
def test_a_resume_with_anything_different_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = interrupt(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ((name, value),) = change.items()
    with pytest.raises(ValueError) as error:
        ScoresWriter(tmp_path, scoring=replace(SCORING, **change))  # type: ignore[arg-type]
    assert f"another interrupted scoring: {name} was {getattr(SCORING, name)!r} and is {value!r}. Use the same" in str(
        error.value
    )
    assert f"delete {file} to start again" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    file.unlink()
    write(tmp_path)


def test_a_moved_checkpoint_is_the_same(tmp_path: Path) -> None:
    interrupt(tmp_path)
    write(tmp_path, scoring=replace(SCORING, checkpoint="/elsewhere/step-3"))
    assert StoredScores(tmp_path).scoring.checkpoint == "/elsewhere/step-3"


def test_a_mistake_that_scored_nothing_is_forgotten(tmp_path: Path) -> None:
    interrupt(tmp_path, stop=0, scoring=replace(SCORING, seq_len=8))
    write(tmp_path)
    assert StoredScores(tmp_path).scoring == SCORING


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_losses_of_unknown_origin(tmp_path: Path, content: str | None) -> None:
    interrupt(tmp_path)
    file = tmp_path / "scoring.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="scoring.json: .*delete .*losses.bin to start again"):
        ScoresWriter(tmp_path, scoring=SCORING)


@pytest.mark.parametrize("count", [None, -1, 24, "10", 10.5])
def test_a_count_that_cannot_be(tmp_path: Path, count: object) -> None:
    interrupt(tmp_path)
    file = tmp_path / "scoring.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_scored": count}))
    with pytest.raises(ValueError, match="scoring.json: malformed, num_scored is .*; delete .*losses.bin to start"):
        ScoresWriter(tmp_path, scoring=SCORING)


def test_a_truncated_prefix(tmp_path: Path) -> None:
    file = interrupt(tmp_path)
    os.truncate(file, 39)
    with pytest.raises(ValueError, match="losses.bin: has 39 bytes, but 40 were written: truncated .*; delete"):
        ScoresWriter(tmp_path, scoring=SCORING)


def test_losses_that_are_cut_while_they_are_in_use(finished: Path) -> None:
    losses = StoredScores(finished)
    os.truncate(finished / "losses.bin", 40)
    assert torch.equal(losses.read(3, 10), LOSSES[3:10])
    with pytest.raises(ValueError, match="losses.bin: ends before example 11 of 23: truncated or replaced; copy"):
        losses.read(3, 11)


def test_an_unfinished_scoring_of_an_earlier_version_is_refused(tmp_path: Path, finished: Path) -> None:
    for folder in (tmp_path, finished):
        (folder / "parts").mkdir()
        (folder / "parts" / "progress.json").write_text("{}")
        (folder / "parts" / "part-00000.bin").write_bytes(LOSSES.numpy().tobytes())
    message = f"of an earlier version .*finish it with that version, or delete {tmp_path / 'parts'} and score again"
    for look in (lambda: ScoresWriter(tmp_path, scoring=SCORING), lambda: StoredScores(tmp_path)):
        with pytest.raises(ValueError, match=message):
            look()
    StoredScores(finished).verify_checksum()  # it was killed after its end


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    one, two = (ScoresWriter(tmp_path, scoring=SCORING) for _ in range(2))
    with one, pytest.raises(ValueError, match="another scoring is writing to this folder; wait for it"):
        two.__enter__()
    with two:
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_losses_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    losses = LOSSES.double()
    losses[[5, 7, 11, 12, 13, 14, 22]] = bad
    with pytest.raises(ValueError) as error:
        write(tmp_path, losses, size=20)
    message = (
        "6 of the 20 losses from example 0 on are not finite, first those of examples 5, 7, 11, 12, 13: the weights"
    )
    assert message in str(error.value)
    assert "/run/checkpoint/step-3" in str(error.value) and f"Delete {tmp_path / 'losses.bin'}" in str(error.value)
    with pytest.raises(ValueError, match="4 of the 7 losses from example 7 on .* of examples 7, 11, 12, 13: "):
        ScoresWriter(tmp_path, scoring=SCORING).check_finite(7, losses[7:14])  # as on ranks that do not write
    with pytest.raises(ValueError, match="2 of the 5 losses from example 5 on .* first those of examples 5, 7: "):
        write(tmp_path, losses)
    with pytest.raises(ValueError, match="its scoring was interrupted"):
        StoredScores(tmp_path)
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        assert writer.num_scored == 5, "the finite losses before it are kept"
    write(tmp_path)


def test_a_prefix_that_is_not_finite_is_found_before_anything_is_written(tmp_path: Path) -> None:
    file = interrupt(tmp_path)
    losses = LOSSES[:10].clone()
    losses[8:] = float("nan")
    file.write_bytes(losses.numpy().tobytes())
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        writer.append(LOSSES[10:])
        for raises in (writer.wait, writer.finish):
            with pytest.raises(ValueError, match="2 of the 10 losses from example 0 on .* of examples 8, 9: .*Delete"):
                raises()
        assert writer.failed
    assert file.stat().st_size == 40
    assert not (tmp_path / "reference.json").exists()


def fail_at(nth: int, error: BaseException, patched: pytest.MonkeyPatch) -> None:
    """From the nth durable step on, of every thread, only ``error``."""
    calls = count()

    def failing(do: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            if next(calls) >= nth:
                raise error
            return do(*args, **kwargs)

        return step

    patched.setattr(reference_writer, "write_atomically", failing(reference_writer.write_atomically))
    patched.setattr(reference_writer.os, "fsync", failing(os.fsync))
    patched.setattr(Path, "unlink", failing(Path.unlink))


@pytest.mark.parametrize("crash_at", range(15))
def test_a_crash_at_any_write_leaves_no_incomplete_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Die at the n-th durable step: the folder is complete, or refused and can be resumed."""
    with monkeypatch.context() as patched:
        fail_at(crash_at, KeyboardInterrupt(), patched)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, size=12)
    if (tmp_path / "reference.json").exists():
        StoredScores(tmp_path).verify_checksum()
    else:
        with pytest.raises(ValueError, match="interrupted|no reference.json"):
            StoredScores(tmp_path)
        write(tmp_path, size=12)
    assert torch.equal(StoredScores(tmp_path).read(0, 23), LOSSES)


@pytest.mark.parametrize("full_at", range(15))
def test_a_full_disk_is_one_clear_error_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    with monkeypatch.context() as patched:
        fail_at(full_at, OSError(errno.ENOSPC, "No space left on device"), patched)
        with pytest.raises(
            ValueError, match=r"cannot read or write the losses \(.*No space left .*run the same command"
        ):
            write(tmp_path, size=12)
    if not (tmp_path / "reference.json").exists():
        write(tmp_path, size=12)
    assert torch.equal(StoredScores(tmp_path).read(0, 23), LOSSES)


def test_nothing_is_written_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has space again after one failure: later losses must not take the place of the lost ones."""
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        with monkeypatch.context() as patched:
            fail_at(0, OSError(errno.ENOSPC, "No space left on device"), patched)
            writer.append(LOSSES[:5])
            with pytest.raises(ValueError, match="No space left"):
                writer.wait()
        assert writer.failed
        writer.append(LOSSES[5:])
        for raises in (writer.wait, writer.finish):
            with pytest.raises(ValueError, match="No space left"):
                raises()
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        assert writer.num_scored == 0 and not writer.failed
    write(tmp_path)
    assert torch.equal(StoredScores(tmp_path).read(0, 23), LOSSES)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = ScoresWriter(tmp_path / "file" / "ref", scoring=SCORING)
    with pytest.raises(ValueError, match="ref: cannot read or write the losses .*choose another"):
        writer.__enter__()


def test_a_slow_disk_blocks_append_only_when_the_backlog_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_writer, "BACKLOG", 4)
    disk = Event()
    stock = os.fsync
    with ScoresWriter(tmp_path, scoring=SCORING) as writer:
        monkeypatch.setattr(reference_writer.os, "fsync", lambda file: (disk.wait(60), stock(file))[1])
        try:
            for i in range(4):
                writer.append(LOSSES[i : i + 1])  # returns, while nothing is written
            assert writer.num_scored == 4 and not writer.failed
            assert json.loads((tmp_path / "scoring.json").read_text())["num_scored"] == 0
            fifth = Thread(target=writer.append, args=(LOSSES[4:5],))
            fifth.start()
            fifth.join(0.05)
            assert fifth.is_alive(), "the backlog is bounded"
        finally:
            disk.set()
        fifth.join()
        writer.append(LOSSES[5:])
        writer.finish()
    assert torch.equal(StoredScores(tmp_path).read(0, 23), LOSSES)
