"""Highway backpropagation as a system of a run (systems/system.py).

Hooks cut the graph of a microbatch between its blocks (links.py). So torch's backward ends at the last block's output,
and a sweep over the blocks computes the other gradients (sweep.py). In the last ``exact_fraction`` of the steps the
hooks cut nothing, and torch's own backpropagation runs.

In two kinds of steps the sweep is *measured*, which means that it adds sums on the device (sums.py):

- An *adjusting* step, step 1 and every 16th, sets the number of rounds (``tolerance``) or the gains (``fit_gain``).
- The step before each logged step provides the scalars, which must be on the host when that step logs.

Cost: after a measured step one all-reduce of the sums, a few hundred bytes, and one copy if the host needs a number.

This system must come last: a forward pass that another system differentiates between steps (``Run.predict``) is not
cut.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.compiler.config as compiler
import torch.distributed as dist
from torch import Tensor

from titan_attent.systems.highway import checks
from titan_attent.systems.highway.account import HighwayAccount
from titan_attent.systems.highway.branches import BranchCuts
from titan_attent.systems.highway.config import FORMER_NAME, HighwayConfig
from titan_attent.systems.highway.links import Cuts, tied_embeddings
from titan_attent.systems.highway.panels import PANELS
from titan_attent.systems.highway.sums import Measurements, Sums, enough_rounds, fitted_gains, read
from titan_attent.systems.highway.sweep import num_vjps, separate_vjps, sweep
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Batch, ExampleStats, Run, System

ADJUST_EVERY = 16
"""Number of steps from one adjusting step to the next."""
GAIN_RATE = 0.5
"""Weight of the new gains in their moving average, per adjusting step."""


@contextmanager
def several_passes() -> Iterator[None]:
    """Make torch.compile create graphs, flex attention's included, whose backward can run several times.

    By default a compiled backward overwrites its saved tensors, and a second pass is silently wrong (pytorch #130580).
    So graphs compiled earlier in this process are dropped. The key of torch's on-disk cache gets a tag, as it does not
    distinguish the two kinds of graphs.
    """
    before = functorch.donated_buffer, compiler.cache_key_tag
    functorch.donated_buffer, compiler.cache_key_tag = False, f"{before[1]}titan_attent.systems.highway"
    torch.compiler.reset()
    try:
        yield
    finally:
        functorch.donated_buffer, compiler.cache_key_tag = before


class Highway(System):
    """The system of ``[highway]`` with cuts at branches or blocks.

    Its state is the number of rounds, the gains and the saved FLOPs, which are the same on all ranks.
    """

    name = "highway"
    former_name = FORMER_NAME
    needs = ("tokens", "residual blocks")
    off = 'method = "exact"'
    keeps_state = True
    comes_last = True
    panels = PANELS

    @classmethod
    def is_on(cls, config: HighwayConfig) -> bool:
        return config.method != "exact" and config.cut != "stage"

    @classmethod
    def check(cls, config: HighwayConfig, settings: RunSettings) -> None:
        config.validate()
        checks.check_run(config, settings)

    config: HighwayConfig

    def __init__(self, run: Run, config: HighwayConfig):
        super().__init__(run, config)
        (model,) = run.model_parts
        blocks = list(model.layers.children())  # type: ignore[union-attr]
        self.num_blocks = len(blocks)
        self.max_rounds = checks.rounds(config, len(blocks))
        self.rounds = self.max_rounds
        self.gains = torch.ones(len(blocks), device=run.device)
        steps = run.settings.steps
        self.last_cut_step = steps - round(config.exact_fraction * steps)
        self.in_step, self.microbatches = False, 0
        self.branches = BranchCuts(blocks) if config.cut == "branch" else None
        self.sums: Sums | None = None
        self.measurements: Measurements | None = None
        self.is_compiled = run.settings.compiles_model
        self.account = HighwayAccount(model, blocks, seq_len=run.settings.seq_len, is_compiled=self.is_compiled)
        self.compiler_options: AbstractContextManager[None] = (
            several_passes() if self.max_rounds or config.log_cosine else nullcontext()
        )
        self.compiler_options.__enter__()
        needed = self._needs_input_gradients
        self.cuts = Cuts(blocks, root=model, tied=tied_embeddings(model), needs_input_gradients=needed)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _is_cut(self, step: int) -> bool:
        return step <= self.last_cut_step

    def _is_adjusting(self, step: int) -> bool:
        return bool(self.config.tolerance or self.config.fit_gain) and (step == 1 or step % ADJUST_EVERY == 0)

    def _is_logged_next(self, step: int) -> bool:
        return (step + 1) % self.run.settings.log_every == 0 and (self.max_rounds > 0 or self.config.log_cosine)

    def _rounds(self, step: int) -> int:
        """The number of rounds in a step: the maximum in a step that adjusts it."""
        return self.max_rounds if self.config.tolerance and self._is_adjusting(step) else self.rounds

    def _wants_exact(self, step: int) -> bool:
        return self.config.log_cosine and self._is_logged_next(step)

    def _needs_input_gradients(self) -> bool | None:
        step = self.run.step()
        if not (self.in_step and self._is_cut(step)):
            self._reset()
            return None
        self.cuts.set_last(False)
        if self.branches is not None:
            self.branches.switch.is_on = True
        return self._rounds(step) > 0 or self._wants_exact(step)

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        try:
            yield
            gradient = self.cuts.gradient()
            if gradient is not None:
                self._sweep(gradient)
        finally:
            self._reset()

    def _reset(self) -> None:
        self.cuts.clear()
        if self.branches is not None:
            self.branches.switch.is_on = False

    def _sweep(self, gradient: Tensor) -> None:
        step = self.run.step()
        rounds = self._rounds(step)
        if self.sums is None and (self._is_adjusting(step) or self._is_logged_next(step)):
            wants_exact = self._wants_exact(step)
            self.sums = Sums(self.num_blocks, rounds, wants_exact=wants_exact, device=gradient.device)
        gains = self.gains if self.config.fit_gain else None
        below = sweep(self.cuts.links, gradient, iterations=rounds, gains=gains, sums=self.sums)
        self.cuts.send_below(below)

    def after_microbatch(self, batch: Batch, stats: ExampleStats | None) -> None:
        self.microbatches += 1
        if self.microbatches == self.run.microbatches:
            self.in_step, self.microbatches = False, 0
            if self.branches is not None and self._is_cut(self.run.step()):
                self.branches.norm_gradients()

    def before_first_step(self) -> None:
        has_both = self.last_cut_step < self.run.settings.steps or self.config.log_cosine
        if self.is_compiled and self.max_rounds == 0 and has_both:
            self._compile_exact()
        self.in_step = True

    def _compile_exact(self) -> None:
        """Compile the graphs of exact steps, whose block inputs need gradients, before the run instead of during it."""
        settings = self.run.settings
        tokens = torch.zeros(settings.local_batch_size, settings.seq_len, dtype=torch.int64)
        with self.run.predict(tokens, tokens) as (logits, _):
            logits.sum().backward()
        for part in self.run.model_parts:
            part.zero_grad()

    def after_step(self) -> None:
        step, sums, self.sums = self.run.step(), self.sums, None
        self.in_step = True
        if self._is_cut(step):
            vjps = separate_vjps(
                self.num_blocks,
                self._rounds(step),
                complete=sums is not None,
                exact_too=self._wants_exact(step),
            )
            self.account.step_done(branches=self.branches is not None, vjps=vjps)
        else:
            self.account.step_done()
            self.measurements = None
        if sums is None:
            return
        for name in ("batch", "cp", "tp"):
            if (mesh := self.run.mesh(name)) is not None:
                dist.all_reduce(sums.table, group=mesh.get_group())
        is_adjusting = self._is_adjusting(step)
        if is_adjusting and self.config.fit_gain:
            self.gains = self.gains.lerp(fitted_gains(sums.table), GAIN_RATE)
        if self._is_logged_next(step) or (is_adjusting and self.config.tolerance):
            self.measurements = read(sums.table)
            if is_adjusting and self.config.tolerance:
                self.rounds = enough_rounds(self.measurements.changes, tolerance=self.config.tolerance)

    # -- logging and checkpoint -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        step = self.run.step()
        is_cut = self._is_cut(step)
        rounds = self._rounds(step) if is_cut else self.num_blocks
        has_sums = self._is_logged_next(step) or self._is_adjusting(step)
        vjps = num_vjps(
            self.num_blocks, rounds, complete=is_cut and has_sums, exact_too=self._wants_exact(step) and is_cut
        )
        scalars = {"exact": float(not is_cut), "iterations": float(rounds), "vjps": float(vjps)}
        scalars |= self.account.metrics()
        if is_cut and self.measurements is not None:
            if changes := self.measurements.changes:
                scalars["step_norm"] = changes[-1]
            if cosines := self.measurements.cosines:
                scalars["cosine"] = sum(cosines) / len(cosines)
                scalars |= {f"cosine/layer_{i}": cosine for i, cosine in enumerate(cosines)}
        return {f"highway/{name}": value for name, value in scalars.items()}

    def state_dict(self) -> dict[str, Any]:
        # Earlier versions saved the same two keys, with a plain number under "rounds".
        counts = {"rounds": self.rounds, "account": self.account.counts}
        return {"rounds": json.dumps(counts), "gains": self.gains.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        loaded = json.loads(state["rounds"]) if isinstance(state["rounds"], str) else {"rounds": state["rounds"]}
        if self.config.tolerance:
            self.rounds = min(loaded["rounds"], self.max_rounds)
        self.account.counts = loaded.get("account", self.account.counts)
        self.gains = state["gains"].to(self.run.device)

    def close(self) -> None:
        self.cuts.remove()
        if self.branches is not None:
            self.branches.remove()
        self.compiler_options.__exit__(None, None, None)
