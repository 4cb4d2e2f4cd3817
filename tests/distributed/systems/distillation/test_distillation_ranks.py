"""[distillation] in every parallelism against a plain loop: the same sources, losses and gradients at every step.

The windows have unequal numbers of valid labels, so that ranks and microbatches do, too. Student and source differ in
their layers, and the source changes between steps 1 and 2. Each world is started once.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.cells import Cells, Worlds, chosen, merged, parameters
from distributed.parallel_world import FLAVORS, STEPS, NoMesh, Settings, config_of, plain_model, spec_of, train_cells
from references import exact_norm
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.qwen3 import qwen3_args

from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses import divergence
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.target_draws import draw_targets
from titan_attent.scores.targets import StoredTargets, TargetFacts, TargetsWriter, facts_of_data, window_places
from titan_attent.systems.distillation import system
from titan_attent.systems.distillation.sources import metadata_hash
from titan_attent.titan.frozen_model import FrozenModel

CHANGE = 2
"""The first step that learns from the second source."""
SOURCES = {10: 0.6, 20: 1.4}
"""Checkpoint of the source -> factor of its weights."""

whole_batch = TokenDataset.batch


def masked_batch(self: TokenDataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Between 2 and 32 valid labels, by the example."""
    inputs, labels = whole_batch(self, ids)
    first = torch.tensor([i * 11 % 31 for i in ids.tolist()])
    return inputs, labels.masked_fill(torch.arange(labels.shape[1]) < first[:, None], IGNORE_INDEX)


