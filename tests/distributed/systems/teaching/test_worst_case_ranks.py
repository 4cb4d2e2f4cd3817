"""``weighting = "worst_case"`` in the trainer, under each parallelism and with accumulation, against a plain loop.

The reference differentiates the q-norm itself, over the whole batch, in one process. The data are rows of a task, three
random seeds per input; the validation data too, so that the vote is compared with a count.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.parallel_world import STEPS, NoMesh, Settings, config_of, full, plain_model, spec_of, train_cells
from distributed.spawn import run_on_ranks
from references import exact_norm
from torch.nn import functional as F

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.writer import write_task

M, BATCH, Q = 3, 12, 9.0
"""Seeds per input, rows of a batch, and the power."""
BASE: Settings = {
    **{"model.flavor": "cell of 2", "data.unit": "document", "data.group_size": M, "data.exact_match": True},
    **{"teacher.strategy": "uniform", "teacher.importance": "attainment"},
    **{"teacher.weighting": "worst_case", "teacher.q": Q},
    **{"training.global_batch_size": BATCH, "training.seq_len": 20, "validation.seq_len": 20},
    **{"validation.enable": True, "validation.local_batch_size": 6},
}
TP: Settings = {"parallelism.tensor_parallel_degree": 2}
DDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}
SAVED: Settings = {"checkpoint.enable": True}
CELLS: dict[str, Settings] = {
    name: BASE | {"training.local_batch_size": rows} | settings
    for name, rows, settings in (
        ("FSDP", 6, SAVED),
        ("FSDP, accumulation", 3, {}),
        ("DDP, accumulation", 3, DDP),
        ("one data-parallel rank", 12, TP),
        ("one data-parallel rank, accumulation", 6, TP),
        ("resumed", 3, SAVED | {"folder": "FSDP"}),
    )
}


def train_plainly(train: Path, validation: Path) -> dict[str, Any]:
    """What each step trains and its gradient; the losses of the last visits; the metrics of the inputs at the end."""
    settings = CELLS["one data-parallel rank"]
    config, model = config_of(settings, data="", folder=""), plain_model(settings)
    optimizers = spec_of("llama3_attent").build_optimizers_fn([model], config.optimizer, NoMesh())
    dataset = DocumentDataset(train, seq_len=20)

    def losses_of(data: DocumentDataset, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs, labels = data.read(ids)
        logits = model(inputs["input"])
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
        return losses / (labels >= 0).sum(dim=1), logits.argmax(dim=2), labels

    steps, seen = {}, {}
    order = TeachingSampler(Shuffled(len(dataset), batch_size=BATCH, seed=config.data.seed, group_size=M))
    for step, (ids, _) in zip(range(1, STEPS + 1), order, strict=False):
        losses, *_ = losses_of(dataset, ids)
        means = losses.view(-1, M).mean(dim=1)
        optimizers.zero_grad()
        worst = (means**Q).mean() ** (1 / Q)
        worst.backward()
        norm = torch.tensor(exact_norm(parameter.grad for parameter in model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, norm)
        gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
        steps[step] = {"ids": ids, "loss": losses.mean().item(), "norm": norm.item(), "gradients": gradients}
        steps[step]["worst"] = worst.item()
        steps[step]["spread"] = (means.max() / means.min()).item()
        seen |= dict(zip(ids.tolist(), losses.tolist(), strict=True))
        optimizers.step()
    shares, votes, means = [], [], []
    data = DocumentDataset(validation, seq_len=20)
    with torch.no_grad():
        for first in range(0, len(data), M):
            losses, best, labels = losses_of(data, torch.arange(first, first + M))
            answers = Counter(
                (torch.equal(said[asked >= 0], asked[asked >= 0]), *said[asked >= 0].tolist())
                for said, asked in zip(best, labels, strict=True)
            )
            most = {right: max((n for (is_, *_), n in answers.items() if is_ == right), default=0) for right in (0, 1)}
            shares.append(sum(n for (is_right, *_), n in answers.items() if is_right) / M)
            votes.append(most[1] > most[0])
            means.append(losses.mean().item())
    metrics = {
        "exact_match": np.mean(shares),
        "exact_match_vote": np.mean(votes),
        "input_loss_p95": np.percentile(means, 95),
        "input_loss_worst": np.max(means),
        "input_match_p95": np.percentile(shares, 5),
        "input_match_worst": np.min(shares),
    }
    return {"steps": steps, "seen": seen, "metrics": {f"validation_metrics/{k}": v for k, v in metrics.items()}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plain loop, and what two ranks did under each cell."""
    folder = tmp_path_factory.mktemp("worst")
    # Cycles of four nodes: right answers are likely enough that inputs differ.
    write_task(GraphColouring(nodes=4, seeds=M), output=folder / "data", examples=36, validation_examples=42)
    train, validation = folder / "data" / "train", folder / "data" / "validation"
    cells = {name: settings | {"data.validation_path": str(validation)} for name, settings in CELLS.items()}
    return train_plainly(train, validation), run_on_ranks(
        train_cells, 2, cells, str(train), str(folder / "runs"), timeout=300.0
    )


@pytest.mark.parametrize("name", CELLS)
def test_every_cut_of_the_batch_trains_as_the_norm_of_all_of_it(trained: Any, name: str) -> None:
    plain, ranks = trained
    steps = [rank[name]["steps"] for rank in ranks]
    assert list(steps[0]) == ([STEPS] if name == "resumed" else list(range(1, STEPS + 1)))
    sizes = {rank[name]["place"][1] for rank in ranks}
    for number, expected in plain["steps"].items():
        if number not in steps[0]:
            continue
        parts = [step[number]["ids"] for step in steps][: max(sizes)]
        assert np.concatenate(parts).tolist() == expected["ids"].tolist()
        for step in steps:
            metrics = step[number]["metrics"]
            assert metrics["loss_metrics/global_avg_loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert metrics["teacher/worst_case_loss"] == pytest.approx(expected["worst"], rel=1e-5)
            assert metrics["grad_norm"] == pytest.approx(expected["norm"], rel=1e-4)
            for parameter, gradient in step[number]["gradients"].items():
                exact = expected["gradients"][parameter]
                assert np.abs(gradient - exact).max() < 2e-4 * np.abs(exact).max() + 1e-7, parameter
    assert steps[0][STEPS]["gradients"].keys() == plain["steps"][STEPS]["gradients"].keys()


@pytest.mark.parametrize("name", CELLS)
def test_the_buffer_has_plain_losses_and_validation_counts_inputs(trained: Any, name: str) -> None:
    plain, ranks = trained
    for rank in ranks:
        losses = rank[name]["buffer"]["loss"]
        assert {i: losses[i] for i in plain["seen"]} == pytest.approx(plain["seen"], rel=1e-3)
        found = {tag: rank[name]["validated"][tag] for tag in plain["metrics"]}
        assert found == pytest.approx(plain["metrics"], rel=1e-3)


def test_the_weights_matter(trained: Any) -> None:
    """The comparison above would notice: the largest weight of a step is more than twice the smallest."""
    spreads = [step["spread"] for step in trained[0]["steps"].values()]
    assert max(spreads) ** (Q - 1) > 2, spreads
