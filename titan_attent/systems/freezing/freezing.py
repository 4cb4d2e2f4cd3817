"""Freezing and unfreezing modules between steps, under FSDP2 and torch.compile.

A parameter with ``requires_grad = False`` gets no gradient: its product is not computed and nothing of it is reduced.
Its ``grad`` stays None, so the optimizer skips it, weight decay included. Known problems and their workarounds:

- FSDP2 copies ``requires_grad`` when it gathers a group, so a group that is still gathered keeps the old value
  (pytorch #196996). All groups are resharded first.
- If all parameters of a group were frozen at its first forward, unfreezing them fails under mixed precision
  (pytorch #186998). The first forward of a process runs with all of them active.
- A compiled block has one graph per pattern of active modules, and torch stops at 8 graphs (torchtitan #3737). The
  patterns are few, all are compiled before the first step, and the limit is raised.
- torch.distributed.checkpoint drops the optimizer state of a frozen parameter (pytorch #192202). All modules are active
  while a checkpoint is saved or loaded.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.distributed.fsdp import FSDPModule

from titan_attent.systems.freezing.units import Unit
from titan_attent.systems.system import Run

MAX_GRAPHS = 64
"""Maximum number of graphs per block's code: 8 patterns for each type of layer, and the graphs of validation."""
LAYERS_WARMED = 4
"""Number of lowest layers that warm-up makes the first active one in turn; models alternate between layer types."""


class Freezer:
    """Freezes and unfreezes the modules of a model.

    Args:
        model: the whole model, as it is trained.
        units: the modules of the model.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]):
        self.model, self.units = model, units
        self.active = [True] * len(units)

    def apply(self, active: Sequence[bool]) -> None:
        """Set which modules are active. Call it between steps, with the same value on all ranks. No collective."""
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
        """Make every module active inside the context, and restore the frozen ones at its end."""
        before = self.active
        self.apply([True] * len(before))
        try:
            yield
        finally:
            self.apply(before)

    def first_forward(self, run: Run) -> None:
        """Run FSDP2's first forward, which sets up its groups, with every module active. A collective."""
        with self.all_active(), torch.no_grad(), torch.compiler.set_stance("force_eager"), _predict(run, 1):
            pass

    def warm(self, run: Run, patterns: Iterable[Sequence[bool]] | None = None) -> None:
        """Compile every pattern that a decision can produce, with one forward and backward pass per pattern.

        Args:
            patterns: the active modules of each pattern; None for those of the policies that probe.
        """
        dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
        for pattern in _patterns(self.units) if patterns is None else patterns:
            self.apply(pattern)
            with _predict(run, run.settings.local_batch_size) as (logits, _):
                (logits.float().mean() * 0).backward()
            for parameter in self.model.parameters():
                parameter.grad = None
        self.apply([True] * len(self.units))


def _predict(run: Run, num_examples: int) -> AbstractContextManager[tuple[Tensor, Tensor]]:
    """Run a forward pass on the first examples of the data set; any examples would do."""
    inputs, labels = run.dataset.read(torch.arange(num_examples) % len(run.dataset))
    return run.predict(inputs["input"], labels)


def _patterns(units: Sequence[Unit]) -> list[list[bool]]:
    """The active modules of each warm-up pass; together they cover every pattern that a block can meet.

    A pattern says which of a block's attention, feed-forward and input require gradients. The input requires none
    above a frozen embedding and frozen layers, or with zero rounds of Highway backpropagation.
    """
    both = [(True, True), (False, True), (True, False)]
    none = (False, False)
    num_layers = 1 + max(unit.layer for unit in units if unit.kind not in ("embedding", "output"))

    def pattern(embedding: bool, layers: Sequence[tuple[bool, bool]]) -> list[bool]:
        def is_active(unit: Unit) -> bool:
            if unit.kind == "embedding":
                return embedding
            return unit.kind == "output" or layers[unit.layer][unit.kind != "attention"]

        return [is_active(unit) for unit in units]

    patterns = [pattern(True, [state] * num_layers) for state in (*both, none)]
    patterns.append(pattern(False, [none] * num_layers))
    for first in range(min(LAYERS_WARMED, num_layers)):
        above = [both[0]] * (num_layers - first - 1)
        patterns += [pattern(False, [*[none] * first, state, *above]) for state in both]
    return patterns