class CountGathers(TorchDispatchMode):
    """Counts the all-gathers while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_allgather_base_", "all_gather_into_tensor")
        return func(*args, **(kwargs or {}))


def distill_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    """The results of the cells; of each, too, what its passes of the source and its divergences gathered."""
    calls: list[tuple[str, int, bool]] = []

    def counted(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*args: Any, **kwargs: Any) -> Tensor:
            with CountGathers() as gathers:
                result = call(*args, **kwargs)
            calls.append((name, gathers.count, result.requires_grad))
            return result

        return counting

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenDataset, "batch", masked_batch)
        patch.setattr(divergence, "CHUNK_NUMBERS", 512 * 5)  # chunks of five tokens
        patch.setitem(llama3_args, "cell", copy.deepcopy(FLAVORS["llama3"]["cell"]))
        patch.setitem(qwen3_args, "moe", copy.deepcopy(FLAVORS["qwen3"]["moe"]))
        for name, settings in cells.items():
            calls.clear()
            with patch.context() as counters:
                if "compile.enable" not in settings:  # nothing is compiled below a mode that sees every operator
                    counters.setattr(FrozenModel, "__call__", counted("source", FrozenModel.__call__))
                    counters.setattr(system, "kl_divergence", counted("divergence", system.kl_divergence))
                results |= train_cells(mesh, {name: settings}, data, folder)
            results[name]["calls"] = list(calls)
    return results


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


TP, PP, CP, EP = (degrees(**{f"{name}_parallel": 2}) for name in ("tensor", "pipeline", "context", "expert"))
DDP = degrees(data_parallel_replicate=2, data_parallel_shard=1)
TAUGHT: Settings = {"teacher.strategy": "soft"}
BOTH: Settings = {"distillation.temperature": 2.0, "distillation.softened": "both"}
ARGMAX: Settings = {"distillation.temperature": 0.0}
ALONE: Settings = {"distillation.label_weight": 0.0}
LINEAR: Settings = {"distillation.label_weight_schedule": "linear", "distillation.final_label_weight": 1.0}
SAVED: Settings = {"checkpoint.enable": True}
TARGETS: Settings = {"distillation.targets": "targets"}
VALIDATED: Settings = {"validation.enable": True, "validation.local_batch_size": 8}
READ_AHEAD: Settings = {"data.num_workers": 2}
COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager"}
EXPERTS: Settings = {"distillation.family": "qwen3", "distillation.flavor": "moe"}
UNBALANCED: Settings = {"parallelism.context_parallel_load_balancer": None}
MICROBATCHES_OF_2: Settings = {"parallelism.pipeline_parallel_microbatch_size": 2}

CELLS: Cells = {
    2: {
        "FSDP, accumulated, taught": cell(2, TAUGHT, BOTH),
        "FSDP, loss in chunks": cell(4, TAUGHT, {"teacher.loss_chunks": 3}),
        "DDP, accumulated, source alone": cell(2, DDP, ALONE),
        "TP, both softened": cell(8, TP, BOTH, TAUGHT),
        "TP, accumulated, argmax": cell(4, TP, ARGMAX),
        "PP, microbatches of 1": cell(8, PP, TAUGHT, VALIDATED),
        "PP, accumulated, microbatches of 2": cell(4, PP, BOTH, MICROBATCHES_OF_2),
        "TP, accumulated, targets on disk": cell(4, TP, TARGETS),
        "CP": cell(8, CP, TAUGHT),
        "CP, accumulated, not balanced": cell(4, CP, UNBALANCED, LINEAR),
        "PP, accumulated, targets on disk": cell(4, PP, TARGETS),
        "FSDP, accumulated, targets on disk": cell(2, TARGETS, READ_AHEAD),
        "EP, a source of experts": cell(4, EP, EXPERTS),
        "FSDP, saved": cell(4, SAVED, LINEAR),
        "TP, resumed from FSDP": cell(8, TP, SAVED, LINEAR, {"folder": "FSDP, saved"}),
    },
    4: {
        "HSDP": cell(2, TAUGHT, degrees(data_parallel_replicate=2, data_parallel_shard=2)),
        "FSDP + TP, resumed from FSDP": cell(4, TP, SAVED, LINEAR, {"folder": "FSDP, saved"}),
    },
}
MORE: Cells = {
    2: {
        "TP, whole logits": cell(8, TP, BOTH, {"parallelism.disable_loss_parallel": True}),
        "CP, targets on disk": cell(8, CP, TARGETS),
        "FSDP, compiled, both softened": cell(4, COMPILED, BOTH),
    },
    4: {
        "TP + PP": cell(8, TP, PP, BOTH),
        "PP + CP, argmax": cell(8, PP, CP, ARGMAX),
    },
}
ALL = merged(CELLS, MORE)


class Measured(Worlds):
    """With the checkpoints of the sources and their targets on disk."""

    def __init__(self, folder: Path, tokenizer: Path, cells: Cells):
        self.source, self.targets = folder / "source", folder / "targets"
        cells = {
            size: {name: self.with_folders(settings, folder) for name, settings in named.items()}
            for size, named in cells.items()
        }
        super().__init__(distill_cells, cells, data=folder / "data", folder=folder)
        write_dataset([Path(json.__file__).parent / "scanner.py"], output=self.data, tokenizer=str(tokenizer))
        for step in SOURCES:
            for place, settings in ((self.source, {}), (folder / "experts", EXPERTS)):
                model = source_model(step, settings)
                dcp.save(model.state_dict(), checkpoint_id=place / f"step-{step}", no_dist=True)
        self.write_targets()

    def cell(self, size: int, name: str) -> list[dict[str, Any]]:
        if size == 4:
            super().cell(2, "FSDP, saved")  # which cells of the larger world resume
        return super().cell(size, name)

    def with_folders(self, settings: Settings, folder: Path) -> Settings:
        source = folder / "experts" if "distillation.family" in settings else self.source
        settings = settings | {"distillation.source": str(source)}
        if "distillation.targets" in settings:
            settings["distillation.targets"] = str(self.targets)
        return settings

    def write_targets(self) -> None:
        dataset = TokenDataset(self.data, seq_len=32)
        for step in SOURCES:
            facts = TargetFacts(
                **facts_of_data(dataset),
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
            logits = source_model(step, {})(whole_batch(dataset, torch.arange(len(dataset)))[0])
            ids = draw_targets(logits.flatten(0, 1), tokens, num=4, temperature=1.0, seed=0)
            with writer.prepared():
                places = window_places(torch.arange(len(dataset)), seq_len=32)
                writer.write(places, ids.view(len(dataset), 32, 4), None)
                writer.durable(len(dataset), num_records=facts.num_records)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    tokenizer = token_data["train"] / "tokenizer.tiktoken"
    return Measured(tmp_path_factory.mktemp("distillation"), tokenizer, chosen(request, CELLS, MORE))


def source_model(step: int, settings: Settings) -> torch.nn.Module:
    family = settings.get("distillation.family", "llama3")
    model = plain_model({"model.name": f"{family}_attent", "model.flavor": settings.get("distillation.flavor", "cell")})
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
    settings: Settings,
    served: dict[int, tuple[Tensor, Tensor]],
    measured: Measured,
    *,
    num_steps: int = STEPS,
    source_fault: Callable[[Tensor], Tensor] = lambda logits: logits,
    sum_fault: Callable[[Tensor, Tensor], Tensor] = lambda divergences, valid: divergences,
) -> dict[int, dict[str, Any]]:
    """One process, whole batches: the loss of every step on the examples and weights that a cell was served.

    Args:
        source_fault, sum_fault: change the source's logits, or the divergences [B, L], as a faulty implementation does.
    """
    data = str(measured.data)
    config = config_of(settings, data=data, folder="")
    model = plain_model(settings)
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    dataset, steps = TokenDataset(data, seq_len=config.training.seq_len), {}
    for step in range(1, num_steps + 1):
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
            divergences = plain_divergence(logits, source_fault(source_model(checkpoint, settings)(inputs)), settings)
        divergences = sum_fault(torch.where(valid, divergences, 0.0), valid)
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
    if num_steps == STEPS:
        with torch.no_grad():
            inputs, labels = masked_batch(dataset, torch.arange(len(dataset)))
            losses = F.cross_entropy(model(inputs).transpose(1, 2), labels, ignore_index=IGNORE_INDEX)
        steps[STEPS]["validation"] = losses.item()
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


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_parallel_distillation_is_plain_distillation(measured: Measured, size: int, name: str) -> None:
    settings, ranks = ALL[size][name], measured.cell(size, name)
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
            for parameter, error in errors(seen, plain).items():
                assert error < 1e-4, f"step {step}, {parameter}"


def errors(seen: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Parameter -> the largest error of its gradient, as a share of the largest gradient."""
    return {
        name: np.abs(gradient - plain["gradients"][name]).max() / np.abs(plain["gradients"][name]).max()
        for name, gradient in seen["gradients"].items()
    }


