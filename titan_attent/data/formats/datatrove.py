"""datatrove: bare tokens in NAME.ds, the ends of the documents in NAME.ds.index, masks in NAME.ds.loss.

    NAME.ds           uint16 or uint32; the file does not say which
    NAME.ds.index     uint64 [documents], ends in tokens, exclusive
    NAME.ds.loss      one byte per token, 0 or 1: whether its loss counts
    NAME.ds.metadata  text: "tokenizer|bytes per token", number of tokens, the same for people

The last end is the number of tokens, so the size of the .ds gives the dtype.
Source: huggingface/datatrove, src/datatrove/pipeline/tokens/tokenizer.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_attent.data.formats.token_file import INDEX, TOKEN_DTYPES, Hints, TokenFile, bad, file_size, read_numbers

NAME, TITLE = "datatrove", "datatrove .ds with .ds.index"
COMPANIONS = (".ds.index", ".ds.loss", ".ds.metadata")
END = np.dtype("<u8")


def is_entry(path: Path) -> bool:
    """Whether ``path`` is a .ds with its index."""
    return path.suffix == ".ds" and _beside(path, ".index").is_file()


def _beside(path: Path, extension: str) -> Path:
    return path.with_name(path.name + extension)


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of ``path``."""
    index = _beside(path, ".index")
    num_documents, rest = divmod(file_size(index), END.itemsize)
    if rest or not num_documents:
        raise bad(index, f"has {file_size(index)} bytes, not 8 per document: truncated")
    last = END.itemsize * (num_documents - 1)
    num_tokens = int(next(read_numbers(index, END, offset=last, count=1))[0])
    num_bytes = file_size(path)
    sizes = {num_tokens * dtype.itemsize: dtype for dtype in (TOKEN_DTYPES["uint16"], TOKEN_DTYPES["uint32"])}
    if not num_tokens or num_bytes not in sizes:
        raise bad(path, f"has {num_bytes} bytes, but {index.name} ends at token {num_tokens}: truncated or damaged")
    mask: Path | None = _beside(path, ".loss")
    assert mask is not None
    if not mask.is_file():
        mask = None
    elif file_size(mask) != num_tokens:
        raise bad(mask, f"has {file_size(mask)} bytes, not one per token of {num_tokens}: truncated or damaged")
    ends = _Ends(index, num_documents, num_tokens)
    dtype = sizes[num_bytes]
    return [TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, boundaries=INDEX, ends=ends, mask=mask)]


class _Ends:
    """The ends of the documents; called for each pass."""

    def __init__(self, path: Path, num_documents: int, num_tokens: int):
        self.path, self.num_documents, self.num_tokens = path, num_documents, num_tokens

    def __call__(self) -> Iterator[np.ndarray]:
        previous = 0
        for block in read_numbers(self.path, END, offset=0, count=self.num_documents):
            # Compared before the conversion: no end becomes negative.
            if block.max() > self.num_tokens or block[0] < previous or np.any(block[1:] < block[:-1]):
                raise bad(self.path, f"its ends do not rise to {self.num_tokens}, the number of tokens: damaged")
            previous = int(block[-1])
            yield block.astype(np.int64)
