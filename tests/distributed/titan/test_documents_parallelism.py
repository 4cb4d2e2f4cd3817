"""Documents packed into windows, under every parallelism, against a plain loop over documents in one process.

The loop shares the packing with the run and nothing else: it takes each document's tokens out of the logits one by one,
and has no fold, no columns and no mesh.
"""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.cells import Cells, Worlds, chosen, merged, parameters
from distributed.parallel_world import (
    STEPS,
    NoMesh,
    Settings,
    config_of,
    full,
    plain_model,
    spec_of,
    train_cells,
)
from distributed.spawn import run_on_ranks
from references import exact_norm
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.window import LossWindow
from titan_attent.systems.teaching.teacher import Teacher
from titan_attent.titan.trainer import TeachingTrainer

DOCUMENTS: Settings = {"data.unit": "document", "teacher.warmup_passes": 0, "model.flavor": "cell of 2"}
UNIFORM: Settings = {"teacher.strategy": "uniform"}
BY_LOSS: Settings = {"teacher.weighting": "loss", "teacher.temperature": 0.3}
"""Weights from the losses of two steps before, as :func:`train_all` lets every step end a window of losses."""
COMPILED_LOSS: Settings = {
    **{"compile.enable": True, "compile.components": ["loss"]},
    "compile.backend": "aot_eager",  # one cell takes inductor, which also compiles C++
}


def batch(size: int, **degrees: int) -> Settings:
    settings: Settings = {"training.local_batch_size": size, "validation.local_batch_size": size}
    return DOCUMENTS | settings | {f"parallelism.{name}_degree": degree for name, degree in degrees.items()}


CELLS: Cells = {
    2: {
        "FSDP": batch(4) | {"validation.enable": True},
        "FSDP, compiled loss": batch(4) | COMPILED_LOSS,
        "FSDP, uniform": batch(4) | UNIFORM,
        "TP": batch(8, tensor_parallel=2),
        "TP, uniform": batch(8, tensor_parallel=2) | UNIFORM,
        "PP 1F1B": batch(8, pipeline_parallel=2) | {"validation.enable": True},
        "PP, uniform": batch(8, pipeline_parallel=2) | UNIFORM,
        "scored by a forward pass": batch(4) | {"teacher.scoring": "forward_once"},
        "weights by loss": batch(4) | BY_LOSS,
        "weights by loss, accumulated, loss in chunks": batch(2) | BY_LOSS | {"teacher.loss_chunks": 3},
        "CP": batch(8, context_parallel=2) | {"validation.enable": True, "teacher.scoring": "forward_once"},
        "CP, accumulated, not balanced, loss in chunks": batch(4, context_parallel=2)
        | {"parallelism.context_parallel_load_balancer": None, "teacher.loss_chunks": 3},
        "CP, uniform": batch(8, context_parallel=2) | UNIFORM,
    },
    4: {
        "FSDP + CP": batch(4, context_parallel=2) | {"validation.enable": True},
    },
}
MORE: Cells = {
    2: {
        "FSDP, accumulated": batch(2),
        "FSDP, loss in chunks": batch(4) | {"teacher.loss_chunks": 3},
        "DDP": batch(4, data_parallel_replicate=2, data_parallel_shard=1),
        "TP, whole logits": batch(8, tensor_parallel=2) | {"parallelism.disable_loss_parallel": True},
        "PP 1F1B, accumulated": batch(4, pipeline_parallel=2),
        "weights by loss, TP, compiled loss": batch(8, tensor_parallel=2)
        | COMPILED_LOSS
        | {"compile.backend": "inductor"}
        | BY_LOSS,
        "weights by loss, PP": batch(8, pipeline_parallel=2) | BY_LOSS,
        "CP, compiled loss": batch(8, context_parallel=2) | COMPILED_LOSS,
    },
    4: {
        "PP + CP": batch(8, pipeline_parallel=2, context_parallel=2),
        "TP + CP": batch(8, tensor_parallel=2, context_parallel=2),
    },
}
ALL = merged(CELLS, MORE)


