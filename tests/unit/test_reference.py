"""Reference losses on disk: whole or not there, bound to their examples, and every mistake told."""

import hashlib
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_attent import reference_writer
from titan_attent.reference import ReferenceLosses, Scoring
from titan_attent.reference_writer import ReferenceWriter

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


def write(folder: Path, losses: torch.Tensor = LOSSES, *, scoring: Scoring = SCORING, part_size: int = 5) -> None:
    with ReferenceWriter(folder, scoring=scoring, part_size=part_size) as writer:
        write_parts(writer, losses)
        writer.finish()


def write_parts(writer: ReferenceWriter, losses: torch.Tensor = LOSSES, *, stop: int | None = None) -> None:
    for part in writer.missing()[:stop]:
        writer.write_part(part, losses[slice(*writer.range_of(part))])


def interrupt(folder: Path, *, num_parts: int = 2, scoring: Scoring = SCORING, part_size: int = 5) -> Path:
    """What a killed writer leaves; returns the folder of its parts."""
    with ReferenceWriter(folder, scoring=scoring, part_size=part_size) as writer:
        write_parts(writer, stop=num_parts)
    return folder / "parts"


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


@pytest.mark.parametrize("part_size", [1, 5, 23, 4096])
def test_what_is_written_is_read(tmp_path: Path, part_size: int) -> None:
    write(tmp_path, part_size=part_size)
    losses = pickle.loads(pickle.dumps(ReferenceLosses(tmp_path)))
    losses.verify_checksum()
    losses.check(fingerprint="f00d", seq_len=16, num_examples=23)
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
    assert torch.equal(ReferenceLosses(tmp_path).read(0, 23), LOSSES)


def test_check_names_every_difference(finished: Path) -> None:
    losses = ReferenceLosses(finished)
    with pytest.raises(ValueError) as error:
        losses.check(fingerprint="cafe", seq_len=32, num_examples=11)
    for words in (
        *(str(finished), "data_fingerprint is 'cafe' now and 'f00d' there", "seq_len is 32 now and 16 there"),
        *("num_examples is 11 now and 23 there", "Score this data", "torchrun -m titan_attent.score"),
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="of other examples: seq_len is 32 now and 16 there. Score"):
        losses.check(fingerprint="f00d", seq_len=32, num_examples=23)


def test_missing_and_unfinished(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: not a folder of reference losses, no such folder; correct the path"):
        ReferenceLosses(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no reference.json in it; .*write one with `torchrun -m titan_attent.score`"):
        ReferenceLosses(tmp_path)
    interrupt(tmp_path / "killed")
    with pytest.raises(ValueError, match="killed: its scoring was interrupted; run the same .* command again"):
        ReferenceLosses(tmp_path / "killed")
    (finished / "losses.bin").unlink()
    with pytest.raises(ValueError, match="losses.bin: this file is missing; copy the folder again"):
        ReferenceLosses(finished)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "\x00\xff"])
def test_a_reference_that_is_no_json_object(finished: Path, content: str) -> None:
    (finished / "reference.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="reference.json: not a file with a JSON object in it .*score again"):
        ReferenceLosses(finished)


@pytest.mark.parametrize("changes", [{"format": "titan_attent.tokens"}, {"version": 2}, {"version": None}])
def test_another_format(finished: Path, changes: dict[str, object]) -> None:
    damage(finished, **changes)
    with pytest.raises(ValueError, match="this package reads 'titan_attent.reference' version 1; use the package"):
        ReferenceLosses(finished)


@pytest.mark.parametrize(
    "changes", [{"num_examples": 0}, {"num_examples": "23"}, {"seq_len": -1}, {"model": None}, {"extra": 1}]
)
def test_malformed_fields(finished: Path, changes: dict[str, object]) -> None:
    damage(finished, **changes)
    with pytest.raises(ValueError, match="reference.json: malformed .*copy the folder again"):
        ReferenceLosses(finished)


@pytest.mark.parametrize("name", ["sha256", "data_fingerprint"])
def test_missing_fields(finished: Path, name: str) -> None:
    file = finished / "reference.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name}))
    with pytest.raises(ValueError, match=f"malformed .*'{name}'"):
        ReferenceLosses(finished)


def test_truncated_and_altered_losses(finished: Path) -> None:
    file = finished / "losses.bin"
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(content)
    losses = ReferenceLosses(finished)  # its size is right
    with pytest.raises(ValueError, match="losses.bin: its sha256 is .* the file is damaged; copy the folder again"):
        losses.verify_checksum()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="losses.bin: has 88 bytes instead of 92: truncated or replaced"):
        ReferenceLosses(finished)


def test_a_finished_reference_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(ValueError, match="ref: holds a finished reference; choose another teacher.reference_path"):
        ReferenceWriter(finished, scoring=SCORING)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ref").touch()
    with pytest.raises(ValueError, match="ref: is a file"):
        ReferenceWriter(tmp_path / "ref", scoring=SCORING)


