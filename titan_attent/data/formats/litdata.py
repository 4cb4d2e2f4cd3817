"""litdata: chunks of tokens, written with TokensLoader. Items are documents, which litdata's own reader forgets.

    index.json       {"chunks": [{filename, chunk_size (items), chunk_bytes, dim (tokens)}], "config": {...}}
    chunk-R-N.bin    uint32 n; uint32 [n+1] byte offsets of the items and of the end; the items' tokens

The tokens of a chunk are contiguous. The dtype is a code in data_format: no_header_tensor:16, no_header_numpy:5.
Source: Lightning-AI/litData, src/litdata/streaming/{writer,item_loader,serializers}.py, constants.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.formats import json_index
from titan_attent.data.formats.token_file import (
    INDEX,
    TOKEN_DTYPES,
    Hints,
    TokenFile,
    bad,
    file_size,
    read_numbers,
    whole_tokens,
)

NAME, TITLE = "litdata", "litdata chunks of tokens"
COMPANIONS = ()
NUMBER = np.dtype("<u4")
TENSOR_DTYPES = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64"}
DTYPES = {
    "no_header_tensor": TENSOR_DTYPES | {20: "uint16"},
    "no_header_numpy": dict(enumerate(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))),
}


def is_entry(path: Path) -> bool:
    """Whether ``path`` is an index.json of litdata."""
    return json_index.has_key(path, "chunks")


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of the chunks, in the order of the index."""
    index = json_index.Fields(path, json_index.read(path), where="the index")
    dtype = _dtype(index.object("config"))
    return [
        _open_chunk(json_index.Fields(path, chunk, where=f"chunk {number}"), dtype)
        for number, chunk in enumerate(index.list("chunks"))
    ]


def _dtype(config: json_index.Fields) -> np.dtype:
    path, formats = config.path, config.get("data_format")
    if config.get("encryption"):
        raise bad(path, "its chunks are encrypted", "decrypt them with litdata")
    if config.get("compression"):
        raise bad(
            path, f"its chunks are compressed ({config.get('compression')})", "run optimize() without compression"
        )
    if isinstance(formats, list) and any(str(one).startswith("pickle") for one in formats):
        raise bad(path, "has pickled items, whose reading runs code", "yield a tensor of token ids from optimize()")
    loader = config.get("item_loader")
    kind, _, code = str(formats[0]).partition(":") if isinstance(formats, list) and len(formats) == 1 else ("", "", "")
    name = DTYPES.get(kind, {}).get(int(code) if code.isdigit() and len(code) < 4 else -1)
    if name is None or loader not in ("TokensLoader", None):
        raise bad(
            path,
            f"has items {str(formats)[:80]} of {str(loader)[:40]}, not token ids of TokensLoader",
            "run optimize() with item_loader=TokensLoader() on tensors of token ids",
        )
    return TOKEN_DTYPES[name]


def _open_chunk(chunk: json_index.Fields, dtype: np.dtype) -> TokenFile:
    path, num_items, num_bytes = chunk.file("filename"), chunk.count("chunk_size"), chunk.count("chunk_bytes")
    if (actual := file_size(path)) != num_bytes:
        raise bad(path, f"has {actual} bytes, but {chunk.path.name} says {num_bytes}: truncated or replaced")
    start = 4 * (num_items + 2)
    if num_items < 1 or start >= num_bytes:
        raise bad(path, f"has {num_bytes} bytes, too few for {num_items} items: damaged")
    (stored,) = next(read_numbers(path, NUMBER, offset=0, count=1))
    if stored != num_items:
        raise bad(path, f"has {stored} items, but {chunk.path.name} says {num_items}: damaged or replaced")
    ends = _Ends(path, num_items, start, num_bytes, dtype.itemsize)
    num_tokens = whole_tokens(path, num_bytes - start, dtype)
    if chunk.get("dim") not in (None, num_tokens):
        raise bad(path, f"has {num_tokens} tokens, but {chunk.path.name} says {chunk.get('dim')}: damaged or replaced")
    return TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, offset=start, boundaries=INDEX, ends=ends)


class _Ends:
    """The ends of the items in tokens; called for each pass."""

    def __init__(self, path: Path, num_items: int, start: int, num_bytes: int, itemsize: int):
        self.path, self.num_items, self.start, self.num_bytes = path, num_items, start, num_bytes
        self.itemsize = itemsize

    def __call__(self) -> Iterator[np.ndarray]:
        previous = self.start
        (first,) = next(read_numbers(self.path, NUMBER, offset=4, count=1))
        if first != self.start:
            raise bad(self.path, f"its first item begins at byte {first}, not {self.start}: damaged")
        for block in read_numbers(self.path, NUMBER, offset=8, count=self.num_items):
            offsets = block.astype(np.int64)
            if (
                offsets[0] < previous
                or np.any(offsets[1:] < offsets[:-1])
                or np.any((offsets - self.start) % self.itemsize)
            ):
                raise bad(self.path, "its items do not rise by whole tokens: damaged, or larger than 4 GiB")
            previous = int(offsets[-1])
            yield (offsets - self.start) // self.itemsize
        if previous != self.num_bytes:
            raise bad(self.path, f"its items end at byte {previous} of {self.num_bytes}: damaged")