# -- faults of other implementations, each by its name (docs/reference/distillation.md) -------------------------------


def check_fault(measured: Measured, name: str, **faults: Any) -> None:
    """The first step of a cell has the right gradients, and would not have them with the fault."""
    ranks, settings = measured.cell(2, name), CELLS[2][name]
    served = served_by(ranks)
    for is_right, options in ((True, {}), (False, faults)):
        plain = train_plainly(settings, served, measured, num_steps=1, **options)[1]
        largest = max(error for rank in ranks for error in errors(rank["steps"][1], plain).values())
        assert largest < 1e-4 if is_right else largest > 1e-2


def test_no_pipeline_microbatch_learns_from_the_targets_of_the_last_one(measured: Measured) -> None:
    """NeMo Automodel #1500: with microbatch < batch only the last microbatch's logits are captured."""
    check_fault(measured, "PP, microbatches of 1", source_fault=lambda logits: logits[-1:].expand_as(logits))


def test_validation_under_a_pipeline_is_not_skipped_and_is_the_labels_loss(measured: Measured) -> None:
    """NeMo Automodel #1500 skips it; the paper's code evaluates cross-entropy of a softmax."""
    name = "PP, microbatches of 1"
    ranks = measured.cell(2, name)
    expected = train_plainly(CELLS[2][name], served_by(ranks), measured)[STEPS]["validation"]
    for rank in ranks:
        assert rank["validation"] == pytest.approx(expected, rel=1e-4)


def test_labels_and_divergence_are_divided_by_the_same_tokens_under_tp(measured: Measured) -> None:
    """NeMo RL #2745: they were normalised over different groups. Here two microbatches with unequal valid tokens."""

    def by_microbatch(divergences: Tensor, valid: Tensor) -> Tensor:
        counts = [half.sum() for half in valid.chunk(2)]
        scales = [valid.sum() / (2 * count) for count in counts]
        return torch.cat([half * scale for half, scale in zip(divergences.chunk(2), scales, strict=True)])

    check_fault(measured, "TP, accumulated, argmax", sum_fault=by_microbatch)


def test_sparse_targets_are_normalised_once_under_tp(measured: Measured) -> None:
    """axolotl #2700, Fast-LLM #400: by their weights again, or by the ranks that share the vocabulary."""
    for factor in (0.5, 2.0):
        check_fault(measured, "TP, accumulated, targets on disk", sum_fault=lambda sums, valid, f=factor: sums * f)


def test_the_squared_temperature_is_applied_once_under_tp(measured: Measured) -> None:
    """NeMo Automodel #1499: KL with a sharded vocabulary, and the factor T^2."""
    for factor in (0.25, 4.0):
        check_fault(measured, "TP, both softened", sum_fault=lambda sums, valid, f=factor: sums * f)


def test_the_sources_head_is_gathered_once_and_not_per_chunk_of_the_loss(measured: Measured) -> None:
    """TRL #6530: a pass gathers each block once, embeddings and head, too; the chunks of the loss gather nothing. FSDP2
    keeps the head gathered until other weights are loaded."""
    calls = measured.cell(2, "FSDP, loss in chunks")[0]["calls"]
    layers = FLAVORS["llama3"]["cell"].n_layers  # type: ignore[attr-defined]
    passes = [count for name, count, _ in calls if name == "source"]
    assert passes[0] == layers + 2 and set(passes) == {layers + 1, layers + 2}
    assert {count for name, count, _ in calls if name == "divergence"} == {0}


def test_the_sources_pass_builds_no_graph(measured: Measured) -> None:
    """TRL #6526: its head ran without no_grad. The paper's code sets an attribute of a module that does nothing."""
    calls = measured.cell(2, "TP, both softened")[0]["calls"]
    of = {kind: {has_graph for name, _, has_graph in calls if name == kind} for kind in ("source", "divergence")}
    assert of == {"source": {False}, "divergence": {True}}
