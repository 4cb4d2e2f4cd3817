"""llm.c and modded-nanogpt: a header of int32 [256], then tokens; the document begins with its end-of-text id.

    [0] magic, [1] version, [2] number of tokens, the rest 0
    gpt-2    20240520, 1, uint16    50256 begins each document; also modded-nanogpt
    llama-3  20240801, 7, uint32    128000 begins each document

A document that does not fit a file goes on in the next one: here these are two documents, one per file.
Source: karpathy/llm.c, dev/data/data_common.py; KellerJordan/modded-nanogpt, data/fineweb.py.
"""

import struct
from pathlib import Path

import numpy as np

from titan_attent.data.formats.token_file import BOS, TOKEN_DTYPES, Hints, TokenFile, bad, file_size, read_head

NAME, TITLE = "llm.c", "llm.c and modded-nanogpt .bin"
COMPANIONS = ()
HEADER_BYTES = 1024
EVALUATION = 20240522
VARIANTS = {20240520: (1, "uint16", 50256), 20240801: (7, "uint32", 128000)}
"""Magic -> (version, dtype, id that begins a document)."""


def is_entry(path: Path) -> bool:
    """Whether ``path`` is a .bin with one of the magics, also that of evaluation files, which are refused."""
    if path.suffix != ".bin":
        return False
    head = read_head(path, 4)
    return len(head) == 4 and struct.unpack("<i", head)[0] in (*VARIANTS, EVALUATION)


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of ``path``."""
    head = read_head(path, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise bad(path, f"has {len(head)} bytes, fewer than the header of {HEADER_BYTES}: truncated")
    magic, version, num_tokens = struct.unpack_from("<3i", head)
    if magic == EVALUATION:
        raise bad(path, "is a file of evaluation examples, not of training tokens", "leave it out with --include")
    if magic not in VARIANTS or VARIANTS[magic][0] != version:
        expected = VARIANTS[magic][0] if magic in VARIANTS else "1 or 7"
        raise bad(path, f"has magic {magic} and version {version}; expected version {expected}")
    _, name, bos_id = VARIANTS[magic]
    dtype: np.dtype = TOKEN_DTYPES[name]
    actual, expected_bytes = file_size(path), HEADER_BYTES + num_tokens * dtype.itemsize
    if num_tokens < 1 or actual != expected_bytes:
        raise bad(path, f"has {actual} bytes, but its header of {num_tokens} tokens says {expected_bytes}: truncated")
    return [
        TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, offset=HEADER_BYTES, boundaries=BOS, bos_id=bos_id)
    ]
