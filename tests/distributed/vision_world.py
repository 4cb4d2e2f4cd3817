"""Run the real trainer on images under one parallelism after the other, and beside it a plain loop.

As parallel_world.py does for text; a cell is a dictionary of settings on top of ``SETTINGS``.
"""

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed.parallel_world import NoMesh, Observed, config_of, full, plain_name, teaching_of
from distributed.syncs import CountSyncs, from_forward_to_optimizer
from references import exact_norm
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.losses.buffer import LossBuffer
from titan_attent.systems.teaching.teacher import Teacher
from titan_attent.titan.checks import preflight
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.families import family_of
from titan_attent.titan.models.vision import FLAVORS, args_of
from titan_attent.titan.train_spec import attent_spec

STEPS = 4
SETTINGS: dict[str, Any] = {
    "model.name": "vit_attent",
    "model.flavor": "cell",
    "training.steps": STEPS,
    "training.local_batch_size": 4,
    "training.global_batch_size": 8,
    "vision.patch_size": 4,
    "vision.crop_scale": 0.5,
    "vision.flip": 0.5,
    "vision.drop_path": 0.3,
    "vision.label_smoothing": 0.1,
    "validation.enable": True,
    "validation.local_batch_size": 4,
    "data.num_workers": 0,
}
Settings = dict[str, Any]


def job_config(settings: Settings, *, data: str, folder: str = "") -> JobConfig:
    return config_of(SETTINGS | settings, data=data, folder=folder)


def bare(name: str) -> str:
    """Of a parameter that may be checkpointed and compiled."""
    return plain_name(name).replace("_orig_mod.", "")


def watched(trainer: Observed, syncs: CountSyncs) -> AbstractContextManager[Any]:
    """A step that is not compiled has its waits counted; of compiled ones only the first may compile."""
    if not trainer.job_config.compile.enable:
        return from_forward_to_optimizer(trainer, syncs)
    return torch.compiler.set_stance("fail_on_recompile") if trainer.step > 1 else nullcontext()


@cache
def spec_of(name: str) -> TrainSpec:
    """The spec with a flavor of two layers, registered once a process."""
    for flavors in FLAVORS.values():
        flavors["cell"] = replace(flavors["tiny"], n_layers=2)
    spec = attent_spec(name)
    register_train_spec(name, spec)
    return spec


def plain_model(config: JobConfig) -> torch.nn.Module:
    """The model, whole, with weights that depend on names and shapes only."""
    model = spec_of(config.model.name).model_cls(args_of(config))
    model.init_weights(buffer_device=torch.device("cpu"))
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.5 * noise / parameter.shape[-1] ** 0.5
    return model


def train_cell(settings: Settings, *, data: str, folder: str) -> dict[str, Any]:
    """One run of the trainer: what this rank saw and holds."""
    config = job_config(settings, data=data, folder=folder)
    spec = spec_of(config.model.name)
    preflight.check_run(config, spec, world_size=dist.get_world_size())
    trainer = Observed(config)
    teaching = teaching_of(trainer)
    try:
        logged: list[dict[str, float]] = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
        weights = {name: value.clone() for name, value in plain_model(config).state_dict().items()}
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(trainer.model_parts[0], weights, options=options)
        batches, steps, syncs = trainer.batch_generator(trainer.dataloader), {}, CountSyncs()
        while trainer.step < STEPS:
            trainer.step += 1
            trainer.served = []
            with watched(trainer, syncs):
                trainer.train_step(batches)
            ids, example_weights = zip(*trainer.served, strict=True)
            gradients = {bare(n): full(p.grad) for n, p in trainer.model_parts[0].named_parameters()}
            steps[trainer.step] = {
                "ids": np.concatenate(ids),
                "weights": np.concatenate(example_weights),
                "metrics": logged[-1],
                "gradients": gradients,
            }
        if teaching is not None:
            teaching.buffer.sync()
        trainer.validator.validate(trainer.model_parts, trainer.step)
        return {
            "steps": steps,
            "place": (trainer.dataloader.dp_rank, trainer.dataloader.dp_world_size),
            "syncs": dict(syncs.seen),
            "buffer": {name: full(tensor) for name, tensor in teaching.buffer.state_dict().items()} if teaching else {},
            "validation": logged[-1],
        }
    finally:
        trainer.close()


