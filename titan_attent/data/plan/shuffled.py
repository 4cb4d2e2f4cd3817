"""The plan of a run without selection: all examples, pass after pass, each pass in its own shuffled order.

Pass i trains on all examples in shuffled order i, without the last ones, which do not fill a global batch.
The state is the number of the pass, which the sampler keeps. There is no state per example, in memory or in a
checkpoint.

Cost: O(log N) per position of the order, in the reader threads; no time between passes.
"""

from torch import Tensor

from titan_attent.data.plan.order import Pass, Pool, SelectedSlots
from titan_attent.data.plan.packed import PackedPass, Packer
from titan_attent.data.plan.sampler import AnyPass
from titan_attent.foundations.ledger import Ledger

BATCHES_AT_ONCE = 16
"""Number of global batches whose weights, all 1, are made in one call."""


class Shuffled:
    """Full passes without end: implements :class:`~.sampler.Passes` for :class:`~.sampler.TeachingSampler`.

    Args:
        num_examples: N, at least one global batch.
        batch_size: G, examples of a global batch.
        seed: seed of the orders.
        ledger: counts the trained examples.
        packer: packs several examples into each row, a window; G is then a number of windows. None if each row is one
            example.
        group_size: m, a divisor of N and of G: examples of which a batch has all or none (order.py).
    """

    round = 0

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        seed: int,
        ledger: Ledger | None = None,
        packer: Packer | None = None,
        group_size: int = 1,
    ):
        if packer is None and batch_size > num_examples:
            raise ValueError(
                f"the data set has {num_examples} examples, fewer than one global batch of {batch_size}: "
                "write more data, or lower training.global_batch_size or training.seq_len"
            )
        assert num_examples % group_size == batch_size % group_size == 0
        self.num_examples, self.batch_size, self.seed, self.ledger = num_examples, batch_size, seed, ledger
        self.group_size = group_size
        self.weights_every = BATCHES_AT_ONCE
        self.packer = packer
        self._packed: PackedPass | None = None
        self._pass_index = -1  # before the first pass

    @property
    def pass_index(self) -> int:
        """The pass in progress; 0 before the first."""
        return max(0, self._pass_index)

    def current_pass(self) -> AnyPass | None:
        """The pass in progress, None before the first. A collective once per packed pass."""
        return self._pass() if self._pass_index >= 0 else None

    def next_pass(self, *, step: int) -> AnyPass:
        """The pass after the one in progress."""
        self._pass_index += 1
        return self._pass()

    def _pass(self) -> AnyPass:
        order = (self.seed, 0, self._pass_index)
        if self.packer is not None:
            if self._packed is None or self._packed.order != order:
                self._packed = self.packer.full_pass(order)
            return self._packed
        pool = Pool(self.num_examples, order=order, size=self.num_examples, group_size=self.group_size)
        num_batches = self.num_examples // self.batch_size
        return Pass(
            pool, SelectedSlots(self.num_examples), order=None, batch_size=self.batch_size, num_batches=num_batches
        )

    def resume(self, *, round: int, pass_index: int, step: int) -> bool:
        """Continue with the pass of a checkpoint. Returns whether this plan made that pass.

        A checkpoint of a run with selection ends in a pass that this plan does not have. The next pass is then a new
        one. Its number is higher than that of any pass that the run can have begun in ``step`` steps.
        """
        is_own = round == 0
        per_batch = self.batch_size if self.packer is None else self.packer.examples_per_batch
        self._pass_index = pass_index if is_own else step // max(1, self.num_examples // per_batch) + 1
        return is_own

    def follow_plan(self, *, step: int, consumed: int) -> None:
        """Does nothing: no pass depends on the length of the run."""

    def weights_of(self, slots: Tensor) -> Tensor:
        raise AssertionError("no pass of this plan is weighted")

    def batch_served(self) -> None:
        """Count one global batch as trained."""
        if self.ledger is not None:
            self.ledger.batch_served(covered_per_trained=1.0)
