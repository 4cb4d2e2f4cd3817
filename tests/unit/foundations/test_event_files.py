"""Event files read in bulk, against a plain loop over their records with TensorBoard's own checksum."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from titan_attent.foundations import event_files
from titan_attent.foundations.event_files import events, masked_crcs


def written(path: Path, num: int = 120) -> bytes:
    """Records of two common lengths, some rare ones, and one that is larger than a small block."""
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for i in range(num):
            event = Event(wall_time=float(i), step=1 + i % 100)
            tag = "t" * (3 if i % 3 else 9) + "x" * 3000 * (i == 50) + "y" * (i % 40 == 7)
            event.summary.value.add(tag=tag, simple_value=i / 7)
            writer.write(event.SerializeToString())
    return path.read_bytes()


def plainly(content: bytes) -> tuple[list[Event], int | None]:
    """The events before the first damaged one, and the byte at which that begins; None if none is damaged."""
    found, at = list[Event](), 0
    while at + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if masked_crc32c(content[at : at + 8]) != struct.unpack_from("<I", content, at + 8)[0]:
            return found, at
        if at + 16 + length > len(content):
            break
        data = content[at + 12 : at + 12 + length]
        if masked_crc32c(data) != struct.unpack_from("<I", content, at + 12 + length)[0]:
            return found, at
        found.append(Event.FromString(data))
        at += 16 + length
    return found, None


@pytest.mark.parametrize("length", [0, 1, 8, 47])
@pytest.mark.parametrize("num", [1, event_files.FEW, 300])
def test_checksums_are_tensorboards(length: int, num: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, 500, dtype=np.uint8)
    starts = np.arange(num) + 3
    expected = [masked_crc32c(data[start : start + length].tobytes()) for start in starts]
    assert masked_crcs(data, starts, length).tolist() == expected


@pytest.mark.parametrize("block", [64, 1000, 2**22])
def test_any_flipped_byte_and_any_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(event_files, "BLOCK", block)
    path, generator = tmp_path / "events", np.random.default_rng(block)
    whole = written(path)
    contents = [whole, b"", whole + b"\0" * 40]
    contents += [whole[:stop] for stop in generator.integers(1, len(whole), 40).tolist()]
    for at in generator.integers(0, len(whole), 120).tolist():
        contents.append(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
    for content in contents:
        path.write_bytes(content)
        expected, damage = plainly(content)
        notes: list[str] = []
        assert list(events(path, notes)) == expected
        said = f"{path} is damaged at byte {damage or 0:,} of {len(content):,}: the rest of the file is left out"
        assert notes == ([] if damage is None else [said])