def train_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    """Every cell in turn, in the process group that is there."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    places = {name: str(Path(folder) / name) for name in cells}
    return {name: train_cell(settings, data=data, folder=places[name]) for name, settings in cells.items()}


def _losses(
    model: torch.nn.Module, batch: Any, config: JobConfig, *, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each image, with a graph; its functional gradient's norm), from the definitions."""
    inputs, labels = dict(batch[0]), batch[1]
    other_labels, share = inputs.pop("other_label", labels[:, 0]), inputs.pop("share", torch.ones(len(labels)))
    inputs.pop("other_id", None)
    pred = model(inputs.pop("input"), **inputs)
    if config.model.name == "mae_attent":
        deviation = pred - labels
        loss = deviation.square().flatten(1).mean(dim=1)
    else:
        classes = pred.shape[-1]
        first, other = (F.one_hot(numbers, classes) for numbers in (labels[:, 0], other_labels))
        targets = (1 - smoothing) * (share[:, None] * first + (1 - share[:, None]) * other) + smoothing / classes
        loss = -(targets * pred[:, 0].log_softmax(-1)).sum(-1)
        return loss, (pred[:, 0].softmax(-1) - targets).detach().norm(dim=-1)
    return loss, deviation.detach().square().flatten(1).mean(dim=1).sqrt()


def train_plainly(settings: Settings, *, data: str) -> dict[str, Any]:
    """A plain loop over the same model class: one process, no trainer, no mesh, no microbatches."""
    config = job_config(settings, data=data)
    model, kind, datasets = plain_model(config), family_of(config).modality, DataSets()
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    examples = kind.open(datasets, config)
    everything = torch.arange(len(examples))
    mixes, smoothing = config.vision.mixes, config.vision.label_smoothing
    buffer = LossBuffer(len(examples), device="cpu", with_gradient=True, with_shares=mixes)

    def score(step: int, pool: Pool) -> None:
        with torch.no_grad():
            losses, norms = _losses(model.eval(), examples.read(everything), config, smoothing=smoothing)
        model.train()
        shares = torch.ones(len(examples)) if mixes else None
        buffer.record(everything, losses, step=step, gradients=norms, shares=shares, trained=False)

    blind = np.log(6)
    teacher = Teacher(buffer, config.teacher, batch_size=8, total_steps=STEPS, score=score, chance_loss=blind)
    sampler, steps, step = TeachingSampler(teacher), {}, 0
    while step < STEPS:
        current, start = sampler.current_pass(), sampler.consumed
        weighted = sampler.local_weights(current, start=start)
        for (batch, part), weights in zip(sampler.local_microbatches(current, start=start), weighted, strict=True):
            if step == STEPS:
                break
            step += 1
            ids = sampler.local_ids(current, batch, part)
            read = examples.read(ids, current.visit_key)
            losses, norms = _losses(model, read, config, smoothing=smoothing)
            optimizers.zero_grad()
            (losses * weights).mean().backward()
            norm = exact_norm(parameter.grad for parameter in model.parameters())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, torch.tensor(norm))
            gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
            steps[step] = {
                "ids": ids.numpy(),
                "weights": weights.numpy(),
                "losses": full(losses),
                "norm": norm,
                "gradients": gradients,
            }
            optimizers.step()
            sampler.batch_consumed()
            known, shares = losses.detach(), None
            if mixes:
                ids = torch.stack((ids, read[0]["other_id"]), dim=1).flatten()
                shares = torch.stack((read[0]["share"], 1 - read[0]["share"]), dim=1).flatten()
                known, norms = known.repeat_interleave(2), norms.repeat_interleave(2)
            if config.teacher.strategy != "uniform":
                buffer.record(ids, known, step=step, gradients=norms, shares=shares)
            teacher.step_done()
    buffer.sync()
    examples = kind.open(datasets, config, validation=True)
    with torch.no_grad():
        inputs, labels = batch = examples.read(torch.arange(len(examples)))
        result = {"loss": _losses(model.eval(), batch, config, smoothing=0.0)[0].mean().item()}
        if config.model.name == "vit_attent":
            ranks = model(inputs["input"])[:, 0].argsort(dim=-1, descending=True)
            result["accuracy"] = (ranks[:, 0] == labels[:, 0]).double().mean().item()
            result["accuracy_top5"] = (ranks[:, :5] == labels).any(dim=1).double().mean().item()
    return {
        "steps": steps,
        "buffer": {name: full(tensor) for name, tensor in copy.copy(buffer.state_dict()).items()},
        "validation": result,
    }
