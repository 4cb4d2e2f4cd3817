"""MosaicML MDS: samples with a column of tokens, in shards of a folder with index.json.

    index.json       {"version": 2, "shards": [{column_names, column_encodings, column_sizes, samples, raw_data, ...}]}
    shard.NNNNN.mds  uint32 n; uint32 [n+1] byte offsets of the samples and of the end; the shard's JSON; the samples
    sample           uint32 sizes of the columns of variable size, in their order; the columns' values
    a column         ndarray:DTYPE[:SHAPE], ndarray (its dtype in the first byte), or bytes (--dtype, int64 by default)

The tokens of a sample are one segment. Samples are documents, or, if all have one length, rows of joined text, whose
documents end with the eos. pkl columns are refused: reading them runs code.
Source: mosaicml/streaming, streaming/base/format/mds/{reader,writer,encodings}.py; mosaicml/llm-foundry,
llmfoundry/data/text_data.py.

Cost: the heads of the samples are read twice; 64 bytes per sample of one shard at that time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.formats import json_index
from titan_attent.data.formats.decompressed import decompress
from titan_attent.data.formats.token_file import (
    EOS,
    INDEX,
    TOKEN_DTYPES,
    Hints,
    TokenFile,
    bad,
    file_size,
    read_numbers,
)

NAME, TITLE = "mds", "MosaicML MDS"
COMPANIONS = (".mds", ".mds.zstd", ".mds.gz", ".mds.br", ".mds.bz2", ".mds.snappy")
NUMBER = np.dtype("<u4")
VALUE_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
SHAPE_DTYPES: tuple[np.dtype, ...] = (np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8"))
MAX_COLUMNS = 256
_READ_BYTES = 2**24


def is_entry(path: Path) -> bool:
    """Whether ``path`` is an index.json of MDS shards."""
    return json_index.has_key(path, "shards")


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of the shards, in the order of the index; compressed shards are decompressed first."""
    index = json_index.Fields(path, json_index.read(path), where="the index")
    shards = [
        _open(json_index.Fields(path, one, where=f"shard {i}"), hints) for i, one in enumerate(index.list("shards"))
    ]
    lengths = {shard.row_tokens for shard in shards}
    is_rows = len(lengths) == 1 and None not in lengths and sum(shard.num_samples for shard in shards) > 1
    note = f"all samples have {lengths.pop()} tokens: rows of joined text" if is_rows else "samples are documents"
    return [
        TokenFile(
            path=shard.path,
            dtype=shard.dtype,
            num_tokens=shard.num_tokens,
            boundaries=EOS if is_rows else INDEX,
            ends=shard.ends,
            segments=shard.segments,
            note=note,
        )
        for shard in shards
    ]


