"""Run the real trainer for a few steps and keep gradients, collectives and scalars."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch.distributed as dist
from distributed.parallel_world import Settings, config_of, full, plain_model, plain_name, spec_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from titan_attent.systems.highway.system import Highway
from titan_attent.titan.checks import preflight
from titan_attent.titan.trainer import TeachingTrainer

COMMON: Settings = {
    "teacher.strategy": "random",
    "teacher.warmup_passes": 0,
    "teacher.initial_ratio": 1.0,
    "checkpoint.interval": 3,
    "highway.exact_fraction": 0.0,
    "training.max_norm": 1e9,
}


def highway(iterations: int, **keys: Any) -> Settings:
    settings = {"method": "highway", "cut": "block", "iterations": iterations} | keys
    return {f"highway.{key}": value for key, value in settings.items()}


def environment() -> None:
    """Set this rank's environment variables; without a process group, create one of a single process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Count the gathers and reductions that FSDP2 starts inside the context."""
    seen: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(_fsdp_param_group, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        return call

    patches = [
        mock.patch.object(_fsdp_param_group, name, counting(name)) for name in ("foreach_all_gather", "foreach_reduce")
    ]
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in patches:
            patch.stop()


def train(settings: Settings, *, data: str, folder: str, steps: int = 2) -> dict[str, Any]:
    """Train, and return all gradients and scalars, the last step's collectives, and the system's state."""
    environment()
    config = config_of(COMMON | {"training.steps": steps} | settings, data=data, folder=folder)
    spec = spec_of(config.model.name)
    preflight.check_run(config, spec, world_size=int(os.environ["WORLD_SIZE"]))
    trainer = TeachingTrainer(config)
    try:
        logged: list[dict[str, float]] = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
        if not trainer.checkpointer.load():
            weights = plain_model(settings_of_model(settings)).state_dict()
            options = StateDictOptions(full_state_dict=True, strict=False)
            for part in trainer.model_parts:
                set_model_state_dict(part, {k: v.clone() for k, v in weights.items()}, options=options)
        batches = trainer.batch_generator(trainer.dataloader)
        gradients: dict[int, dict[str, np.ndarray]] = {}
        while trainer.step < steps:
            trainer.step += 1
            with counted_collectives() as seen:
                trainer.train_step(batches)
            gradients[trainer.step] = {
                plain_name(name).replace("_orig_mod.", ""): full(parameter.grad)
                for part in trainer.model_parts
                for name, parameter in part.named_parameters()
                if parameter.grad is not None
            }
            trainer.checkpointer.save(trainer.step)
        systems = [system for system in trainer.systems if isinstance(system, Highway)]
        state = {key: np.asarray(getattr(system, key)).copy() for system in systems for key in ("rounds", "gains")}
        return {"gradients": gradients, "logged": logged, "collectives": dict(seen), "state": state}
    finally:
        trainer.close()


def settings_of_model(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key.startswith("model.")}


def train_all(mesh: Any, runs: dict[str, Settings], data: str, folder: str) -> dict[str, Any]:
    """Do every run in turn in the current process group. A run may set its own "folder" and "steps"."""
    found = {}
    for name, settings in runs.items():
        config = {key: value for key, value in settings.items() if "." in key}
        dump = f"{folder}/{settings.get('folder', name)}"
        found[name] = train(config, data=data, folder=dump, steps=settings.get("steps", 2))
    return found
