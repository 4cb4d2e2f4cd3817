"""Modules off and on again between steps, under FSDP2 and torch.compile.

A parameter that requires no gradient gets none: no product for it, no part in a reduce-scatter, and as its ``grad``
stays None the optimizer passes it by, weight decay included. What can go wrong, and what is done about it:

- FSDP2 takes over ``requires_grad`` when it gathers a group, so that a group which is still gathered keeps the old one
  (pytorch #196996): all groups are given back first.
- A group whose parameters were all frozen at its very first forward fails when they are unfrozen under mixed precision
  (pytorch #186998): the first forward of a process is made with all of them active.
- A compiled block is one graph for each pattern of what requires gradients in it, and torch stops at 8 of them
  (torchtitan #3737): the patterns are few, all are compiled before the first step, and the limit leaves room for them.
- torch.distributed.checkpoint drops the optimizer's state of a frozen parameter (pytorch #192202): all are active while
  a checkpoint is saved or loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.distributed.fsdp import FSDPModule

from titan_attent.systems.freezing.units import Unit
from titan_attent.systems.system import Run

MOST_GRAPHS = 64
"""Of a block's code: 8 patterns, for the kinds of layers a model has, and those of validation."""
LAYERS_WARMED = 4
"""Layers of which each is made the first active one: models alternate between kinds of layers."""


class Freezer:
    """Puts a choice of active modules in force.

    Args:
        model: whole, as it is trained.
        units: its modules.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]):
        self.model, self.units = model, units
        self.active = [True] * len(units)

    def apply(self, active: Sequence[bool]) -> None:
        """Between two steps, on all ranks alike. No collective."""
        if list(active) == self.active:
            return
        self._reshard()
        for unit, on in zip(self.units, active, strict=True):
            for parameter in unit.parameters:
                parameter.requires_grad_(on)
                if not on:
                    parameter.grad = None
        self.active = list(active)

    def _reshard(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def all_active(self) -> Iterator[None]:
        """Every module active inside."""
        before = self.active
        self.apply([True] * len(before))
        try:
            yield
        finally:
            self.apply(before)

    def first_forward(self, run: Run) -> None:
        """What FSDP2 sets up at the first forward, with every module active. A collective."""
        with self.all_active(), torch.no_grad(), torch.compiler.set_stance("force_eager"), _predict(run, 1):
            pass

    def warm(self, run: Run) -> None:
        """Compile every pattern that a decision can bring, by a forward and backward pass each."""
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
        for pattern in _patterns(self.units):
            self.apply(pattern)
            with _predict(run, run.settings.local_batch_size) as (logits, _):
                (logits.float().mean() * 0).backward()
            for parameter in self.model.parameters():
                parameter.grad = None
        self.apply([True] * len(self.units))


def _predict(run: Run, rows: int) -> AbstractContextManager[tuple[Tensor, Tensor]]:
    """Of the first so many examples of the data set: what they are does not matter."""
    inputs, labels = run.dataset.read(torch.arange(rows) % len(run.dataset))
    return run.predict(inputs["input"], labels)


def _patterns(units: Sequence[Unit]) -> list[list[bool]]:
    """Which modules are active in each warm-up pass: together they show a block every pattern that it can meet.

    That is, of its attention, its feed-forward part and its input: which requires gradients. The input of a block does
    not above a frozen embedding and frozen layers, nor where Highway-BP takes no round."""
    both = [(True, True), (False, True), (True, False)]
    none = (False, False)
    num_layers = 1 + max(unit.layer for unit in units if unit.kind not in ("embedding", "output"))

    def pattern(embedding: bool, of_layers: Sequence[tuple[bool, bool]]) -> list[bool]:
        def is_active(unit: Unit) -> bool:
            if unit.kind == "embedding":
                return embedding
            return unit.kind == "output" or of_layers[unit.layer][unit.kind != "attention"]

        return [is_active(unit) for unit in units]

    patterns = [pattern(True, [state] * num_layers) for state in (*both, none)]
    patterns.append(pattern(False, [none] * num_layers))
    for first in range(min(LAYERS_WARMED, num_layers)):
        above = [both[0]] * (num_layers - first - 1)
        patterns += [pattern(False, [*[none] * first, state, *above]) for state in both]
    return patterns
