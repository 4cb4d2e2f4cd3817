"""Finds the bytes of a tensor in what ``torch.save`` wrote, without reading them and without running its code.

A DCP file is a sequence of such archives, one per shard: zip files without compression, with the tensor's shape in
``data.pkl``, a pickle, and its elements in ``data/0``. The pickle is read with the classes that a plain tensor needs,
and no others.

Cost: five small reads per shard.
"""

import io
import pickle
import sys
import zipfile
from typing import Any, NamedTuple, cast

import torch

_HEADER = 30
"""Bytes of a local zip header before the name of its file."""


_DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
    "UntypedStorage": torch.uint8,  # the dtype follows, as an argument of _rebuild_tensor_v3
}


class StoredTensor(NamedTuple):
    """Where an archive has its elements.

    Attributes:
        start: the first element's byte, from the start of the archive.
        strides: in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, int(offset), tuple(shape), tuple(strides))


def _rebuild_of_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: bool, hooks: Any, dtype: torch.dtype, *_: Any
) -> _View:
    return _View(storage._replace(dtype=dtype), int(offset), tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Reads ``data.pkl``: torch's functions are replaced by ones that note their arguments."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_of_dtype
        if (module, name) == ("collections", "OrderedDict"):  # the hooks of a tensor, always empty
            return dict
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise ValueError(f"it contains {module}.{name}, which no tensor needs")

    def persistent_load(self, key: Any) -> _Storage:
        _, kind, name, _, _ = key
        return _Storage(kind, str(name))


def find(archive: io.IOBase) -> StoredTensor:
    """Locate the tensor in ``archive``, a seekable view of one archive.

    Raises:
        ValueError: it is damaged, holds something else than one dense tensor, or has the byte order of another machine.
    """
    try:
        with zipfile.ZipFile(cast(Any, archive)) as members:
            names = {name.partition("/")[2]: name for name in members.namelist()}
            if "byteorder" in names and members.read(names["byteorder"]).decode() != sys.byteorder:
                raise ValueError(f"it was written on a machine that is not {sys.byteorder}-endian")
            view = _Unpickler(io.BytesIO(members.read(names["data.pkl"]))).load()
            if not isinstance(view, _View):
                raise ValueError(f"it holds a {type(view).__name__} where a tensor is expected")
            member = members.getinfo(names[f"data/{view.storage.key}"])
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        archive.seek(member.header_offset)
        header = archive.read(_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    except ValueError:
        raise
    except Exception as error:  # damaged bytes can raise any exception
        raise ValueError(f"{type(error).__name__}: {error}") from None
    dtype = view.storage.dtype
    start = member.header_offset + _HEADER + lengths + view.offset * dtype.itemsize
    return StoredTensor(dtype, view.shape, view.strides, start)
