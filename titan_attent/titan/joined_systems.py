"""The systems of a run as one object: each call is passed to all of them, in their order (systems/system.py)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.systems.system import Batch, Columns, ExampleStats, LossFunction, Run, System
from titan_attent.systems.system_list import SystemOn

RESERVED_COLUMNS = ("input", "inputs", "example_id")


class JoinedSystems:
    """Builds the systems of a run; the process group must exist.

    Args:
        active: the systems that take part, each with its section.
        run: the interface to the run that they may use.
        loss: torchtitan's own loss.

    Attributes:
        column_names: names of the columns that are read beside the tokens.
        loss: the loss of all systems: each wraps or replaces the loss of the systems before it.
        sampler: the sampler of the one system that selects examples; None if no system does.
        token_columns: those of ``column_names`` with a row per token.
        reads: functions that compute columns in reader threads.
        step_reads: those that need the number of the step, too.
        marks: functions that mask labels in reader threads.
        states: name -> a system with a state in the checkpoint.

    Raises:
        ValueError: a system refuses the run, two systems bring a sampler, or two columns have one name.
    """

    def __init__(self, active: Iterable[SystemOn], run: Run, loss: LossFunction):
        self.systems: list[System] = [system(run, config) for system, config in active]
        self.column_names = ("example_id", *(name for system in self.systems for name in system.columns))
        self.loss = loss
        for system in self.systems:
            self.loss = system.wrap_loss(self.loss)
        self._check_columns(run.dataset.columns)
        self.sampler = self._one_sampler()
        self.reads: Sequence[Callable[[Tensor], Columns]] = [
            system.read_columns for system in self.systems if type(system).read_columns is not System.read_columns
        ]
        self.step_reads: Sequence[Callable[..., Columns]] = [
            system.read_columns_of_step
            for system in self.systems
            if type(system).read_columns_of_step is not System.read_columns_of_step
        ]
        self.token_columns = tuple(name for system in self.systems for name in system.token_columns)
        self.marks: Sequence[Callable[[Tensor, Columns, Tensor], Tensor]] = [
            system.mark_labels for system in self.systems if type(system).mark_labels is not System.mark_labels
        ]
        self.states = {system.name: system for system in self.systems if system.keeps_state}

    @property
    def for_loader(self) -> dict[str, Any]:
        """What the loader calls in its reader threads, and whether its batches have the column "weight"."""
        return {
            "reads": self.reads,
            "step_reads": self.step_reads,
            "marks": self.marks,
            "with_weights": "weight" in self.column_names,
        }

    def _one_sampler(self) -> TeachingSampler | None:
        samplers = {system.name: system.sampler for system in self.systems if system.sampler is not None}
        if len(samplers) > 1:
            raise ValueError(
                f"the systems {' and '.join(samplers)} each bring a sampler, but only one system can decide which "
                "examples are trained: turn all but one of them off"
            )
        return next(iter(samplers.values()), None)

    def _check_columns(self, data_columns: Sequence[str]) -> None:
        """Refuse two columns of one name; ValueError."""
        own_columns = (name for system in self.systems for name in system.columns)
        names = Counter((*RESERVED_COLUMNS, *data_columns, *own_columns))
        if duplicates := [name for name, num in names.items() if num > 1]:
            systems = ", ".join(system.name for system in self.systems)
            raise ValueError(
                f'the column "{duplicates[0]}" of a batch has two owners among the data and the systems {systems}: '
                "give one of them another name"
            )

    def __iter__(self) -> Iterator[System]:
        return iter(self.systems)

    def wrap_schedule(self, schedule: Any) -> Any:
        for system in self.systems:
            schedule = system.wrap_schedule(schedule)
        return schedule

    def folders_read(self) -> list[str]:
        return [folder for system in self.systems for folder in system.folders_read()]

    def weights_to_load(self, path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for system in self.systems:
            weights = system.weights_to_load(path, weights)
        return weights

    def set_initial_weights(self) -> None:
        for system in self.systems:
            system.set_initial_weights()

    def before_first_step(self) -> None:
        for system in self.systems:
            system.before_first_step()

    def around_backward(self) -> AbstractContextManager[Any]:
        return _all_of(system.around_backward() for system in self.systems)

    def after_microbatch(self, batch: Batch, seen: ExampleStats | None) -> None:
        for system in self.systems:
            system.after_microbatch(batch, seen)

    def after_step(self) -> None:
        for system in self.systems:
            system.after_step()

    def paused(self) -> AbstractContextManager[Any]:
        return _all_of(system.paused() for system in self.systems)

    def during_pause(
        self, function: Callable[..., Any], *, when: Callable[..., bool] = lambda *_, **__: True
    ) -> Callable[..., Any]:
        """Wrap ``function``, which is not a training step: the systems are paused while it runs.

        ``when`` gets the same arguments; if it returns False, the systems are not paused.
        """

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.paused() if when(*args, **kwargs) else nullcontext():
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
