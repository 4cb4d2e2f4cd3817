"""Real NumPy files, magic ``\\x93NUMPY``: one array of whole numbers, of one dimension. Documents end with the eos.

The header is parsed by numpy, which evaluates it as a literal, not as code, and refuses pickled arrays.
Source: numpy.lib.format.
"""

import io
from pathlib import Path

import numpy as np

from titan_attent.data.formats.token_file import EOS, Hints, TokenFile, bad, file_size, read_head, whole_tokens

NAME, TITLE = "numpy", "NumPy .npy"
COMPANIONS = ()
MAGIC = b"\x93NUMPY"
MAX_HEADER = 2**16
"""Bytes of a header; that of a plain array has 128."""


def is_entry(path: Path) -> bool:
    """Whether ``path`` begins with numpy's magic."""
    return path.suffix == ".npy" and read_head(path, len(MAGIC)) == MAGIC


def open_files(path: Path, hints: Hints) -> list[TokenFile]:
    """The tokens of ``path``."""
    stream = io.BytesIO(read_head(path, MAX_HEADER))
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version}")
        # Version 3 differs in the encoding of field names, which an array of numbers does not have.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=MAX_HEADER)
    except Exception as error:  # numpy raises what its parsers raise: ValueError, SyntaxError, TokenError, ...
        raise bad(path, f"its NumPy header cannot be read ({str(error)[:100]}): damaged") from None
    if dtype.hasobject:
        raise bad(path, "holds pickled objects, whose reading runs code", "save it as an array of whole numbers")
    if dtype.kind not in "iu" or dtype.itemsize > 8:
        raise bad(path, f"has the dtype {dtype}, which token ids do not have", "save it as an array of whole numbers")
    if len(shape) != 1:
        raise bad(path, f"has the shape {shape}; tokens have one dimension", "save array.reshape(-1)")
    expected = stream.tell() + shape[0] * dtype.itemsize
    if (actual := file_size(path)) != expected:
        raise bad(path, f"has {actual} bytes, but its header of {shape[0]} tokens says {expected}: truncated")
    num_tokens = whole_tokens(path, actual - stream.tell(), dtype)
    return [TokenFile(path=path, dtype=dtype, num_tokens=num_tokens, offset=stream.tell(), boundaries=EOS)]
