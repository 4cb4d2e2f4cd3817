"""The ledger: seconds per activity of a run, and how many examples were trained and skipped. Host numbers.

Every second of the training thread is charged to at most one account: an account opened inside another one stops the
outer clock. The seconds include waits for other ranks and for the device. An asynchronous exchange costs only the time
that is not hidden behind the step. ``wall_seconds`` runs from the first batch on and continues after a resume. The
difference between it and the sum of all accounts is time that belongs to none: logging, garbage collection.

``examples_covered`` grows by the size of the pool per pass over a selection of it, whatever share was selected.
``examples_trained`` counts the examples that were computed. The difference is the number of skipped examples.

Teaching saves compute when the share of examples that it skips is at least its break-even share: the seconds of
teaching, divided by the seconds that training all covered examples would have taken.

    skipped_share     = 1 - trained / covered
    break_even_share  = (prepaid + score + select + exchange seconds) / (covered x train seconds / trained)
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")

RUN_ACCOUNTS = ("load", "train", "save", "validate")
"""The accounts of every run; each system adds its own."""


class LedgerAccount(NamedTuple):
    """An account that a system charges.

    Attributes:
        name: NAME in the scalar ``ledger/NAME_seconds``.
        is_overhead: whether its seconds count as overhead of teaching.
    """

    name: str
    is_overhead: bool = False


TEACHING_ACCOUNTS = (
    LedgerAccount("score", is_overhead=True),
    LedgerAccount("select", is_overhead=True),
    LedgerAccount("exchange", is_overhead=True),
)
"""The accounts that the teacher charges."""


class Ledger:
    """Seconds and example counts since the first batch of the run; a resumed run continues them.

    Args:
        batch_size: G, examples per global batch.
        tokens_per_example: for the scalar ``ledger/tokens_covered_per_second``.
        accounts: the accounts of the systems, in addition to those of every run.
        clock: returns seconds since any fixed moment.

    Attributes:
        prepaid_seconds: device-seconds of the scorers before the run / devices of the run; not part of the state.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        tokens_per_example: int,
        accounts: Iterable[LedgerAccount] = TEACHING_ACCOUNTS,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.batch_size = batch_size
        self.tokens_per_example = tokens_per_example
        accounts = tuple(accounts)
        self.overhead = tuple(account.name for account in accounts if account.is_overhead)
        # Other systems keep the seconds they charge in their own state, which runs without them do not save.
        self._saved_accounts = (*RUN_ACCOUNTS, *(account.name for account in accounts if account in TEACHING_ACCOUNTS))
        self.seconds = dict.fromkeys((*RUN_ACCOUNTS, *(account.name for account in accounts)), 0.0)
        self.examples_trained = 0
        self.examples_covered = 0.0
        self.examples_scored = 0
        self.prepaid_seconds = 0.0
        self._clock = clock
        self._open: list[str] = []
        self._settled = self._start = clock()
        self._seconds_before = 0.0

    def start(self) -> None:
        """Start the wall clock, when the first batch is requested: building, compiling and loading are not counted."""
        self._start = self._clock()

    @contextmanager
    def charge(self, account: str) -> Iterator[None]:
        """Add the wall time of the block to ``account``, except the time of charged blocks inside it."""
        self._settle()
        self._open.append(account)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def charged(self, account: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap ``function`` so that its calls are charged to ``account``."""

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
        """Count a global batch as trained; each of its examples covers ``covered_per_trained`` examples of its pool."""
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
        """The share of skipped examples above which teaching saves compute; 0 before the first training step."""
        full_seconds = self.examples_covered * self.seconds["train"] / max(1, self.examples_trained)
        return (self.prepaid_seconds + self.overhead_seconds) / full_seconds if full_seconds else 0.0

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
            "seconds": {name: self.seconds[name] for name in self._saved_accounts},
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
