"""What an edit does to a task vector, the difference of two checkpoints, before it is added: prune it, or cut its rank.

    pruned        the entries of a tensor with the largest magnitudes stay, the others become 0
    low rank      every matrix is replaced by its best approximation of low rank, by its truncated SVD
    random        a random tensor of equal norm: the control of a search

All of them read a tensor in boxes, several times if needed, and hold no tensor whole. A result depends on the values
alone: not on how a checkpoint was sharded, and not on the number of processes.

Cost per tensor of n elements: pruning reads it three times and keeps 2^16 counts. Low rank takes a Gram matrix in fp64,
of the smaller side s of the matrix, and its eigenvectors: 2 n s + O(s^3) FLOPs, 24 s^2 bytes; the right factor of a
wide matrix has k n / s elements. A matrix is read twice; one of b boxes that is wider than high about b / 2 + 2 times.

Source: task vectors, Ilharco et al., ICLR 2023; low rank and pruning keep their guarantees, Li et al., ICLR 2025
(https://arxiv.org/abs/2504.10957), corollaries 1 and 2; pruning by magnitude as in TIES, Yadav et al., NeurIPS 2023.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_attent.edit.boxes import ELEMENTS, Box, boxes, offsets, sizes

Read = Callable[[Box], Tensor]
"""A box -> the difference there, fp32 (fp64 if the checkpoint is)."""


class Transform(Protocol):
    """A change of a task vector. Picklable; one process calls it for the boxes of one tensor after the other."""

    def __call__(self, name: str, shape: Sequence[int], box: Box, read: Read) -> Tensor:
        """The changed difference in ``box`` of the tensor ``name`` of ``shape``: a new tensor, fp32 or fp64."""


@dataclass
class Pruned:
    """Keeps, of every tensor, the share ``keep`` of its entries with the largest magnitudes; ties at the cut stay."""

    keep: float
    _threshold: tuple[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __call__(self, name: str, shape: Sequence[int], box: Box, read: Read) -> Tensor:
        if 0 in shape:
            return read(box)
        if self._threshold is None or self._threshold[0] != name:
            self._threshold = name, _kth_magnitude(shape, max(round(self.keep * math.prod(shape)), 1), read)
        block = read(box)
        return block.mul_(block.float().abs() >= self._threshold[1])


def _kth_magnitude(shape: Sequence[int], k: int, read: Read) -> Tensor:
    """The k-th largest magnitude of a tensor as fp32, exact: a radix search over the bits, 16 at a time.

    The bits of non-negative floats, as integers, are in the order of the floats.
    """
    prefix, remaining = 0, k
    for shift in (16, 0):
        counts = torch.zeros(2**16, dtype=torch.int64)
        for box in boxes(shape):
            bits = read(box).float().abs().flatten().view(torch.int32)
            if shift == 0:
                bits = bits[bits >> 16 == prefix]
            counts += torch.bincount(bits >> shift & 0xFFFF, minlength=2**16)
        above = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
        digit = int((above >= remaining).sum()) - 1
        remaining -= int(above[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32)


@dataclass
class LowRank:
    """Replaces every matrix by its truncated SVD. Tensors of one dimension, such as norms, stay as they are.

    The last two dimensions are the matrix: of experts [E, m, n], every expert's.

    Args:
        rank: singular values that are kept; 0 for as many as ``energy`` needs.
        energy: the smallest rank is taken whose squared singular values have at least this share of their sum.
    """

    rank: int = 0
    energy: float = 0.0
    _factors: tuple[Any, Tensor, Tensor | None] | None = field(default=None, repr=False, compare=False)

    def __call__(self, name: str, shape: Sequence[int], box: Box, read: Read) -> Tensor:
        if len(shape) < 2 or 0 in shape:
            return read(box)
        parts = []
        for matrix in _matrices(box):
            if self._factors is None or self._factors[0] != (name, matrix):
                self._factors = (name, matrix), *self._decompose(matrix, shape, read)
            _, basis, right = self._factors
            rows, columns = box[-2:]
            if right is not None:
                part = basis[slice(*rows)] @ right
            else:
                part = read((*matrix, rows, (0, shape[-1]))).double().flatten(0, -2) @ basis @ basis.T
            parts.append(part[:, slice(*columns)])
        return torch.cat(parts).view(sizes(box))

    def _decompose(self, matrix: Box, shape: Sequence[int], read: Read) -> tuple[Tensor, Tensor | None]:
        """The singular vectors of the smaller side, fp64 [s, k], and of a wide matrix the other factor [k, n]."""
        height, width = shape[-2:]
        parts = [(*matrix, *rest) for rest in boxes((height, width), max(ELEMENTS, width))]  # of whole rows

        def block(part: Box) -> Tensor:
            return read(part).double().flatten(0, -2)

        gram = torch.zeros(min(height, width), min(height, width), dtype=torch.float64)
        if height >= width:
            for part in parts:
                rows = block(part)
                gram += rows.T @ rows
            return self._leading(gram), None
        for i, part in enumerate(parts):
            rows, columns = block(part), slice(*part[-2])
            for other in parts[i:]:
                product = rows @ (rows if other is part else block(other)).T
                gram[columns, slice(*other[-2])] += product
        gram = gram.triu() + gram.triu(1).T
        basis = self._leading(gram)
        right = torch.zeros(basis.shape[1], width, dtype=torch.float64)
        for part in parts:
            right += basis[slice(*part[-2])].T @ block(part)
        return basis, right

    def _leading(self, gram: Tensor) -> Tensor:
        """The eigenvectors of the kept, largest eigenvalues: the squared singular values."""
        values, vectors = torch.linalg.eigh(gram)  # ascending
        rank = self.rank
        if not rank:
            shares = values.clamp(min=0).flip(0).cumsum(0)
            rank = int((shares < self.energy * shares[-1]).sum()) + 1
        return vectors[:, -min(rank, len(values)) :]


def _matrices(box: Box) -> list[Box]:
    """The matrices that ``box`` touches, as ranges of the leading dimensions."""
    matrices: list[Box] = [()]
    for start, stop in box[:-2]:
        matrices = [(*outer, (i, i + 1)) for outer in matrices for i in range(start, stop)]
    return matrices


@dataclass
class RandomLike:
    """A random normal tensor with the norm of the vector that ``inner`` leaves, tensor by tensor.

    The numbers of a box depend on the seed, the name and the box alone.
    """

    inner: Transform
    seed: int = 0
    _scale: tuple[str, float] | None = field(default=None, repr=False, compare=False)

    def __call__(self, name: str, shape: Sequence[int], box: Box, read: Read) -> Tensor:
        if self._scale is None or self._scale[0] != name:
            norm = _norm(self.inner(name, shape, one, read) for one in boxes(shape))
            random = _norm(self._draw(name, one) for one in boxes(shape))
            self._scale = name, norm / random if random else 0.0
        return self._draw(name, box) * self._scale[1]

    def _draw(self, name: str, box: Box) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name} {offsets(box)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(sizes(box), generator=generator)


@dataclass
class Unchanged:
    """The vector itself."""

    def __call__(self, name: str, shape: Sequence[int], box: Box, read: Read) -> Tensor:
        return read(box)


def _norm(blocks: Iterator[Tensor]) -> float:
    return math.sqrt(math.fsum(float(block.double().square().sum()) for block in blocks))
