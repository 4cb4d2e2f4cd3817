"""Run the real trainer under one parallelism after the other in one world of processes, and beside it a plain loop.

A cell is a dictionary of settings, "section.key" -> value, on top of ``SETTINGS``. :func:`train_cells` is what the
ranks run; :func:`train_plainly` trains the same model on the same examples in one process, with torch's own functions
for everything that the package cuts over ranks.
"""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_attent.titan.patches.compat import expert_counts_kept

import numpy as np
import torch
import torch.distributed as dist
from references import exact_norm
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.models import deepseek_v3, gpt_oss, llama3, llama4, qwen3
from torchtitan.models.moe import MoEArgs
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.chunked import chunked_weighted_cross_entropy
from titan_attent.systems.teaching.system import Teaching
from titan_attent.systems.teaching.teacher import Teacher
from titan_attent.titan.checks import preflight
from titan_attent.titan.models.hyla import HylaModelArgs
from titan_attent.titan.models.mot import MotArgs
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.trainer import TeachingTrainer

STEPS, SAVED = 3, 2
"""Steps of a run; the one after which a cell with checkpoints saves."""
SETTINGS: dict[str, Any] = {
    "model.name": "llama3_attent",
    "model.flavor": "cell",
    "training.local_batch_size": 8,
    "training.global_batch_size": 8,
    "training.seq_len": 32,
    "training.steps": STEPS,
    "training.mixed_precision_param": "float32",
    "training.max_norm": 0.5,  # below the norms that come up: the clipping is compared, too
    "optimizer.lr": 1e-2,
    "optimizer.eps": 1e-2,  # Adam divides rounding errors of small gradients by it
    "lr_scheduler.warmup_steps": 0,
    "lr_scheduler.decay_ratio": 0.0,
    "metrics.log_freq": 1,
    "activation_checkpoint.mode": "none",
    "comm.trace_buf_size": 0,
    "debug.seed": 0,
    "data.num_workers": 0,
    "teacher.strategy": "soft",
    "teacher.importance": "functional_gradient",
    "teacher.ratio_schedule": "constant",
    "teacher.interval_schedule": "incremental",
    "teacher.full_data_tail": 0.0,
    "validation.seq_len": 32,
    "validation.steps": -1,
    "checkpoint.interval": SAVED,
    "checkpoint.last_save_model_only": False,
}
EXPERTS = MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, score_func="softmax", use_grouped_mm=False)
LATE_SCORES = replace(EXPERTS, score_before_experts=False, num_shared_experts=2)
SMALL: dict[str, Any] = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 512}
QWEN3: dict[str, Any] = SMALL | {"n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}
FLAVORS: dict[str, dict[str, BaseModelArgs]] = {
    "llama3": {"cell": llama3.TransformerModelArgs(**SMALL, n_kv_heads=2, multiple_of=16, rope_theta=10000)},
    "llama4": {
        "cell": llama4.TransformerModelArgs(**SMALL, n_kv_heads=2, multiple_of=16, rope_theta=10000, moe_args=EXPERTS)
    },
    "qwen3": {
        "cell": qwen3.Qwen3ModelArgs(**QWEN3),
        "tied": qwen3.Qwen3ModelArgs(**QWEN3, enable_weight_tying=True),
        "moe": qwen3.Qwen3ModelArgs(**QWEN3, moe_enabled=True, moe_inter_dim=32, moe_args=EXPERTS),
    },
    "deepseek_v3": {
        "cell": deepseek_v3.DeepSeekV3ModelArgs(
            **SMALL,
            **{"inter_dim": 64, "moe_inter_dim": 32, "n_dense_layers": 1, "moe_args": LATE_SCORES},
            **{"q_lora_rank": 0, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        )
    },
    "mot": {"cell": MotArgs(**SMALL, n_kv_heads=2, multiple_of=16, rope_theta=10000)},
    "hyla": {
        "cell": HylaModelArgs(**SMALL, n_kv_heads=2, multiple_of=16, rope_theta=10000),
        "reference": HylaModelArgs(**SMALL, is_reference=True, head_dim=2, hidden_dim=64),
    },
    "gpt_oss": {
        "cell": gpt_oss.GptOssModelArgs(
            **SMALL,
            **{"n_kv_heads": 2, "head_dim": 8, "moe_inter_dim": 32, "sliding_window_size": 8, "moe_args": LATE_SCORES},
        )
    },
}
for _family, _flavors in FLAVORS.items():
    if _family in ("hyla", "mot"):
        continue  # the attention of one takes every mask, that of the other none
    _irope = {"every_n_layers_nope": 2, "fixed_attn_block_size": 8} if _family == "llama4" else {}
    _flavors["flex"] = replace(_flavors["cell"], attn_type="flex", **_irope)  # type: ignore[call-arg]

Settings = dict[str, Any]


def config_of(settings: Settings, *, data: str, folder: str) -> JobConfig:
    config = ConfigManager._merge_configs(JobConfig, OurSections)()
    paths = {"data.path": data, "data.validation_path": data, "job.dump_folder": folder}
    for key, value in (SETTINGS | paths | settings).items():
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


def write_data(folder: Path, tokenizer: str) -> Path:
    """A data set of 21 windows, two batches of 8 and a remainder of 5, of two sources in three spans."""
    text = (Path(json.__file__).parent / "scanner.py").read_text()
    inputs = []
    for name, part in (("code", text[:900]), ("other", text[900:1600]), ("code", text[1600:])):
        path = folder / f"{len(inputs)}.py"
        path.write_text(part)
        inputs.append(f"{name}={path}")
    write_dataset(inputs, output=folder / "data", tokenizer=tokenizer)
    return folder / "data"


class Float32GptOss(gpt_oss.GptOssModel):
    """torchtitan's own has bfloat16 layers whatever the configuration, too coarse to compare."""

    def __init__(self, model_args: gpt_oss.GptOssModelArgs):
        super().__init__(model_args)
        self.float()


_specs: dict[str, TrainSpec] = {}


def spec_of(name: str) -> TrainSpec:
    """The model's twin with a tiny flavor, registered once a process."""
    if name not in _specs:
        spec = attent_spec(name)
        _specs[name] = spec = replace(spec, model_cls=Float32GptOss) if name == "gpt_oss_attent" else spec
        flavors = FLAVORS[name.removesuffix("_attent")]
        halves = {f"{flavor} of 2": replace(args, n_layers=2) for flavor, args in flavors.items()}
        spec.model_args.update(copy.deepcopy(flavors | halves))
        register_train_spec(name, spec)
    return _specs[name]


def full(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().numpy().copy()


class Observed(TeachingTrainer):
    """Keeps what the loader gave and what torchtitan logs."""

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        input_dict = kwargs["input_dict"]
        ids = input_dict["example_id"]  # where nobody chooses, there is no column of weights
        self.served.append((full(ids), full(input_dict.get("weight", torch.ones(len(ids))))))
        return super().forward_backward_step(**kwargs)


def train_cell(settings: Settings, *, data: str, folder: str) -> dict[str, Any]:
    """One run of the trainer: what this rank saw and holds; from the checkpoint in ``folder`` when there is one."""
    config = config_of(settings, data=data, folder=folder)
    preflight.check_run(config, spec_of(config.model.name), world_size=dist.get_world_size())
    trainer = Observed(config)
    teaching = teaching_of(trainer)
    try:
        chunked = getattr(getattr(teaching, "weighted_loss", None), "func", None) is chunked_weighted_cross_entropy
        assert chunked == (config.teacher.loss_chunks > 1)
        logged: list[dict[str, float]] = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
        if not trainer.checkpointer.load():
            weights = plain_model(settings).state_dict()
            options = StateDictOptions(full_state_dict=True, strict=False)
            for part in trainer.model_parts:
                set_model_state_dict(part, {k: v.clone() for k, v in weights.items()}, options=options)
        batches = trainer.batch_generator(trainer.dataloader)
        steps = {}
        while trainer.step < STEPS:
            trainer.step += 1
            trainer.served = []
            trainer.train_step(batches)
            ids, example_weights = zip(*trainer.served, strict=True)
            step = {"ids": np.concatenate(ids), "weights": np.concatenate(example_weights), "metrics": logged[-1]}
            step["gradients"] = {
                plain_name(name): full(parameter.grad)
                for part in trainer.model_parts
                for name, parameter in part.named_parameters()
                if trainer.step in (1, STEPS)
            }
            steps[trainer.step] = step
            trainer.checkpointer.save(trainer.step)
        if teaching is not None:
            teaching.buffer.sync()
        result = {
            "steps": steps,
            "place": (trainer.dataloader.dp_rank, trainer.dataloader.dp_world_size, trainer.parallel_dims.cp),
            "buffer": {name: full(tensor) for name, tensor in teaching.buffer.state_dict().items()} if teaching else {},
            "experts": {
                plain_name(name): full(tensor)
                for part in trainer.model_parts
                for name, tensor in part.named_buffers()
                if name.endswith("expert_bias")
            },
        }
        counted = expert_counts(trainer)
        if config.validation.enable:
            trainer.validator.validate(trainer.model_parts, trainer.step)
            result["validated"] = logged[-1]
            result["validation"] = logged[-1]["validation_metrics/loss"]
            result["validation by source"] = by_source(logged[-1], "validation_metrics")
        if config.teacher.scoring != "train":
            assert teaching is not None
            teaching.score_examples(trainer.step, Pool.whole(len(trainer.dataloader.dataset)))
        assert expert_counts(trainer) == counted, "tokens that were not trained"
        return result
    finally:
        trainer.close()


def teaching_of(trainer: TeachingTrainer) -> Teaching | None:
    """The teacher's system; None where nobody chooses."""
    return next((system for system in trainer.systems if isinstance(system, Teaching)), None)


def expert_counts(trainer: TeachingTrainer) -> list[list[float]]:
    buffers = (buffer for part in trainer.model_parts for buffer in part.named_buffers())
    return [tensor.tolist() for name, tensor in buffers if name.endswith("tokens_per_expert")]


def by_source(metrics: dict[str, float], group: str) -> dict[str, float]:
    prefix = f"{group}/by_source/"
    return {tag.removeprefix(prefix): loss for tag, loss in metrics.items() if tag.startswith(prefix)}


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def train_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    """Every cell in turn, in the process group that is there; "folder" in a cell names another cell's."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    results = {}
    for name, settings in cells.items():
        place = str(Path(folder) / settings.get("folder", name))
        settings = {key: value for key, value in settings.items() if key != "folder"}
        results[name] = train_cell(settings, data=data, folder=place)
    return results


class NoMesh:
    """torchtitan's ParallelDims of one process, as far as its optimizers ask."""

    ep_enabled = False

    def get_optional_mesh(self, name: str) -> None:
        return None


def plain_model(settings: Settings) -> torch.nn.Module:
    """The stock model of a cell, whole, with weights that depend on names and shapes only."""
    config = config_of(settings, data="", folder="")
    spec = spec_of(config.model.name)
    args = copy.deepcopy(spec.model_args[config.model.flavor])
    args.update_from_config(config)
    model = spec.model_cls(args)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data = 1 + 0.1 * noise if name.endswith("norm.weight") else noise / parameter.shape[-1] ** 0.5
    return model


def token_losses(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses [B, L] of the tokens, with a graph, and functional gradients' norms [B], from the definitions."""
    masks = {}
    if getattr(model.model_args, "attn_type", "sdpa") == "flex":
        masks["attention_masks"] = model.get_attention_masks(inputs, None, {})
    logits = model(inputs, **masks)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    deviation = logits.detach().softmax(-1) - F.one_hot(labels, logits.shape[-1])
    return loss, deviation.square().sum(-1).mean(dim=1).sqrt()


def train_plainly(settings: Settings, *, data: str, device: str = "cpu") -> dict[str, Any]:
    """The README's loop over the same model class: one process, no torchtitan trainer, no mesh, no microbatches."""
    config = config_of(settings, data=data, folder="")
    model = plain_model(settings).to(device)
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    dataset = TokenDataset(data, seq_len=config.training.seq_len)
    everything = torch.arange(len(dataset))
    buffer = LossBuffer(len(dataset), device=torch.device(device), with_gradient=True)

    def losses_of(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return token_losses(model, *(tensor.to(device) for tensor in dataset.batch(ids)))

    def score(step: int, pool: Pool) -> None:
        with expert_counts_kept([model]), torch.no_grad():
            loss, norms = losses_of(everything)
        buffer.record(everything.to(device), loss.mean(dim=1), step=step, gradients=norms, trained=False)

    is_worst_case = config.teacher.weighting == "worst_case"
    teaching = replace(config.teacher, weighting="none") if is_worst_case else config.teacher
    teacher = Teacher(buffer, teaching, batch_size=8, total_steps=STEPS, score=score)
    without_buffer, steps = config.teacher.strategy == "uniform" and not is_worst_case, {}
    for step, (ids, weights) in zip(range(1, STEPS + 1), TeachingSampler(teacher), strict=False):
        loss, norms = losses_of(ids)
        optimizers.zero_grad()
        trained = (loss.mean(dim=1) * weights.to(device)).mean()
        if is_worst_case:
            trained = loss.mean(dim=1).pow(config.teacher.q).mean().pow(1 / config.teacher.q)
        trained.backward()
        norm = torch.tensor(exact_norm(parameter.grad for parameter in model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, norm)
        gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
        seen = {"ids": ids, "weights": weights, "losses": loss.detach(), "norm": norm, "trained": trained.detach()}
        steps[step] = {name: full(tensor) for name, tensor in seen.items()} | {"gradients": gradients}
        optimizers.step()
        if not without_buffer:
            buffer.record(ids.to(device), loss.detach().mean(dim=1), step=step, gradients=norms)
        teacher.step_done()
    buffer.sync()
    with torch.no_grad():
        validation = full(losses_of(everything)[0])
    source_of = np.array([name for name, _ in dataset.sources])[
        np.searchsorted([first for _, first in dataset.sources], everything.numpy(), side="right") - 1
    ]

    def means(ids: np.ndarray, losses: np.ndarray) -> dict[str, float]:
        if len(set(source_of)) < 2:
            return {}
        return {str(name): losses[source_of[ids] == name].mean() for name in set(source_of[ids])}

    for step in steps.values():
        step["by source"] = means(step["ids"], step["losses"])
    return {
        "steps": steps,
        "buffer": {} if without_buffer else {name: full(tensor) for name, tensor in buffer.state_dict().items()},
        "experts": {name: full(tensor) for name, tensor in model.named_buffers() if name.endswith("expert_bias")},
        "validation": validation.mean(),
        "validation by source": means(everything.numpy(), validation),
    }
