"""[distillation] in every parallelism against a plain loop: the same sources, losses and gradients at every step.

The windows have unequal numbers of valid labels, so that ranks and microbatches do, too. Student and source differ in
their layers, and the source changes between steps 2 and 3. Each world is started once.
"""

import copy
import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.parallel_world import FLAVORS, STEPS, NoMesh, Settings, config_of, plain_model, spec_of, train_cells
from distributed.spawn import run_on_ranks
from references import exact_norm
from torch import Tensor
from torch.nn import functional as F
from torchtitan.models.llama3 import llama3_args

from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.target_draws import draw_targets
from titan_attent.scores.targets import StoredTargets, TargetFacts, TargetsWriter, tokenizer_facts
from titan_attent.systems.distillation.sources import metadata_hash

CHANGE = 3
"""The first step that learns from the second source."""
SOURCES = {10: 0.6, 20: 1.4}
"""Checkpoint of the source -> factor of its weights."""

whole_batch = TokenDataset.batch


def masked_batch(self: TokenDataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Between 2 and 32 valid labels, by the example."""
    inputs, labels = whole_batch(self, ids)
    first = torch.tensor([i * 11 % 31 for i in ids.tolist()])
    return inputs, labels.masked_fill(torch.arange(labels.shape[1]) < first[:, None], IGNORE_INDEX)


def distill_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    TokenDataset.batch = masked_batch  # type: ignore[method-assign]
    llama3_args.update(copy.deepcopy(FLAVORS["llama3"]))
    try:
        return train_cells(mesh, cells, data, folder)
    finally:
        TokenDataset.batch = whole_batch  # type: ignore[method-assign]


def degrees(**degrees: int) -> Settings:
    return {f"parallelism.{name}_degree": degree for name, degree in degrees.items()}


def cell(size: int, *others: Settings) -> Settings:
    """A cell with ``size`` examples per microbatch and rank, with the teacher off unless a setting turns it on."""
    settings: Settings = {
        "training.local_batch_size": size,
        "model.flavor": "cell of 2",
        "teacher.strategy": "uniform",
        "distillation.schedule": "at",
        "distillation.at": f"1:10 {CHANGE}:20",
        "distillation.flavor": "cell",
        "distillation.label_weight": 0.25,
    }
    for other in others:
        settings |= other
    return settings


TP, PP, CP = (degrees(**{f"{name}_parallel": 2}) for name in ("tensor", "pipeline", "context"))
DDP = degrees(data_parallel_replicate=2, data_parallel_shard=1)
TAUGHT: Settings = {"teacher.strategy": "soft"}
BOTH: Settings = {"distillation.temperature": 2.0, "distillation.softened": "both"}
ARGMAX: Settings = {"distillation.temperature": 0.0}
ALONE: Settings = {"distillation.label_weight": 0.0}
LINEAR: Settings = {"distillation.label_weight_schedule": "linear", "distillation.final_label_weight": 1.0}
SAVED: Settings = {"checkpoint.enable": True}
TARGETS: Settings = {"distillation.targets": "targets"}
READ_AHEAD: Settings = {"data.num_workers": 2}
UNBALANCED: Settings = {"parallelism.context_parallel_load_balancer": None}
MICROBATCHES_OF_2: Settings = {"parallelism.pipeline_parallel_microbatch_size": 2}

CELLS: dict[int, dict[str, Settings]] = {
    2: {
        "FSDP, accumulated, taught": cell(2, TAUGHT, BOTH),
        "FSDP, loss in chunks": cell(4, TAUGHT, {"teacher.loss_chunks": 3}),
        "DDP, accumulated, source alone": cell(2, DDP, ALONE),
        "TP, both softened": cell(8, TP, BOTH, TAUGHT),
        "TP, accumulated, argmax": cell(4, TP, ARGMAX),
        "TP, whole logits": cell(8, TP, BOTH, {"parallelism.disable_loss_parallel": True}),
        "PP, microbatches of 1": cell(8, PP, TAUGHT),
        "PP, accumulated, microbatches of 2": cell(4, PP, BOTH, MICROBATCHES_OF_2),
        "CP": cell(8, CP, TAUGHT),
        "CP, accumulated, not balanced": cell(4, CP, UNBALANCED, LINEAR),
        "CP, targets on disk": cell(8, CP, TARGETS),
        "PP, accumulated, targets on disk": cell(4, PP, TARGETS),
        "FSDP, accumulated, targets on disk": cell(2, TARGETS, READ_AHEAD),
        "FSDP, saved": cell(4, SAVED, LINEAR),
        "TP, resumed from FSDP": cell(8, TP, SAVED, LINEAR, {"folder": "FSDP, saved"}),
    },
    4: {
        "HSDP": cell(2, TAUGHT, degrees(data_parallel_replicate=2, data_parallel_shard=2)),
        "TP + PP": cell(8, TP, PP, BOTH),
        "PP + CP, argmax": cell(8, PP, CP, ARGMAX),
        "FSDP + TP, resumed from FSDP": cell(4, TP, SAVED, LINEAR, {"folder": "FSDP, saved"}),
    },
}


class Measured:
    def __init__(self, folder: Path, tokenizer: Path):
        self.folder, self.data = folder, folder / "data"
        write_dataset([Path(json.__file__).parent / "scanner.py"], output=self.data, tokenizer=str(tokenizer))
        self.worlds: dict[int, list[dict]] = {}
        self.source = folder / "source"
        for step in SOURCES:
            dcp.save(source_model(step).state_dict(), checkpoint_id=self.source / f"step-{step}", no_dist=True)
        self.targets = folder / "targets"
        self.write_targets()

    def cell(self, size: int, name: str) -> list[dict[str, Any]]:
        if size == 4:
            self.cell(2, "FSDP, saved")  # which cells of the larger world resume
        if size not in self.worlds:
            cells = {name: self.with_folders(settings) for name, settings in CELLS[size].items()}
            self.worlds[size] = run_on_ranks(
                distill_cells, size, cells, str(self.data), str(self.folder), timeout=400.0
            )
        return [rank[name] for rank in self.worlds[size]]

    def with_folders(self, settings: Settings) -> Settings:
        settings = settings | {"distillation.source": str(self.source)}
        if "distillation.targets" in settings:
            settings["distillation.targets"] = str(self.targets)
        return settings

    def write_targets(self) -> None:
        dataset = TokenDataset(self.data, seq_len=32)
        for step in SOURCES:
            facts = TargetFacts(
                **dataset.scored._asdict(),
                tokenizer=tokenizer_facts(dataset.shards.tokenizer_info),
                model="llama3_attent cell",
                precision="float32",
                checkpoint="",
                checkpoint_sha256=metadata_hash(self.source / f"step-{step}"),
                kind="draws",
                num=4,
                temperature=1.0,
                seed=0,
            )
            writer, tokens = TargetsWriter(self.targets / f"step-{step}", facts=facts), torch.arange(len(dataset) * 32)
            logits = source_model(step)(whole_batch(dataset, torch.arange(len(dataset)))[0])
            ids = draw_targets(logits.flatten(0, 1), tokens, num=4, temperature=1.0, seed=0)
            with writer.prepared():
                writer.write(0, ids.view(len(dataset), 32, 4), None)
                writer.durable(len(dataset))


@pytest.fixture(scope="module")
def measured(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("distillation"), token_data["train"] / "tokenizer.tiktoken")


def source_model(step: int) -> torch.nn.Module:
    model = plain_model({"model.flavor": "cell"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SOURCES[step])
    return model.requires_grad_(False)


def plain_divergence(student: Tensor, source: Tensor, settings: Settings) -> Tensor:
    """Of each token [B, L], from the definition."""
    t = settings.get("distillation.temperature", 1.0)
    if t == 0.0:
        return F.cross_entropy(student.transpose(1, 2), source.argmax(-1), reduction="none")
    of_student = t if settings.get("distillation.softened") == "both" else 1.0
    log_p, log_q = (source.double() / t).log_softmax(-1), (student.double() / of_student).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * of_student**2


def train_plainly(
    settings: Settings, served: dict[int, tuple[Tensor, Tensor]], measured: Measured
) -> dict[int, dict[str, Any]]:
    """One process, whole batches: the loss of every step on the examples and weights that a cell was served."""
    data = str(measured.data)
    config = config_of(settings, data=data, folder="")
    model = plain_model(settings)
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    dataset, steps = TokenDataset(data, seq_len=config.training.seq_len), {}
    for step in range(1, STEPS + 1):
        ids, weights = served[step]
        inputs, labels = masked_batch(dataset, ids)
        valid = labels != IGNORE_INDEX
        logits = model(inputs)
        a = settings["distillation.label_weight"]
        if settings.get("distillation.label_weight_schedule") == "linear":
            a += (1.0 - a) * (step - 1) / (STEPS - 1)
        checkpoint = 20 if step >= CHANGE else 10
        label_losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
        if "distillation.targets" in settings:
            targets, _ = StoredTargets(measured.targets / f"step-{checkpoint}").read(ids)
            divergences = -logits.log_softmax(-1).gather(-1, targets.long()).mean(-1)
        else:
            divergences = plain_divergence(logits, source_model(checkpoint)(inputs), settings)
        divergences = torch.where(valid, divergences, 0.0)
        of_examples = (a * label_losses + (1 - a) * divergences).sum(dim=1)
        optimizers.zero_grad()
        ((of_examples * weights).sum() / valid.sum()).backward()
        norm = torch.tensor(exact_norm(parameter.grad for parameter in model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, norm)
        steps[step] = {
            "norm": norm.item(),
            "loss": (label_losses.sum() / valid.sum()).item(),
            "divergence": (divergences.sum() / valid.sum()).item(),
            "label_weight": a,
            "gradients": {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()},
        }
        optimizers.step()
    return steps


def served_by(ranks: list[dict[str, Any]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Step -> ids and weights of the global batch."""
    by_place = {rank["place"][0]: rank for rank in ranks}
    return {
        step: tuple(
            torch.from_numpy(np.concatenate([by_place[place]["steps"][step][key] for place in sorted(by_place)]))
            for key in ("ids", "weights")
        )
        for step in ranks[0]["steps"]
    }  # type: ignore[return-value]


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cells in CELLS.items() for name in cells])
def test_parallel_distillation_is_plain_distillation(measured: Measured, size: int, name: str) -> None:
    settings, ranks = CELLS[size][name], measured.cell(size, name)
    served = served_by(ranks)
    if "folder" in settings:  # resumed after step 3, under another parallelism and number of ranks
        served = served_by(measured.cell(2, "FSDP, saved")) | served
        assert ranks[0]["steps"].keys() == {STEPS}
        settings = {key: value for key, value in settings.items() if key != "folder"}
    expected = train_plainly(settings, served, measured)
    for rank in ranks:
        for step, seen in rank["steps"].items():
            plain, metrics = expected[step], seen["metrics"]
            assert metrics["loss_metrics/global_avg_loss"] == pytest.approx(plain["loss"], rel=1e-5), step
            assert metrics["grad_norm"] == pytest.approx(plain["norm"], rel=1e-4), step
            assert metrics["distillation/source_step"] == (20 if step >= CHANGE else 10)
            assert metrics["distillation/label_weight"] == pytest.approx(plain["label_weight"])
            if "distillation/divergence" in metrics and plain["label_weight"] < 1:  # of the step before
                assert metrics["distillation/divergence"] == pytest.approx(expected[step - 1]["divergence"], rel=1e-4)
            assert ("distillation/divergence" in metrics) == (step > min(rank["steps"]))
            for parameter, gradient in seen["gradients"].items():
                reference = plain["gradients"][parameter]
                error = np.abs(gradient - reference).max() / np.abs(reference).max()
                assert error < 1e-4, f"step {step}, {parameter}"
