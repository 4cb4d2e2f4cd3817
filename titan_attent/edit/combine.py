"""The arithmetic: one box of the result from the boxes of all operands, accumulated in fp32 and rounded once.

    result = base + sum of coefficient x factor of the layer x transform(checkpoint - origin)

Weights of fp64 are accumulated in fp64; those that are no floats (counters) are the base's. Where no vector counts, the
base's bits are kept.

Cost: reads of each operand's box; memory of about five boxes in fp32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from titan_attent.edit.boxes import Box, sizes
from titan_attent.edit.checkpoint import Checkpoint, Weight
from titan_attent.edit.layers import LayerFactor, factor_of
from titan_attent.edit.memory import empty
from titan_attent.edit.transforms import Transform, Unchanged


@dataclass
class Term:
    """A vector of the sum: ``coefficient`` times the transformed difference of two operands, given by their paths."""

    coefficient: float
    checkpoint: str
    origin: str
    transform: Transform


@dataclass
class Combination:
    """The weights of the result, computed box by box. Picklable.

    Attributes:
        operands: the checkpoints by path.
        base: the path of the base; empty for none, so that the sum of the vectors alone is the result.
        terms: the vectors, numbered from 1 in ``factors``.
        factors: by layer.
        dtype: of the result's floats; None for the base's.
    """

    operands: Mapping[str, Checkpoint]
    base: str
    terms: Sequence[Term]
    factors: Sequence[LayerFactor] = ()
    dtype: torch.dtype | None = None

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """name -> shape and dtype of the result."""
        source = self.operands[self._source].weights
        return {
            name: Weight(one.shape, self.dtype if self.dtype and one.dtype.is_floating_point else one.dtype)
            for name, one in source.items()
        }

    @property
    def _source(self) -> str:
        """The path of the operand whose dtypes and other weights the result has."""
        return self.base or self.terms[0].origin

    def read(self, name: str, box: Box) -> Tensor:
        """The result in ``box``; ValueError if a number of it is not finite."""
        weight, blocks = self.weights[name], _Blocks(self.operands, name, box)
        if not weight.dtype.is_floating_point:
            stored = blocks.stored(self._source)
            return stored if self.base else torch.zeros_like(stored)
        counted = self._counted(name)
        if not counted and self.base:
            return _rounded(blocks.stored(self.base), weight.dtype, name)
        total = blocks.wide(self.base) if self.base else torch.zeros(sizes(box))
        for number, (term, coefficient) in enumerate(counted):
            difference = term.transform(name, weight.shape, box, partial(blocks.difference, term))
            # The first sum takes the place of its vector: the base's box may be needed for the others.
            room = total if number else difference.to(total.dtype)
            total = torch.add(total, difference, alpha=coefficient, out=room)
            blocks.keep_for([later for later, _ in counted[number + 1 :]])
        return _rounded(total, weight.dtype, name)

    def needed(self, name: str) -> set[str]:
        """The paths of the operands of which :meth:`read` needs the box that it is asked for.

        Transforms that change a vector read the boxes that they need, in an order of their own.
        """
        if not self.weights[name].dtype.is_floating_point:
            return {self._source}
        whole = [term for term, _ in self._counted(name) if isinstance(term.transform, Unchanged)]
        return {self.base, *(path for term in whole for path in (term.checkpoint, term.origin))} - {""}

    def _counted(self, name: str) -> list[tuple[Term, float]]:
        """The terms that count in a weight, with their coefficients there."""
        return [
            (term, coefficient)
            for number, term in enumerate(self.terms, 1)
            if (coefficient := term.coefficient * factor_of(self.factors, number, name))
        ]

    def forget(self) -> None:
        """Drop what was read from the system's cache. For the end of a weight: some transforms read it repeatedly."""
        for operand in self.operands.values():
            operand.forget()


class _Blocks:
    """The operands' boxes of one tensor; those of the box that is computed are read once each."""

    def __init__(self, operands: Mapping[str, Checkpoint], name: str, box: Box):
        self._operands, self._name, self._box = operands, name, box
        self._kept: dict[str, Tensor] = {}

    def stored(self, path: str) -> Tensor:
        return self._operands[path].read(self._name, self._box)

    def wide(self, path: str, box: Box | None = None) -> Tensor:
        """The box of an operand in fp32, not to be changed."""
        if box is not None and box != self._box:
            return _wide(self._operands[path].read(self._name, box))
        if path not in self._kept:
            self._kept[path] = _wide(self.stored(path))
        return self._kept[path]

    def keep_for(self, terms: Sequence[Term]) -> None:
        """Free the boxes that none of these needs: a mean has many operands, and needs one after the other."""
        needed = {path for term in terms for path in (term.checkpoint, term.origin)}
        self._kept = {path: block for path, block in self._kept.items() if path in needed}

    def difference(self, term: Term, box: Box) -> Tensor:
        """checkpoint - origin in ``box``, a new tensor."""
        ours, origin = self.wide(term.checkpoint, box), self.wide(term.origin, box)
        return torch.sub(ours, origin, out=empty(ours.shape, torch.promote_types(ours.dtype, origin.dtype)))


def _wide(block: Tensor) -> Tensor:
    if block.dtype in (torch.float32, torch.float64):
        return block
    return empty(block.shape, torch.float32).copy_(block)


def _rounded(total: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = total if total.dtype == dtype else empty(total.shape, dtype).copy_(total)
    if rounded.numel():
        smallest, largest = rounded.aminmax() if dtype in (torch.float32, torch.float64) else total.aminmax()
        limit = torch.finfo(dtype).max
        if not (smallest >= -limit and largest <= limit):  # also false for NaN
            raise ValueError(
                f"{name} has numbers that are not finite in {str(dtype).removeprefix('torch.')}: an operand is broken, "
                "or the coefficients are too large"
            )
    return rounded
