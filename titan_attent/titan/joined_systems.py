"""The systems of a run as one: each call goes to all of them, in their order (systems/system.py)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.systems.system import Columns, LossFunction, Run, Seen, System


class Together:
    """Made once the ranks can talk.

    Args:
        kinds: of the systems that take part.
        run: what they may use.
        loss: torchtitan's own.

    Attributes:
        column_names: of what is read beside the tokens.
        loss: of all: each system's around or instead of that of the systems before it.
        sampler: the one that decides the order of the examples.
        reads: makes columns, in reader threads.
        states: name -> a system with a state in the checkpoint.
    """

    def __init__(self, kinds: Iterable[type[System]], run: Run, loss: LossFunction):
        self.systems: list[System] = [kind(run) for kind in kinds]
        self.column_names = ("example_id", *(name for system in self.systems for name in system.columns))
        self.loss = loss
        for system in self.systems:
            self.loss = system.loss(self.loss)
        self.sampler: TeachingSampler
        (self.sampler,) = (system.sampler for system in self.systems if system.sampler is not None)
        self.reads: Sequence[Callable[[Tensor], Columns]] = [
            system.read for system in self.systems if type(system).read is not System.read
        ]
        self.states = {system.name: system for system in self.systems if system.keeps_state}

    def __iter__(self) -> Iterator[System]:
        return iter(self.systems)

    def schedule(self, schedule: Any) -> Any:
        for system in self.systems:
            schedule = system.schedule(schedule)
        return schedule

    def begin(self) -> None:
        for system in self.systems:
            system.begin()

    def around_backward(self) -> AbstractContextManager[Any]:
        return _all_of(system.around_backward() for system in self.systems)

    def microbatch_done(self, columns: Columns, seen: Seen | None) -> None:
        for system in self.systems:
            system.microbatch_done(columns, seen)

    def step_done(self) -> None:
        for system in self.systems:
            system.step_done()

    def outside_steps(self) -> AbstractContextManager[Any]:
        return _all_of(system.outside_steps() for system in self.systems)

    def aside(
        self, function: Callable[..., Any], *, when: Callable[..., bool] = lambda *_, **__: True
    ) -> Callable[..., Any]:
        """``function``, which is no training step; where ``when`` of the same arguments says no, it does nothing that
        a system must know of."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.outside_steps() if when(*args, **kwargs) else nullcontext():
                return function(*args, **kwargs)

        return wrapper

    def metrics(self) -> dict[str, float]:
        return {tag: value for system in self.systems for tag, value in system.metrics().items()}

    def close(self) -> None:
        for system in self.systems:
            system.close()


def _all_of(contexts: Iterable[AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()