def test_making_a_writer_writes_nothing(tmp_path: Path) -> None:
    ReferenceWriter(tmp_path / "ref", scoring=SCORING)
    assert not (tmp_path / "ref").exists()


def test_resume_writes_only_what_is_missing(tmp_path: Path) -> None:
    parts = interrupt(tmp_path, num_parts=3)
    before = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.bin")}
    assert len(before) == 3
    (parts / "part-00001.bin").unlink()
    (parts / "part-00002.bin").write_bytes(b"cut")
    (parts / "part-00004.bin.tmp").write_bytes(b"of a killed writer")
    with ReferenceWriter(tmp_path, scoring=SCORING, part_size=5) as writer:
        assert writer.missing() == [1, 2, 3, 4]
        write_parts(writer)
        first = parts / "part-00000.bin"
        assert first.stat().st_mtime_ns == before[first]
        writer.finish()
    assert torch.equal(ReferenceLosses(tmp_path).read(0, 23), LOSSES)


@pytest.mark.parametrize(
    "change",
    [
        *({"data_fingerprint": "cafe"}, {"seq_len": 8}, {"num_examples": 24}, {"model": "llama3_attent 8B"}),
        *({"precision": "bfloat16"}, {"checkpoint_sha256": "dead"}, {"part_size": 6}),
    ],
)
def test_a_resume_with_anything_different_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    parts = interrupt(tmp_path)
    before = {path: path.read_bytes() for path in parts.iterdir()}
    ((name, value),) = change.items()
    part_size = int(change.pop("part_size", 5))  # type: ignore[call-overload]
    with pytest.raises(ValueError) as error:
        ReferenceWriter(tmp_path, scoring=replace(SCORING, **change), part_size=part_size)
    stored = 5 if name == "part_size" else getattr(SCORING, name)
    assert f"something else: {name} was {stored!r} and is {value!r}. Use the same" in str(error.value)
    assert f"delete {parts} to start anew" in str(error.value)
    assert {path: path.read_bytes() for path in parts.iterdir()} == before


def test_a_moved_checkpoint_is_the_same(tmp_path: Path) -> None:
    interrupt(tmp_path)
    write(tmp_path, scoring=replace(SCORING, checkpoint="/elsewhere/step-3"))
    assert ReferenceLosses(tmp_path).scoring.checkpoint == "/elsewhere/step-3"


def test_a_mistake_that_scored_nothing_is_forgotten(tmp_path: Path) -> None:
    interrupt(tmp_path, num_parts=0, scoring=replace(SCORING, seq_len=8))
    write(tmp_path)
    assert ReferenceLosses(tmp_path).scoring == SCORING


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_parts_of_unknown_origin(tmp_path: Path, content: str | None) -> None:
    progress = interrupt(tmp_path) / "progress.json"
    progress.unlink()
    if content is not None:
        progress.write_text(content)
    with pytest.raises(ValueError, match="progress.json: .*delete .*parts to start anew"):
        ReferenceWriter(tmp_path, scoring=SCORING, part_size=5)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    one, two = (ReferenceWriter(tmp_path, scoring=SCORING) for _ in range(2))
    with one, pytest.raises(ValueError, match="another scoring is at work there; wait for it"):
        two.__enter__()
    with two:
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    losses = LOSSES.clone()
    losses[[1, 4, 7, 11, 12, 13, 22]] = bad
    with pytest.raises(ValueError) as error:
        write(tmp_path, losses)
    assert "7 of 23 losses are not finite, the first of examples 1, 4, 7, 11, 12: the weights in" in str(error.value)
    assert "/run/checkpoint/step-3" in str(error.value) and f"Delete {tmp_path / 'parts'}" in str(error.value)
    with pytest.raises(ValueError, match="its scoring was interrupted"):
        ReferenceLosses(tmp_path)
    shutil.rmtree(tmp_path / "parts")
    write(tmp_path)


@pytest.mark.parametrize("crash_at", range(14))
def test_a_crash_at_any_write_leaves_no_half_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Die at the n-th durable step: what is there is whole, or is not taken for a reference; the rest resumes."""
    calls = 0

    def dying(do):  # noqa: ANN001, ANN202
        def step(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            return do(*args, **kwargs)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(reference_writer, "write_atomically", dying(reference_writer.write_atomically))
        patched.setattr(reference_writer.os, "fsync", dying(reference_writer.os.fsync))
        patched.setattr(reference_writer.shutil, "rmtree", dying(reference_writer.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, part_size=12)
    if (tmp_path / "reference.json").exists():
        ReferenceLosses(tmp_path).verify_checksum()
    else:
        with pytest.raises(ValueError, match="interrupted|no reference.json"):
            ReferenceLosses(tmp_path)
        write(tmp_path, part_size=12)
    assert torch.equal(ReferenceLosses(tmp_path).read(0, 23), LOSSES)
