"""What on an accelerator would make the host wait, counted on the CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.train import Trainer

from titan_attent.systems.teaching.system import Teaching
from titan_attent.titan.trainer import TeachingTrainer

SYNCS = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of a tensor that wait for its device."""
SYNCING_OPS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"),
    "lift_fresh",
)
"""Operators that do, whoever calls them: the size or the branch after them depends on values, or a tensor is made of
host numbers (``torch.tensor(...)``, an index in a list), whose copy to the device the host waits for."""


class CountSyncs(TorchDispatchMode):
    """While active, counts what on an accelerator would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._patches = [mock.patch.object(torch.Tensor, name, self._counted(name)) for name in SYNCS]

    def _counted(self, name: str) -> Callable[..., Any]:
        method = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen[name] += 1
            return method(tensor, *args, **kwargs)

        return call

    def __enter__(self) -> "CountSyncs":
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCING_OPS:
            self.seen[name] += 1
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.seen["index by mask"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def from_forward_to_optimizer(trainer: Trainer, syncs: CountSyncs) -> Iterator[None]:
    """``syncs`` is active from the first microbatch's forward to the optimizer's step, and in what follows a step."""
    forward, optimize = trainer.forward_backward_step, trainer.optimizers.step
    systems = trainer.systems if isinstance(trainer, TeachingTrainer) else ()
    teaching = next((system for system in systems if isinstance(system, Teaching)), None)
    after = None if teaching is None else teaching.after_step
    active = False

    def first(**kwargs: Any) -> Any:
        nonlocal active
        if not active:
            syncs.__enter__()
        active = True
        return forward(**kwargs)

    def last() -> None:
        nonlocal active
        syncs.__exit__(None, None, None)
        active = False
        optimize()

    def watched_after() -> None:
        assert after is not None
        with syncs:
            after()

    with (
        mock.patch.object(trainer, "forward_backward_step", first),
        mock.patch.object(trainer.optimizers, "step", last),
    ):
        if after is None:
            yield
        else:
            with mock.patch.object(teaching, "after_step", watched_after):
                yield
