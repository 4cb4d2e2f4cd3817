"""Memory that the tensors of an edit use one after the other.

A freed tensor of 8 MB goes back to the system, and the next one gets pages that the system first has to find and clear,
which takes far longer than the sum that fills it. So blocks are kept, and lent again once no tensor refers to
them.

Cost: at most :data:`MAX_BLOCKS` blocks, of which those pages take memory that were ever used.
"""

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_attent.edit.boxes import ELEMENTS

BLOCK_BYTES = ELEMENTS * torch.float64.itemsize
"""Room for the widest box."""
MAX_BLOCKS = 32


def _references(blocks: Sequence[mmap.mmap]) -> list[int]:
    return [sys.getrefcount(one) for one in blocks]


_blocks: list[mmap.mmap] = []
_lock = threading.Lock()
_UNUSED = _references([mmap.mmap(-1, 1)])[0]
"""References to a block that only the list has: versions of Python count those of the call differently."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of any content, as ``torch.empty`` makes one."""
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = _block(count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))  # refers to the memory


def _block(num_bytes: int) -> mmap.mmap:
    """Memory of at least ``num_bytes`` that nothing refers to."""
    if num_bytes > BLOCK_BYTES:
        return _map(num_bytes)
    with _lock:
        for index, references in enumerate(_references(_blocks)):
            if references == _UNUSED:
                return _blocks[index]
        new = _map(BLOCK_BYTES)
        if len(_blocks) < MAX_BLOCKS:
            _blocks.append(new)
        return new


def _map(num_bytes: int) -> mmap.mmap:
    """New memory that a forked process gets a copy of: mmap's default is to share it."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