def write_documents(folder: Path, tokenizer: Path) -> Path:
    """60 documents, some of a few tokens, some of several windows."""
    source = (Path(json.__file__).parent / "scanner.py").read_text()
    rng, lines = np.random.default_rng(3), []
    for _ in range(60):
        start, size = int(rng.integers(0, 1500)), int(rng.choice([3, 20, 40, 60, 250]))
        lines.append(json.dumps({"text": source[start : start + size]}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    write_dataset([folder / "documents.jsonl"], output=folder / "data", tokenizer=str(tokenizer))
    return folder / "data"


def per_document(
    model: torch.nn.Module, dataset: DocumentDataset, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sums of nats, numbers of tokens, functional gradients), [B, M] each, with a graph; document by document."""
    batch, labels = dataset.read(ids)
    logits = model(batch["input"])
    sums, counts, norms = (torch.zeros(ids.shape) for _ in range(3))
    sums = [[torch.zeros(()) for _ in row] for row in ids]
    for row, examples in enumerate(ids.tolist()):
        place = 0
        for slot, i in enumerate(examples):
            if i == len(dataset):
                continue
            length = int(dataset.lengths(np.array([i]))[0])
            own, wanted = logits[row, place : place + length], labels[row, place : place + length]
            sums[row][slot] = F.cross_entropy(own, wanted, reduction="sum")
            counts[row, slot] = length
            deviation = own.detach().softmax(-1) - F.one_hot(wanted, own.shape[-1])
            norms[row, slot] = deviation.square().sum(-1).mean().sqrt()
            place += length
    return torch.stack([torch.stack(row) for row in sums]), counts, norms


def weights_by_loss(losses: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """The rule of LinUpper for losses [...], from the losses of earlier examples, [n]."""

    def rule(values: torch.Tensor) -> torch.Tensor:
        h = (2 * (values - earlier.min()) / (earlier.max() - earlier.min()) - 1).clamp(-1, 1)
        return ((h + 1).clamp(max=1) / BY_LOSS["teacher.temperature"]).exp()

    return rule(losses) / rule(earlier).mean()


def train_all(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    usual, results = LossBuffer.__init__.__kwdefaults__["flush_every"], {}
    for name, settings in cells.items():
        for part in (LossBuffer, LossWindow):
            part.__init__.__kwdefaults__["flush_every"] = 1 if BY_LOSS.items() <= settings.items() else usual
        results |= train_cells(mesh, {name: settings}, data, folder)
    return results


def train_plainly(settings: Settings, *, data: Path) -> dict[str, Any]:
    config = config_of(settings, data=str(data), folder="")
    model = plain_model(settings)
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    dataset = DocumentDataset(data, seq_len=config.training.seq_len)
    buffer = LossBuffer(len(dataset), with_gradient=True)
    everything = torch.arange(len(dataset))[:, None]

    def score(step: int, pool: Any) -> None:
        with torch.no_grad():
            sums, counts, norms = per_document(model, dataset, everything)
        buffer.record(everything[:, 0], (sums / counts)[:, 0], step=step, gradients=norms[:, 0], trained=False)

    packer = Packer(dataset, batch_size=8)
    by_loss = config.teacher.weighting == "loss"
    rules = replace(config.teacher, weighting="none") if by_loss else config.teacher
    teacher = Teacher(buffer, rules, batch_size=8, total_steps=STEPS, score=score, packer=packer)
    steps: dict[int, dict[str, Any]] = {}
    seen: dict[int, torch.Tensor] = {}
    for step, (ids, weights) in zip(range(1, STEPS + 1), TeachingSampler(teacher), strict=False):
        sums, counts, norms = per_document(model, dataset, ids)
        real = ids < len(dataset)
        seen[step] = (sums.detach() / counts.clamp(min=1))[real]
        applied = weights.clone()
        if by_loss and step > 2:
            applied[real] *= weights_by_loss(seen[step], seen[step - 2])
        optimizers.zero_grad()
        ((sums * applied).sum() / counts.sum()).backward()
        norm = torch.tensor(exact_norm(parameter.grad for parameter in model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, norm)
        steps[step] = {
            "ids": full(ids),
            "weights": full(weights),
            "loss": float(sums.detach().sum() / counts.sum()),
            "norm": float(norm),
            "gradients": {name: full(parameter.grad) for name, parameter in model.named_parameters()},
        }
        optimizers.step()
        if config.teacher.strategy != "uniform":
            buffer.record(ids[real], seen[step], step=step, gradients=norms[real])
        teacher.step_done()
    buffer.sync()
    with torch.no_grad():
        sums, counts, _ = per_document(model, dataset, everything)
    uniform = config.teacher.strategy == "uniform"
    return {
        "steps": steps,
        "buffer": {} if uniform else {name: full(tensor) for name, tensor in buffer.state_dict().items()},
        "validation": float(sums.sum() / counts.sum()),
    }


class Measured(Worlds):
    """With the results of the plain loops, each computed at its first use."""

    def __init__(self, folder: Path, tokenizer: Path, cells: Cells):
        super().__init__(train_all, cells, data=write_documents(folder, tokenizer), folder=folder)
        self.references: dict[str, dict[str, Any]] = {}

    def reference(self, settings: Settings) -> dict[str, Any]:
        own = ("teacher.", "model.", "data.")
        settings = {k: v for k, v in settings.items() if k.startswith(own) and k != "teacher.loss_chunks"}
        key = repr(sorted(settings.items()))
        if key not in self.references:
            self.references[key] = train_plainly(settings, data=self.data)
        return self.references[key]


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    tokenizer = token_data["train"] / "tokenizer.tiktoken"
    return Measured(tmp_path_factory.mktemp("documents"), tokenizer, chosen(request, CELLS, MORE))


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_packed_training_is_plain_training_of_documents(measured: Measured, size: int, name: str) -> None:
    settings = ALL[size][name]
    ranks, expected = measured.cell(size, name), measured.reference(settings)
    by_place = {rank["place"][0]: rank for rank in ranks}
    accumulated = settings["training.local_batch_size"] * ranks[0]["place"][1] < 8
    for step, reference in expected["steps"].items():
        whole = np.concatenate([by_place[place]["steps"][step]["ids"] for place in sorted(by_place)])
        assert np.array_equal(whole, reference["ids"])
        if "uniform" not in name:
            weights = np.concatenate([by_place[place]["steps"][step]["weights"] for place in sorted(by_place)])
            real = reference["ids"] < reference["ids"].max()  # slots without an example have any weight
            np.testing.assert_allclose(weights[real], reference["weights"][real], rtol=1e-4)
        for rank in ranks:
            seen = rank["steps"][step]
            assert seen["metrics"]["grad_norm"] == pytest.approx(reference["norm"], rel=1e-4)
            assert seen["metrics"]["loss_metrics/global_avg_loss"] == pytest.approx(reference["loss"], rel=1e-5)
            assert seen["metrics"]["n_tokens_seen"] == step * 8 * 32
            for parameter, gradient in seen["gradients"].items():
                error = np.abs(gradient - reference["gradients"][parameter]).max()
                assert error < 1e-4 * np.abs(reference["gradients"][parameter]).max(), f"step {step}, {parameter}"
    for rank in ranks:
        assert rank["buffer"].keys() == expected["buffer"].keys()
        for key, value in expected["buffer"].items():
            np.testing.assert_allclose(rank["buffer"][key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        if "validation" in rank:
            assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    assert accumulated == ("accumulated" in name)


class Collectives(TorchDispatchMode):
    """Counts the collectives inside the context, by operator and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and not any(word in name for word in ("wait", "wrap")):
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self.seen[name, first.numel()] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_a_microbatch(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    counted = {}
    for name, settings in cells.items():
        config = config_of(settings, data=data, folder=f"{folder}/{name}")
        spec_of(config.model.name)
        trainer = TeachingTrainer(config)
        try:
            inputs, labels = next(iter(trainer.dataloader))
            slots = inputs["weight"].numel() if "weight" in inputs else 0
            with Collectives() as collectives:
                trainer.forward_backward_step(
                    input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
                )
            counted[name] = slots, collectives.seen
        finally:
            trainer.close()
    return counted


def test_documents_add_no_collective_to_context_parallelism(measured: Measured, tmp_path: Path) -> None:
    documents = batch(8, context_parallel=2)
    cells = {"documents": documents, "windows": documents | {"data.unit": "window"}, "uniform": documents | UNIFORM}
    for rank in run_on_ranks(collectives_of_a_microbatch, 2, cells, str(measured.data), str(tmp_path), timeout=200.0):
        (_, stock), (slots, seen), (rows, of_windows) = (rank[name] for name in ("uniform", "documents", "windows"))
        assert stock.total() > 4 and slots > rows == 8
        assert seen - stock == Counter({("all_reduce", 3 * slots): 1}) and not stock - seen
        assert of_windows - stock == Counter({("all_reduce", 3 * rows): 1}) and not stock - of_windows
