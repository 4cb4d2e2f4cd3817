"""Tokens in segments of foreign files, against slices of the file's bytes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from titan_attent.data.io.files import OpenFiles
from titan_attent.data.text.file_view import FileView
from titan_attent.data.text.format import ShardEntry
from titan_attent.data.text.segments import MAX_BUFFERS, MAX_GAP, SegmentReader

LENGTHS = (5, 1, 300, 7, 40, 2)
GAPS = (3, 0, MAX_GAP, MAX_GAP + 1, 11, 1)
"""Bytes before each segment; tokens begin at odd bytes, too."""


def make(folder: Path, *, dtype: str, backwards: bool = False, tiny: int = 0) -> tuple[SegmentReader, np.ndarray]:
    """A reader of one shard, and its tokens; ``tiny``: as many segments of one token behind the others."""
    lengths, gaps = LENGTHS + (1,) * tiny, GAPS + (2,) * tiny
    generator, size = np.random.default_rng(0), np.dtype(dtype).itemsize
    tokens = generator.integers(0, 2**16, sum(lengths)).astype(dtype)
    content, offsets, at = bytearray(), list[int](), 0
    pieces = list(zip(lengths, gaps, strict=True))
    order = reversed(range(len(pieces))) if backwards else range(len(pieces))
    firsts = np.cumsum([0, *lengths[:-1]])
    places = dict[int, int]()
    for number in order:
        length, gap = pieces[number]
        content += generator.bytes(gap)
        places[number] = len(content)
        content += tokens[firsts[number] : firsts[number] + length].tobytes()
    offsets, at = [places[number] for number in range(len(pieces))], len(content)
    (folder / "foreign").write_bytes(content)
    np.stack([firsts, offsets], axis=1).astype("<u8").tofile(folder / "adopted-00000.segments")
    view = FileView("foreign", 0, at, 0, at, 0, num_segments=len(lengths), segments_sha256="0")
    entry = ShardEntry(file="adopted-00000.bin", num_tokens=len(tokens), sha256="", source="all", view=view)
    return SegmentReader(OpenFiles(folder), OpenFiles(folder), [entry], itemsize=size), tokens


def read(reader: SegmentReader, spans: list[tuple[int, int]], dtype: str) -> tuple[np.ndarray, list[int]]:
    """The spans (start, length), one behind the other, and their last tokens."""
    slots = np.cumsum([0, *(length for _, length in spans)])
    flat = np.zeros(slots[-1], dtype=dtype)
    whole = [(0, start, length, int(slot)) for (start, length), slot in zip(spans, slots[:-1], strict=True)]
    return flat, reader.read(flat, whole)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(("backwards", "tiny"), [(False, 0), (True, 0), (False, 2 * MAX_BUFFERS)])
def test_every_span_is_that_of_the_file(tmp_path: Path, dtype: str, backwards: bool, tiny: int) -> None:
    reader, tokens = make(tmp_path, dtype=dtype, backwards=backwards, tiny=tiny)
    generator = np.random.default_rng(1)
    starts = generator.integers(0, len(tokens), 60)
    spans = [(int(start), int(generator.integers(1, len(tokens) - start + 1))) for start in starts]
    spans += [(0, len(tokens)), (0, 1), (len(tokens) - 1, 1), (5, 1), (4, 2)]
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        flat, last = read(one, spans, dtype)
        assert np.array_equal(flat, np.concatenate([tokens[start : start + length] for start, length in spans]))
        assert last == [tokens[start + length - 1] for start, length in spans]


def test_near_segments_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, tokens = make(tmp_path, dtype="<u2")
    reads = list[int]()
    whole = OpenFiles.read_scattered

    def counted(self: OpenFiles, *args: object) -> None:
        reads.append(1)
        whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenFiles, "read_scattered", counted)
    read(reader, [(0, len(tokens))], "<u2")
    assert len(reads) == 2, "only the gap of more than MAX_GAP bytes parts the read"


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    reader, tokens = make(tmp_path, dtype="<u2")
    content = (tmp_path / "foreign").read_bytes()
    (tmp_path / "foreign").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"foreign: ends at byte"):
        read(reader, [(0, len(tokens))], "<u2")


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    reader, _ = make(tmp_path, dtype="<u2")
    table = np.fromfile(tmp_path / "adopted-00000.segments", dtype="<u8").reshape(-1, 2)
    table[2, 1] = 10**9
    table.tofile(tmp_path / "adopted-00000.segments")
    with pytest.raises(ValueError, match=r"adopted-00000\.segments: its segments do not lie in foreign"):
        read(reader, [(0, 1)], "<u2")
