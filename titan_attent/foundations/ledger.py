"""The ledger: where the time of a run went, what was trained and what was left out. Host numbers, ready to log.

Every second of the training thread is charged to at most one account: an account opened inside another one stops the
outer clock. The seconds are what the thread sees, with its waits for other ranks and for the device; an asynchronous
exchange costs only what is not hidden behind the step. What belongs to no account (the logging, the garbage collector)
is the difference between their sum and ``wall_seconds``, which runs from the first batch on and goes on after a resume.

``examples_covered`` counts the pool as covered once when one pass over a selection ends, whatever its ratio: trained
examples are paid for, covered ones are what they stand for, and skipped ones are the difference.

The break-even line: teaching pays in compute when the share of examples it skips is at least the seconds it costs,
divided by the seconds that training everything covered would have cost.

    skipped_share     = 1 - trained / covered
    break_even_share  = (prepaid + score + select + exchange seconds) / (covered x train seconds / trained)
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")

OF_EVERY_RUN = ("load", "train", "save", "validate")
"""The accounts of every run; systems add theirs."""


class LedgerAccount(NamedTuple):
    """An account of a system.

    Attributes:
        name: of the scalar ``ledger/NAME_seconds``.
        is_overhead: whether it counts as the overhead of teaching.
    """

    name: str
    is_overhead: bool = False


TEACHING = (
    LedgerAccount("score", is_overhead=True),
    LedgerAccount("select", is_overhead=True),
    LedgerAccount("exchange", is_overhead=True),
)
"""The accounts of a teacher."""


class Ledger:
    """Costs and coverage since the first batch of the run; a resume goes on counting.

    Args:
        batch_size: G, examples of a global batch.
        tokens_per_example: for tokens_covered_per_second.
        accounts: of the systems, beside those of every run.
        clock: seconds from any fixed moment on.

    Attributes:
        prepaid_seconds: what scorers took before the run, as seconds of all of its devices; not part of the state.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        tokens_per_example: int,
        accounts: Iterable[LedgerAccount] = TEACHING,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.batch_size = batch_size
        self.tokens_per_example = tokens_per_example
        accounts = tuple(accounts)
        self.overhead = tuple(account.name for account in accounts if account.is_overhead)
        # What other systems charge is in their own state: a checkpoint of a run without them has it not.
        self._kept = (*OF_EVERY_RUN, *(account.name for account in accounts if account in TEACHING))
        self.seconds = dict.fromkeys((*OF_EVERY_RUN, *(account.name for account in accounts)), 0.0)
        self.examples_trained = 0
        self.examples_covered = 0.0
        self.examples_scored = 0
        self.prepaid_seconds = 0.0
        self._clock = clock
        self._open: list[str] = []
        self._settled = self._start = clock()
        self._seconds_before = 0.0

    def start(self) -> None:
        """The first batch is asked for: what came before (building, compiling, loading) is not counted."""
        self._start = self._clock()

    @contextmanager
    def charge(self, account: str) -> Iterator[None]:
        """Add the wall time of the block to ``account``, without the time of blocks that are charged inside it."""
        self._settle()
        self._open.append(account)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def charged(self, account: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function``, whose calls are charged to ``account``."""

        def wrapper(*args: Any, **kwargs: Any) -> Result:
            with self.charge(account):
                return function(*args, **kwargs)

        return wrapper

    def _settle(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._settled
        self._settled = now

    def batch_served(self, *, covered_per_trained: float) -> None:
        """A global batch goes to training; each of its examples stands for ``covered_per_trained`` of its pool."""
        self.examples_trained += self.batch_size
        self.examples_covered += self.batch_size * covered_per_trained

    @property
    def wall_seconds(self) -> float:
        return self._seconds_before + self._clock() - self._start

    @property
    def overhead_seconds(self) -> float:
        return sum(self.seconds[account] for account in self.overhead)

    @property
    def skipped_share(self) -> float:
        return 1 - self.examples_trained / self.examples_covered if self.examples_covered else 0.0

    @property
    def break_even_share(self) -> float:
        """The share that must be skipped for teaching to pay; 0 before anything was trained."""
        full = self.examples_covered * self.seconds["train"] / max(1, self.examples_trained)
        return (self.prepaid_seconds + self.overhead_seconds) / full if full else 0.0

    def metrics(self) -> dict[str, float]:
        """The ``ledger/*`` scalars."""
        self._settle()
        wall = max(self.wall_seconds, 1e-9)
        return {f"ledger/{account}_seconds": spent for account, spent in self.seconds.items()} | {
            "ledger/wall_seconds": wall,
            "ledger/prepaid_seconds": self.prepaid_seconds,
            "ledger/overhead_percent": 100 * self.overhead_seconds / wall,
            "ledger/examples_trained": float(self.examples_trained),
            "ledger/examples_covered": self.examples_covered,
            "ledger/examples_skipped": self.examples_covered - self.examples_trained,
            "ledger/examples_scored": float(self.examples_scored),
            "ledger/skipped_share": self.skipped_share,
            "ledger/break_even_share": self.break_even_share,
            "ledger/tokens_covered_per_second": self.examples_covered * self.tokens_per_example / wall,
        }

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "seconds": {name: self.seconds[name] for name in self._kept},
            "wall_seconds": self.wall_seconds,
            "examples_trained": self.examples_trained,
            "examples_covered": self.examples_covered,
            "examples_scored": self.examples_scored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds |= state["seconds"]
        self._seconds_before = state["wall_seconds"]
        self._start = self._clock()
        self.examples_trained = state["examples_trained"]
        self.examples_covered = state["examples_covered"]
        self.examples_scored = state["examples_scored"]
