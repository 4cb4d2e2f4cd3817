"""The records of a TensorBoard event file, with the checksums of many records computed at once.

A record is 8 bytes of length, 4 of checksum, the event, 4 of checksum; integers are little-endian. The checksum is a
masked CRC-32C (TensorFlow's record_writer.cc). TensorBoard computes it byte by byte in Python, which takes most of the
time of its reader. Here numpy computes one byte of every record per step: as many steps as a record has bytes.

Cost: one pass over the file; memory for one block of it, and for a record that is larger.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

BLOCK = 2**22
"""Bytes per read."""
FEW = 24
"""Records of one length below which TensorBoard's function is faster."""
HEADER, FRAME = 12, 16
"""Bytes before an event, and around it."""


def _table() -> np.ndarray:
    """CRC-32C of each byte: the reflected polynomial 0x82F63B78."""
    crcs = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crcs = np.where(crcs & 1, (crcs >> 1) ^ np.uint32(0x82F63B78), crcs >> 1)
    return crcs


_TABLE = _table()


def masked_crcs(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The masked CRC-32C, uint32 [n], of the ``length`` bytes of ``data`` (uint8) at each of ``starts`` (int64 [n])."""
    if len(starts) < FEW:
        content = (data[start : start + length].tobytes() for start in starts.tolist())
        return np.array([masked_crc32c(one) for one in content], dtype=np.uint32)
    crcs = np.full(len(starts), 0xFFFFFFFF, dtype=np.uint32)
    for i in range(length):
        crcs = _TABLE[(crcs & 0xFF) ^ data[starts + i]] ^ (crcs >> np.uint32(8))
    crcs = ~crcs
    return ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)


def begins_session(event: Event) -> bool:
    """Whether a session of a run can begin with ``event``: the first one of a file tells its first step."""
    return bool(event.summary.value) or event.session_log.status == SessionLog.START


def events(path: Path, notes: list[str]) -> Iterator[Event]:
    """The events of a TensorBoard file, up to its end or to the first damaged one, which is noted.

    An event that the file ends within was cut short, and is left out without a note.
    """
    parse = Event.FromString
    try:
        with open(path, "rb") as file:
            size, offset, rest = path.stat().st_size, 0, b""
            while block := file.read(max(BLOCK, min(size, _missing(rest)))):  # a length may be damaged
                content = rest + block
                starts, lengths, end = _sound_records(content)
                try:
                    for start, length in zip(starts, lengths, strict=True):
                        yield parse(content[start : start + length])
                except DecodeError:
                    end = start - HEADER
                rest = content[end:]
                if _is_damaged(rest):
                    notes.append(
                        f"{path} is damaged at byte {offset + end:,} of {size:,}: the rest of the file is left out"
                    )
                    return
                offset += end
    except OSError as error:
        notes.append(f"{path} cannot be read: {error.strerror or error}")


def _missing(rest: bytes) -> int:
    """The bytes that the record at the start of ``rest`` lacks, as far as is known."""
    return FRAME + struct.unpack_from("<Q", rest)[0] - len(rest) if len(rest) >= HEADER else 0


def _is_damaged(rest: bytes) -> bool:
    """Whether the record at the start of ``rest`` is damaged, and not cut short."""
    if len(rest) < FRAME:
        return False
    (length,) = struct.unpack_from("<Q", rest)
    return masked_crc32c(rest[:8]) != struct.unpack_from("<I", rest, 8)[0] or len(rest) >= FRAME + length


def _sound_records(content: bytes) -> tuple[list[int], list[int], int]:
    """The starts and lengths of the events of ``content`` before the first damaged or incomplete one; their end."""
    unpack, size, at = struct.Struct("<Q").unpack_from, len(content), 0
    starts, lengths = list[int](), list[int]()
    while at + FRAME <= size:
        (length,) = unpack(content, at)
        if at + FRAME + length > size:
            break
        starts.append(at + HEADER)
        lengths.append(length)
        at += FRAME + length
    if not starts:
        return starts, lengths, 0
    data, of_start, of_length = np.frombuffer(content, np.uint8), np.array(starts), np.array(lengths)
    sound = masked_crcs(data, of_start - HEADER, 8) == _stored(data, of_start - 4)
    for length in np.unique(of_length).tolist():
        rows = np.flatnonzero(of_length == length)
        sound[rows] &= masked_crcs(data, of_start[rows], length) == _stored(data, of_start[rows] + length)
    if sound.all():
        return starts, lengths, at
    first = int(np.argmin(sound))
    return starts[:first], lengths[:first], starts[first] - HEADER


def _stored(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The uint32 [n] that is stored at each of ``starts``."""
    return np.ascontiguousarray(data[starts[:, None] + np.arange(4)]).view("<u4")[:, 0]
