"""This rank's share of a pass: (pass, consumed batches) -> example ids and weights, microbatch after microbatch.

Global batch b of a pass has the positions [b G, (b + 1) G) of the pass (order.py). Rank r of W takes the r-th of W
equal contiguous blocks of the batch, and cuts it into microbatches. So any number of ranks trains the same examples in
the same global order, and the state is just a number of batches.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_attent.data.plan.mixture import MixedPass, Mixture
from titan_attent.data.plan.order import Pass
from titan_attent.data.plan.packed import PackedPass

AnyPass = Pass | PackedPass
"""A pass as the plan or a teacher decides it."""
ServedPass = Pass | PackedPass | MixedPass
"""A pass as it is trained: a mixture of sources may stand above the plan."""


MIXTURE = "mixture"
"""The key of the mixture's state, a string, in the state of a sampler."""


class Passes(Protocol):
    """The object that decides the passes: a fixed plan (shuffled.py) or a teacher that selects (systems/teaching)."""

    batch_size: int
    """Number of rows of a global batch: examples, or windows of packed examples."""

    @property
    def round(self) -> int:
        """The round of the pass in progress."""

    @property
    def pass_index(self) -> int:
        """The index of the pass in progress within its round."""

    @property
    def weights_every(self) -> int:
        """Number of global batches whose weights are requested in one call."""

    def current_pass(self) -> AnyPass | None: ...
    def next_pass(self, *, step: int) -> AnyPass: ...
    def follow_plan(self, *, step: int, consumed: int) -> None: ...
    def resume(self, *, round: int, pass_index: int, step: int) -> bool: ...
    def weights_of(self, slots: Tensor) -> Tensor: ...
    def batch_served(self) -> None: ...


class TeachingSampler:
    """This rank's example ids and weights, microbatch after microbatch, without end.

    It requests the next pass from the teacher when all batches of the current one are consumed.

    Args:
        teacher: decides the passes.
        rank, num_ranks: rank within the data-parallel group, and its size.
        microbatches: gradient accumulation steps per training step.
        mixture: decides which of the selected examples a batch trains; None for the order of the pass itself.

    ``state_dict`` does not depend on the rank: it loads on any number of ranks with the same global batch.
    """

    def __init__(
        self,
        teacher: Passes,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        microbatches: int = 1,
        mixture: Mixture | None = None,
    ):
        if teacher.batch_size % (num_ranks * microbatches):
            raise ValueError(
                f"the global batch of {teacher.batch_size} examples does not split into {num_ranks} ranks x "
                f"{microbatches} microbatches: make it a multiple of {num_ranks * microbatches}"
            )
        self.teacher, self.mixture = teacher, mixture
        self.rank, self.num_ranks, self.microbatches = rank, num_ranks, microbatches
        self.batch_size = teacher.batch_size // (num_ranks * microbatches)
        self.step = 0  # global batches served, in all passes
        self.consumed = 0  # global batches served, in the current pass
        self._resumed = False

    def current_pass(self) -> ServedPass:
        """The pass in progress, or the next one if that is consumed. A collective if the teacher has to select.

        With a mixture: the next batches of that pass.
        """
        if self._resumed:  # by now the teacher's state is loaded, too
            self.teacher.follow_plan(step=self.step, consumed=self.consumed)
            self._resumed = False
        current = self.teacher.current_pass()
        if current is None or self.consumed >= current.num_batches:
            current = self.teacher.next_pass(step=self.step)
            self.consumed = 0
        if self.mixture is not None:
            return self.mixture.stretch(current, step=self.step, consumed=self.consumed)
        return current

    def batch_consumed(self) -> None:
        """Count one global batch as served."""
        self.step += 1
        self.consumed += 1
        self.teacher.batch_served()
        if self.mixture is not None:
            self.mixture.batch_served()

    def local_rows(self) -> slice:
        """This rank's rows of the global batch: the rows of its microbatches, one after the other."""
        size = self.microbatches * self.batch_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def local_microbatches(self, current: ServedPass, *, start: int) -> Iterator[tuple[int, int]]:
        """The (global batch, microbatch) of every microbatch of the pass from global batch ``start`` on. Pure."""
        parts = range(self.microbatches)
        # Not itertools.product, which would make a tuple of the whole range: 20 million numbers for 10^10 examples.
        return ((batch, part) for batch in range(start, current.num_batches) for part in parts)

    def local_ids(self, current: ServedPass, batch: int, microbatch: int) -> Tensor:
        """int64 [batch_size], this rank's ids of a microbatch; some microseconds per id. Pure; safe on any thread.

        In a packed pass: int64 [batch_size, M], the examples of each window.
        """
        first = self.local_rows().start + microbatch * self.batch_size
        return current.ids(batch, batch + 1, slice(first, first + self.batch_size))

    def local_skipped(self, current: ServedPass, batch: int, microbatch: int) -> Tensor | None:
        """int64 [batch_size], for :meth:`local_ids`: the tokens of each row's first example that are in the row before.

        None if every row has whole examples.
        """
        first = self.local_rows().start + microbatch * self.batch_size
        return current.skipped(batch, batch + 1, slice(first, first + self.batch_size))

    def local_weights(self, current: ServedPass, *, start: int) -> Iterator[Tensor]:
        """The weights, fp32 of the shape of :meth:`local_ids`, of every microbatch; ones if the pass has none.

        In a weighted pass, the first of every ``weights_every`` global batches is a collective. So all ranks must
        iterate at the same pace.
        """
        block = self.teacher.weights_every
        for first in range(start, current.num_batches, block):
            last = min(first + block, current.num_batches)
            shape = (-1, self.batch_size, *current.row_shape)
            if current.weighted:
                weights = self.teacher.weights_of(current.slots(first, last, self.local_rows()))
            else:
                weights = torch.ones((last - first) * self.microbatches * self.batch_size * math.prod(shape[2:]))
            yield from weights.view(shape)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (example ids int64 [batch_size], their weights fp32 [batch_size]) of every microbatch."""
        while True:
            current, start = self.current_pass(), self.consumed
            microbatches = self.local_microbatches(current, start=start)
            weights = self.local_weights(current, start=start)
            for (batch, microbatch), weight in zip(microbatches, weights, strict=True):
                ids = self.local_ids(current, batch, microbatch)
                if microbatch == self.microbatches - 1:
                    self.batch_consumed()
                yield ids, weight

    def state_dict(self) -> dict[str, Any]:
        teacher = self.teacher
        state = {"step": self.step, "round": teacher.round, "pass": teacher.pass_index, "consumed": self.consumed}
        return state if self.mixture is None else state | {MIXTURE: self.mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.consumed = state["step"], state["consumed"]
        if not self.teacher.resume(round=state["round"], pass_index=state["pass"], step=self.step):
            self.consumed = 0
        if self.mixture is not None:
            self.mixture.load_state_dict(state.get(MIXTURE))
        self._resumed = True
