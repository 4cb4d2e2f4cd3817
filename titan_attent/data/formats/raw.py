"""Bare tokens without a header: nanoGPT's train.bin, and the .npy of OLMo and Dolma, which have no NumPy header.

The file does not say its dtype, so the user does; nanoGPT's is uint16. Each document ends with the eos. Beside NAME.npy
Dolma writes NAME.csv.gz, one line per document: its start and end in tokens, exclusive, and perhaps more fields.
Source: karpathy/nanoGPT, data/openwebtext/prepare.py; allenai/OLMo-core, src/olmo_core/data/utils.py.

Cost: with a .csv.gz one pass over its lines, a line at a time.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.formats.token_file import (
    EOS,
    INDEX,
    TOKEN_DTYPES,
    Hints,
    TokenFile,
    bad,
    file_size,
    read_head,
    whole_tokens,
)

NAME, TITLE = "raw", "bare tokens: nanoGPT .bin, OLMo and Dolma .npy"
COMPANIONS = (".csv.gz",)
SUFFIXES = (".bin", ".npy", ".u16", ".u32", ".raw", ".tokens")
MAX_LINE = 2**16
"""Bytes of a line of a .csv.gz."""
LINES = 2**16
"""Documents per block."""
_CHECKED_TOKENS = 2**16


def is_entry(path: Path) -> bool:
    """Whether ``path`` has the extension of a file of tokens; asked last, as any bytes are tokens."""
    return path.suffix in SUFFIXES


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of ``path``."""
    if hints.dtype is None:
        raise bad(
            path,
            "has no header that says the dtype of its tokens",
            f"give --dtype {', '.join(TOKEN_DTYPES)}: uint16 for nanoGPT, for OLMo and Dolma that of their config",
        )
    num_tokens = whole_tokens(path, file_size(path), hints.dtype)
    _check_width(path, hints.dtype)
    documents = path.with_name(path.name.removesuffix(path.suffix) + ".csv.gz")
    if not documents.is_file():
        return [TokenFile(path=path, dtype=hints.dtype, num_tokens=num_tokens, boundaries=EOS)]
    ends = _Lines(documents, path, num_tokens)
    return [TokenFile(path=path, dtype=hints.dtype, num_tokens=num_tokens, boundaries=INDEX, ends=ends)]


def _check_width(path: Path, dtype: np.dtype) -> None:
    """ValueError if the tokens of ``dtype`` are halves of wider ones: every second is 0."""
    head = read_head(path, _CHECKED_TOKENS * dtype.itemsize)
    tokens = np.frombuffer(head[: len(head) // (2 * dtype.itemsize) * 2 * dtype.itemsize], dtype=dtype)
    if len(tokens) >= 64 and not tokens[1::2].any() and tokens[::2].any():
        wider = dtype.name.rstrip("0123456789") + str(16 * dtype.itemsize)
        raise bad(path, f"every second token is 0: its tokens are wider than {dtype.name}", f"try --dtype {wider}")


class _Lines:
    """The ends of the documents of a .csv.gz; called for each pass."""

    def __init__(self, path: Path, tokens: Path, num_tokens: int):
        self.path, self.tokens, self.num_tokens = path, tokens, num_tokens

    def __call__(self) -> Iterator[np.ndarray]:
        previous, block = 0, list[int]()
        try:
            with gzip.open(self.path, "rb") as lines:
                number = 0
                while line := lines.readline(MAX_LINE):
                    number += 1
                    start, end = self._parse(line, number)
                    if start != previous or end < start or end > self.num_tokens:
                        raise self._bad(
                            f"line {number} is a document of tokens {start} to {end}, after one to {previous}"
                        )
                    previous = end
                    block.append(end)
                    if len(block) == LINES:
                        yield np.array(block, dtype=np.int64)
                        block = []
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._bad(f"is no whole gzip file ({error})") from None
        if previous != self.num_tokens:
            raise self._bad(f"its documents end at token {previous} of {self.num_tokens}")
        if block:
            yield np.array(block, dtype=np.int64)

    def _parse(self, line: bytes, number: int) -> tuple[int, int]:
        fields = line.split(b",", 2)
        digits = [field.strip() for field in fields[:2]]
        if len(digits) < 2 or any(not field.isdigit() or len(field) > 18 for field in digits):
            raise self._bad(f"line {number} does not begin with start,end: {line[:60]!r}")
        return int(digits[0]), int(digits[1])

    def _bad(self, problem: str) -> ValueError:
        return bad(
            self.path,
            f"{problem}; {self.tokens.name} has {self.num_tokens} tokens",
            "copy both files again, or find the documents by --boundaries eos; or --dtype is not that of the tokens",
        )