class _Shard:
    """One shard: where the tokens of each of its samples are. The places are read anew when they are needed.

    Attributes:
        num_samples, num_tokens: of the shard.
        row_tokens: the number of tokens of every sample, or None if it varies.
    """

    def __init__(self, path: Path, column: "_Column", *, num_samples: int, num_bytes: int):
        self.path, self.column, self.num_samples, self.num_bytes = path, column, num_samples, num_bytes
        self._places: tuple[np.ndarray, np.ndarray] | None = None
        self.dtype, _, lengths = self._locate()
        self.num_tokens = int(lengths.sum())
        self.row_tokens = int(lengths[0]) if np.all(lengths == lengths[0]) else None

    def _locate(self) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        return self.column.locate(self.path, _sample_offsets(self.path, self.num_samples, self.num_bytes))

    def ends(self) -> Iterator[np.ndarray]:
        self._places = self._locate()[1:]
        yield np.cumsum(self._places[1])

    def segments(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Asked for after the ends, if these are.
        offsets, lengths = self._places or self._locate()[1:]
        self._places = None
        yield offsets[lengths > 0], lengths[lengths > 0]


def _open(shard: json_index.Fields, hints: Hints) -> _Shard:
    if shard.get("format") != "mds" or shard.get("version") != 2:
        form, version = str(shard.get("format"))[:40], str(shard.get("version"))[:40]
        raise bad(shard.path, f"{shard.where} is of format {form}, version {version}", "write it as MDS, version 2")
    column = _Column.of(shard, hints)
    raw = shard.object("raw_data")
    path, num_bytes = raw.file("basename"), raw.count("bytes")
    if not path.is_file() and shard.get("zip_data"):
        packed = shard.object("zip_data")
        compression = str(shard.get("compression")).partition(":")[0]
        path = decompress(packed.file("basename"), path, compression, num_bytes=num_bytes, hints=hints)
    if (actual := file_size(path)) != num_bytes:
        raise bad(path, f"has {actual} bytes, but {shard.path.name} says {num_bytes}: truncated or replaced")
    return _Shard(path, column, num_samples=shard.count("samples"), num_bytes=num_bytes)


def _sample_offsets(path: Path, num_samples: int, num_bytes: int) -> np.ndarray:
    """int64 [num_samples + 1], where the samples begin, and the end."""
    header = 4 * (num_samples + 2)
    if num_samples < 1 or header > num_bytes:
        raise bad(path, f"has {num_bytes} bytes, too few for {num_samples} samples: damaged")
    (stored,) = next(read_numbers(path, NUMBER, offset=0, count=1))
    if stored != num_samples:
        raise bad(path, f"has {stored} samples, but its index says {num_samples}: damaged or replaced")
    blocks = read_numbers(path, NUMBER, offset=4, count=num_samples + 1)
    begins = np.concatenate([block.astype(np.int64) for block in blocks])
    if begins[0] < header or begins[-1] != num_bytes or np.any(begins[1:] < begins[:-1]):
        raise bad(path, f"its samples do not rise to its end, byte {num_bytes}: damaged")
    return begins


@dataclass
class _Column:
    """The column of tokens within a sample.

    Attributes:
        variables: number of columns of variable size, whose sizes begin the sample.
        before: fixed bytes of the columns before it.
        sizes_before: which of the sizes are of columns before it.
        size: the slot of its own size; None if it is fixed, with ``num_bytes``.
        dtype: None if the first byte of the value is its code.
        has_shape: whether the value begins with its shape.
    """

    name: str
    variables: int
    before: int
    sizes_before: list[int]
    size: int | None
    num_bytes: int
    dtype: np.dtype | None
    has_shape: bool

    @classmethod
    def of(cls, shard: json_index.Fields, hints: Hints) -> "_Column":
        names, encodings, sizes = (shard.list(f"column_{key}") for key in ("names", "encodings", "sizes"))
        if not len(names) == len(encodings) == len(sizes) <= MAX_COLUMNS:
            raise shard.bad("has columns without a name, an encoding or a size")
        if any(size is not None and (type(size) is not int or not 0 <= size < 2**32) for size in sizes):
            raise shard.bad("has a column of an impossible size")
        if hints.column not in names:
            others = ", ".join(map(str, names))[:200]
            raise bad(
                shard.path, f"{shard.where} has no column {hints.column!r}, but {others}", "name it with --column"
            )
        place = names.index(hints.column)
        variable = [i for i, size in enumerate(sizes) if not size]
        dtype, has_shape = _decode(shard, hints.column, encodings[place], hints)
        return cls(
            name=hints.column,
            variables=len(variable),
            before=sum(size for size in sizes[:place] if size),
            sizes_before=[slot for slot, i in enumerate(variable) if i < place],
            size=variable.index(place) if place in variable else None,
            num_bytes=sizes[place] or 0,
            dtype=dtype,
            has_shape=has_shape,
        )

    def locate(self, path: Path, begins: np.ndarray) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        """(dtype, byte offset and number of tokens of each sample, int64 [n] each)."""
        offsets, sizes, heads = self._values(path, begins)
        skipped = np.zeros(len(offsets), dtype=np.int64)
        dtype = self.dtype
        if dtype is None:
            codes = np.unique(heads[:, 0])
            if len(codes) != 1 or int(codes[0]) not in VALUE_DTYPES:
                raise bad(
                    path, f"its column {self.name!r} has arrays of the dtype codes {codes[:8]}, not of one integer"
                )
            dtype, skipped = TOKEN_DTYPES[VALUE_DTYPES[int(codes[0])]], skipped + 1
        lengths = None
        if self.has_shape:
            at = skipped[0]
            if np.any(heads[:, at] >> 2 != 1):
                raise bad(path, f"its column {self.name!r} has arrays of more than one dimension; tokens have one")
            lengths = np.zeros(len(offsets), dtype=np.int64)
            for code, shape in enumerate(SHAPE_DTYPES):
                chosen = heads[:, at] & 3 == code
                numbers = (
                    np.ascontiguousarray(heads[chosen, at + 1 : at + 1 + shape.itemsize])
                    .view(shape)[:, 0]
                    .astype(np.uint64)
                )
                lengths[chosen] = np.minimum(numbers, 2**40).astype(np.int64)
                skipped[chosen] += 1 + shape.itemsize
        values = sizes - skipped
        if values.min() < 0 or np.any(values % dtype.itemsize):
            raise bad(
                path, f"its column {self.name!r} is no whole number of {dtype.name}", "name its dtype with --dtype"
            )
        if lengths is not None and np.any(lengths * dtype.itemsize != values):
            raise bad(path, f"its column {self.name!r} has other sizes than its shapes: damaged")
        lengths = values // dtype.itemsize
        if not lengths.sum():
            raise bad(path, "has no tokens", "leave it out of the index")
        return dtype, offsets + skipped, lengths

    def _values(self, path: Path, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(offset, size, first 10 bytes) of each sample's value, int64 [n], int64 [n], uint8 [n, 10]."""
        num_samples, head = len(begins) - 1, 4 * self.variables
        offsets, sizes = np.empty((2, num_samples), dtype=np.int64)
        heads = np.zeros((num_samples, 10), dtype=np.uint8)
        if np.any(np.diff(begins) < head):
            raise bad(path, f"has a sample of fewer than the {head} bytes of its sizes: damaged")
        with open(path, "rb", buffering=0) as file:
            first = 0
            while first < num_samples:
                # As many samples as fit; of a larger one alone, its beginning.
                stop = int(np.searchsorted(begins, begins[first] + _READ_BYTES, side="right")) - 1
                stop = max(first + 1, min(stop, num_samples))
                part = slice(first, stop)
                if self.variables or self.dtype is None or self.has_shape:
                    window = _Window(file, int(begins[first]), int(min(begins[stop] - begins[first], _READ_BYTES)))
                    numbers = window.gather(begins[part], head).view(NUMBER).astype(np.int64)
                    at = head + self.before + numbers[:, self.sizes_before].sum(axis=1)
                    offsets[part] = begins[part] + at
                    sizes[part] = numbers[:, self.size] if self.size is not None else self.num_bytes
                    if np.any(offsets[part] + sizes[part] > begins[first + 1 : stop + 1]):
                        raise bad(path, "has a sample that is larger than its place: damaged")
                    heads[part] = window.gather(offsets[part], 10)
                else:
                    offsets[part], sizes[part] = begins[part] + self.before, self.num_bytes
                    if np.any(offsets[part] + sizes[part] > begins[first + 1 : stop + 1]):
                        raise bad(path, "has a sample that is larger than its place: damaged")
                first = stop
        return offsets, sizes, heads


class _Window:
    """Some bytes of a file, and the numbers at given places of it; places outside of it are read one by one."""

    def __init__(self, file: Any, start: int, size: int):
        self.file, self.start = file, start
        file.seek(start)
        self.content = np.frombuffer(file.read(size), dtype=np.uint8)

    def gather(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size], the bytes from each of ``offsets`` on; 0 behind the end of the file."""
        places = offsets - self.start
        found = np.zeros((len(offsets), size), dtype=np.uint8)
        inside = places + size <= len(self.content)
        found[inside] = self.content[places[inside][:, None] + np.arange(size)]
        for slot in np.flatnonzero(~inside).tolist():
            self.file.seek(int(offsets[slot]))
            content = np.frombuffer(self.file.read(size), dtype=np.uint8)
            found[slot, : len(content)] = content
        return found


def _decode(shard: json_index.Fields, name: str, encoding: object, hints: Hints) -> tuple[np.dtype | None, bool]:
    """(dtype of the column or None, whether each value begins with its shape)."""
    kind, _, rest = str(encoding).partition(":")
    if kind == "pkl":
        raise bad(
            shard.path,
            f"its column {name!r} is pickled (pkl), whose reading runs code",
            "write it as ndarray:int32 or bytes with MDSWriter",
        )
    if kind == "bytes":
        return hints.dtype if hints.dtype is not None else TOKEN_DTYPES["int64"], False
    dtype_name, _, shape = rest.partition(":")
    if kind != "ndarray" or (dtype_name and dtype_name not in TOKEN_DTYPES) or "," in shape:
        raise bad(
            shard.path,
            f"its column {name!r} has the encoding {str(encoding)[:60]}, not ndarray of whole numbers or bytes",
            "name another with --column, or write it as ndarray:int32",
        )
    return (TOKEN_DTYPES[dtype_name] if dtype_name else None), not shape
