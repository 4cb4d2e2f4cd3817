"""Modular Adaptive Training as a system of a run: it probes the modules between steps and selects the active ones.

    step done -> probe (every ``interval`` steps) -> eigenvalues -> policy -> requires_grad of whole modules

Cost: that of probe.py every ``interval`` steps, charged to the ledger's account ``probe``. It adds nothing to a step.
"""

import json
import logging
from contextlib import AbstractContextManager
from typing import Any, cast

from titan_attent.foundations.flops import is_experts
from titan_attent.foundations.json_lines import JsonLines
from titan_attent.foundations.ledger import LedgerAccount
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.freezing import panels
from titan_attent.systems.freezing.account import FreezingAccount
from titan_attent.systems.freezing.config import FORMER_NAME, FreezingConfig, parse_stages
from titan_attent.systems.freezing.freezing import Freezer
from titan_attent.systems.freezing.policy import History, decide, relative, stage_of, units_of_stage
from titan_attent.systems.freezing.probe import Prober
from titan_attent.systems.freezing.units import ALWAYS_TRAINED, backward_flops, find_units
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import DataFacts, Planned, Run, System

logger = logging.getLogger(__name__)


class Freezing(System):
    """The system of the section ``[freezing]``."""

    name = "freezing"
    former_name = FORMER_NAME
    needs = ("tokens",)
    off = 'policy = "off"'
    keeps_state = True
    accounts = (LedgerAccount("probe"),)
    panels = panels.PANELS

    @classmethod
    def is_on(cls, config: FreezingConfig) -> bool:
        return config.policy != "off"

    @classmethod
    def check(cls, config: FreezingConfig, settings: RunSettings) -> None:
        config.validate()
        degrees = settings.degrees
        refused = {
            "pipeline_parallel_degree": degrees.pipeline,
            "context_parallel_degree": degrees.context,
            "expert_parallel_degree": degrees.expert,
        }
        for key, degree in refused.items():
            if degree > 1:
                raise ValueError(
                    f'[freezing] policy = "{config.policy}" with parallelism.{key} = {degree}: a probe needs whole '
                    'examples and all modules on every rank. Set it to 1, or policy = "off"'
                )
        if degrees.is_ddp:
            raise ValueError(
                f'[freezing] policy = "{config.policy}" with data_parallel_replicate_degree = {degrees.replicate} and '
                "no sharding, which is DDP. DDP waits for the gradients of frozen parameters. Set "
                "data_parallel_shard_degree above 1 (HSDP), or data_parallel_replicate_degree to 1 (FSDP2)"
            )
        if settings.steps_in_backward:
            raise ValueError(
                f'[freezing] policy = "{config.policy}" with optimizer.early_step_in_backward = true: a probe runs a '
                "backward pass that must not step the optimizer. Set it to false"
            )
        if config.heads and degrees.tensor > 1:
            raise ValueError(
                f"[freezing] heads = true with tensor_parallel_degree = {degrees.tensor}: the heads "
                "are sharded over the ranks. Set heads = false"
            )
        needed = config.warmup_steps + sum(stage.steps or 1 for stage in parse_stages(config.stages))
        if config.stages and needed > settings.steps:
            raise ValueError(
                f"[freezing] stages need {needed} steps with the warm-up and one of the last stage, but "
                f"training.steps = {settings.steps}: shorten a stage, or raise training.steps"
            )
        if config.warmup_steps >= settings.steps:
            raise ValueError(
                f"[freezing] warmup_steps = {config.warmup_steps} leaves no step of training.steps = {settings.steps} "
                'in which modules could be frozen: lower it, or set policy = "off"'
            )

    @classmethod
    def check_data(cls, config: FreezingConfig, facts: DataFacts) -> None:
        needed = config.probe_groups * config.probe_examples
        if config.probes and needed > len(facts.dataset):
            raise ValueError(
                f"[freezing] probe_groups x probe_examples = {needed} is more than the {len(facts.dataset)} examples "
                "of data.path: lower one of them"
            )

    @classmethod
    def identity(cls, config: FreezingConfig, settings: RunSettings) -> dict[str, Any]:
        keys = ["seed", "probe", "probe_groups", "probe_examples"]
        if config.policy == "stages":
            keys += ["stages", "warmup_steps"]
        return {f"freezing.{key}": getattr(config, key) for key in keys}

    @classmethod
    def plan(cls, config: FreezingConfig, facts: DataFacts, *, num_ranks: int) -> Planned:
        return Planned((_schedule(config) + ".",) if config.stages else ())

    config: FreezingConfig

    def __init__(self, run: Run, config: FreezingConfig):
        super().__init__(run, config)
        (self.model,) = run.model_parts
        self.units = find_units(self.model, seq_len=run.settings.seq_len)
        self.stages = parse_stages(config.stages)
        self._check_model()
        sharded = run.mesh("fsdp") is not None
        self.account = FreezingAccount(
            self.units,
            batch_size=run.batch_size,
            microbatches=run.microbatches,
            reduced_bytes=run.settings.reduce_dtype.itemsize if sharded else 0,
        )
        self.freezer = Freezer(self.model, self.units)
        self.history = History(active=list(self.freezer.active))
        self.prober = Prober(
            run,
            self.units,
            kind="loss" if self.config.policy == "gradient_norm" else self.config.probe,
            groups=self.config.probe_groups,
            size=self.config.probe_examples,
            seed=self.config.seed,
            num_heads=cast(Any, self.model).model_args.n_heads if self.config.heads else 0,
        )
        self.heads: dict[str, list[float]] = {}
        self.train_seconds = 0.0
        self.log: JsonLines | None = None

    def _check_model(self) -> None:
        policy = self.config.policy
        if policy != "stages" and any(name.startswith(ALWAYS_TRAINED) for name, _ in self.model.named_parameters()):
            raise ValueError(
                f'[freezing] policy = "{policy}" with {self.run.settings.family}: its gates are trained in every step, '
                "so the gradient passes all layers, and its experts' layers cannot be probed. Set policy = "
                '"stages" or "off"'
            )
        has_experts = any(is_experts(layer) for unit in self.units for layer in unit.layers.values())
        if has_experts and self.config.probes and self.run.mesh("tp") is not None:
            raise ValueError(
                f'[freezing] policy = "{self.config.policy}" with experts and tensor_parallel_degree above 1: a probe '
                'needs whole tokens in the experts. Set tensor_parallel_degree = 1, or policy = "random"'
            )

    # -- steps ----------------------------------------------------------------------------------------------------

    def before_first_step(self) -> None:
        run, config, step = self.run, self.config, self.run.step()
        if is_first_rank():
            full = backward_flops(self.units) / 1e9
            if self.stages:
                logger.info(_schedule(config))
            else:
                logger.info(
                    f"Freezing: policy {config.policy}, {len(self.units)} modules, all active for "
                    f"{config.warmup_steps} steps. Then about {full * config.backward_share:,.3g} of {full:,.3g} "
                    "GFLOPs per example are kept in the backward pass, with a new decision every "
                    f"{config.interval} steps"
                )
            path, former = (
                run.settings.dump_folder / name / "decisions.jsonl" for name in (self.name, self.former_name)
            )
            if former.is_file() and not path.exists():  # written by an earlier version
                path.parent.mkdir(parents=True, exist_ok=True)
                former.rename(path)
            self.log = JsonLines(path, step=step)
        if self.stages:
            self.history.active = self._active_in(step + 1)
        if step > 0 and not all(self.history.active):
            self.freezer.first_forward(run)
        if run.settings.compiles_model and config.policy != "all":
            of_stages = [units_of_stage(self.units, stage) for stage in (None, *self.stages)]
            self.freezer.warm(run, of_stages if self.stages else None)
        self.freezer.apply(self.history.active)
        self.train_seconds = run.ledger.seconds["train"]

    def paused(self) -> AbstractContextManager[Any]:
        return self.freezer.all_active()

    def after_step(self) -> None:
        now = self.run.ledger.seconds["train"]
        self.account.step_done(self.freezer.active, seconds=now - self.train_seconds)
        self.train_seconds = now
        step, total = self.run.step(), self.run.settings.steps
        if step >= total:
            return
        if step >= total * (1 - self.config.final_fraction):
            if not all(self.history.active):
                self._apply([True] * len(self.units))
        elif self.stages:
            if (active := self._active_in(step + 1)) != self.history.active:
                self._apply(active)
        elif step >= self.config.warmup_steps and (step - self.config.warmup_steps) % self.config.interval == 0:
            with self.run.ledger.charge("probe"):
                self._decide()

    def _stage_in(self, step: int) -> int:
        return stage_of(self.stages, step, warmup_steps=self.config.warmup_steps)

    def _active_in(self, step: int) -> list[bool]:
        """Which modules the schedule trains in a step."""
        settings, number = self.run.settings, self._stage_in(step)
        if number < 0 or step > settings.steps * (1 - self.config.final_fraction):
            return [True] * len(self.units)
        return units_of_stage(self.units, self.stages[number])

    def _decide(self) -> None:
        """Probe the modules and apply a new decision. A collective of all ranks."""
        if self.config.probes:
            with self.freezer.all_active():
                measures = self.prober.measure()
            self.heads = measures.heads
            self.account.probed(self.config.probe_groups * self.config.probe_examples)
            by_norm = self.config.policy == "gradient_norm"
            self.history.update(measures.norms if by_norm else measures.eigenvalues, self.config)
        self._apply(decide(self.units, self.history, self.config))

    def _apply(self, active: list[bool]) -> None:
        """Set the active modules and write the decision to decisions.jsonl."""
        self.history.active = active
        self.freezer.apply(active)
        if self.log is not None:
            frozen = [unit.name for unit, on in zip(self.units, active, strict=True) if not on]
            smooth = {unit.name: value for unit, value in zip(self.units, self.history.smooth, strict=False)}
            record = {"step": self.run.step(), "frozen": frozen, "values": smooth}
            self.log.write(record | ({"heads": self.heads} if self.heads else {}))

    # -- logging --------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        history = self.history
        scalars = {panels.ACTIVE + unit.name: float(on) for unit, on in zip(self.units, history.active, strict=True)}
        if history.smooth:
            values = relative(self.units, history.smooth)
            scalars |= {panels.EIGENVALUE + unit.name: value for unit, value in zip(self.units, values, strict=True)}
        if self.stages:  # 0 in the warm-up
            scalars["freezing/stage"] = 1.0 + self._stage_in(self.run.step())
        return self.account.metrics() | scalars

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {
            "names": [unit.name for unit in self.units],
            "history": self.history.state(),
            "account": self.account.state(),
            "probe_seconds": self.run.ledger.seconds["probe"],
        }
        return {"state": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        loaded = json.loads(state["state"])
        if loaded["names"] != [unit.name for unit in self.units]:
            raise ValueError(
                "the checkpoint's [freezing] state has other modules than this model: it was written by another "
                "flavor. Set model.flavor to that one"
            )
        self.history = History(**loaded["history"])
        self.account.load(loaded["account"])
        self.run.ledger.seconds["probe"] = loaded["probe_seconds"]


def _schedule(config: FreezingConfig) -> str:
    """What "stages" trains, and for how long."""
    stages = (f"{one.part} for {one.steps or 'the remaining'} steps" for one in parse_stages(config.stages))
    return f"Freezing: all modules for {config.warmup_steps} steps, then {', then '.join(stages)}"
