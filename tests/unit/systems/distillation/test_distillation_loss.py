"""systems/distillation/system.py: the loss of a microbatch, with a function in place of the source."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_attent.foundations.ledger import Ledger
from titan_attent.losses.build import build_example_loss
from titan_attent.losses.cross_entropy import IGNORE_INDEX, build_weighted_loss
from titan_attent.losses.window import CappedLinear, capped_linear_weights
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.schedule import Phase
from titan_attent.systems.distillation.system import Distillation
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Batch, StepLoss
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.system import Teaching

B, L, V, M = 2, 6, 17, 3
STEPS = 10


class Source:
    """A frozen model whose logits are a table; counts its passes."""

    def __init__(self) -> None:
        self.model = nn.Module()
        self.passes = 0
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(1)) * 2

    def __call__(self, inputs: Tensor, example_index: Tensor | None = None) -> Tensor:
        self.passes += 1
        return self.table[inputs]

    def load(self, checkpoint: str) -> None:
        raise AssertionError("not in these tests")


def system(step: int = 3, **keys: Any) -> Distillation:
    """A system between its construction and its first step."""
    settings = RunSettings(family="llama3", steps=STEPS, seq_len=L, local_batch_size=B)
    ledger = Ledger(batch_size=B, tokens_per_example=L, accounts=Distillation.accounts)
    run: Any = SimpleNamespace(
        settings=settings, ledger=ledger, step=lambda: step, mesh=lambda name: None, device=torch.device("cpu")
    )
    built = Distillation.__new__(Distillation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_attent.systems.distillation.sources.phases_on_disk", lambda config, steps: (Phase(1, 10),))
        built.__init__(run, DistillationConfig(schedule="final", source="source", **keys))  # type: ignore[misc]
    built.frozen, built.loaded = Source(), 10
    return built


def batch(**columns: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(V, (B, L), generator=generator)
    labels = torch.randint(V, (B, L), generator=generator)
    labels[0, 1:4] = IGNORE_INDEX
    return Batch(inputs, labels, {"example_id": torch.arange(B)} | columns)


def logits() -> Tensor:
    return (torch.randn(B, L, V, generator=torch.Generator().manual_seed(3)) * 2).requires_grad_()


def stock(pred: Tensor, batch: Batch) -> StepLoss:
    loss = F.cross_entropy(pred.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    return StepLoss(loss, loss.detach(), {})


def weighted(num_chunks: int = 1) -> Callable[[Tensor, Batch], StepLoss]:
    """As the teacher's."""
    loss = build_example_loss(num_chunks=num_chunks)

    def of_batch(pred: Tensor, batch: Batch) -> StepLoss:
        weights = batch.columns["weight"].flatten()
        index = batch.columns.get("example_index")
        options = {} if index is None else {"example_index": index + torch.arange(B)[:, None] * M}
        result = loss(pred, batch.labels, weights, **options)
        stats = {"loss": result.losses, "valid": result.counts, "weight": weights}
        return StepLoss(result.weighted_sum, result.loss_sum, stats)

    return of_batch


def plain(pred: Tensor, source: Tensor, batch: Batch, weights: Tensor, *, a: float) -> Tensor:
    """The whole loss from the definition; ``weights`` of the tokens."""
    valid = batch.labels != IGNORE_INDEX
    log_p, log_q = source.double().log_softmax(-1), pred.double().log_softmax(-1)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
    labels = -log_q.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return (torch.where(valid, a * labels + (1 - a) * divergences, 0.0) * weights).sum()


def gradient(loss: Tensor, pred: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, pred)
    return found


def check(found: StepLoss, pred: Tensor, expected: Tensor, exact: Tensor) -> None:
    assert found.to_differentiate.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient(found.to_differentiate, pred).double(), gradient(expected, exact), rtol=1e-5, atol=1e-6
    )


def test_the_labels_have_their_weight_and_the_source_the_rest() -> None:
    """No other share of cross-entropy is mixed in (TRL #5731)."""
    for a in (0.0, 0.25):
        distilling, pred = system(label_weight=a), logits()
        found = distilling.wrap_loss(stock)(pred, batch())
        assert found.logged == stock(pred, batch()).logged, "the log stays cross-entropy"
        exact = pred.detach().double().requires_grad_()
        source = distilling.frozen(batch().inputs)  # type: ignore[misc]
        check(found, pred, plain(exact, source, batch(), torch.ones(B, L), a=a), exact)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_the_weight_of_an_example_counts_for_its_whole_loss(num_chunks: int) -> None:
    """In chunks, too, whose backward overwrites the logits: it must run last."""
    distilling, pred = system(label_weight=0.4), logits()
    columns = {"weight": torch.tensor([0.3, 1.7])}
    weigh = weighted(num_chunks)
    scaled = pred * 1.0  # logits that are a leaf are never overwritten
    found = distilling.wrap_loss(weigh)(scaled, batch(**columns))
    exact = pred.detach().double().requires_grad_()
    source = distilling.frozen(batch().inputs)  # type: ignore[misc]
    expected = plain(exact, source, batch(), columns["weight"][:, None].expand(B, L), a=0.4)
    check(found, pred, expected, exact)
    assert torch.equal(found.stats["loss"], weigh(logits(), batch(**columns)).stats["loss"]), "the buffer's losses"


def test_packed_examples_have_their_own_weights_and_statistics() -> None:
    index = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    weights = torch.tensor([[0.5, 2.0, 9.0], [1.0, 0.2, 3.0]])
    columns = {"example_id": torch.arange(B * M).view(B, M), "example_index": index, "weight": weights}
    distilling, pred = system(label_weight=0.4), logits()
    found = distilling.wrap_loss(weighted())(pred, batch(**columns))
    exact = pred.detach().double().requires_grad_()
    source = distilling.frozen(batch().inputs)  # type: ignore[misc]
    check(found, pred, plain(exact, source, batch(), weights.gather(1, index), a=0.4), exact)
    assert found.stats["divergence_tokens"].tolist() == [1, 2, 0, 1, 3, 2]


def test_without_a_weight_for_the_source_it_does_not_run() -> None:
    distilling = system(label_weight=1.0)
    assert distilling.wrap_loss(stock)(logits(), batch()).stats == {}
    assert distilling.frozen.passes == 0  # type: ignore[union-attr]


def test_without_a_weight_for_the_labels_their_loss_has_no_graph() -> None:
    graphs = []

    def inner(pred: Tensor, batch: Batch) -> StepLoss:
        graphs.append(torch.is_grad_enabled())
        return stock(pred, batch)

    for a in (0.0, 0.5):
        system(label_weight=a).wrap_loss(inner)(logits(), batch())
    assert graphs == [False, True]


def test_temperature_zero_learns_the_sources_largest_logit() -> None:
    distilling, pred = system(label_weight=0.0, temperature=0.0), logits()
    found = distilling.wrap_loss(stock)(pred, batch())
    best = distilling.frozen(batch().inputs).argmax(-1)  # type: ignore[misc]
    best = best.masked_fill(batch().labels == IGNORE_INDEX, IGNORE_INDEX)
    expected = F.cross_entropy(pred.flatten(0, 1), best.flatten(), reduction="sum")
    torch.testing.assert_close(found.to_differentiate, expected)


def test_targets_in_the_batch_take_the_place_of_the_source() -> None:
    distilling, pred = system(label_weight=0.0), logits()
    distilling.frozen, distilling.stored = None, {10: object()}  # type: ignore[dict-item]
    ids = torch.randint(V, (B, L, 4), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    found = distilling.wrap_loss(stock)(pred, batch(target_ids=ids))
    log_q = pred.log_softmax(-1).gather(-1, ids.long()).mean(-1)
    expected = -log_q[batch().labels != IGNORE_INDEX].sum()
    torch.testing.assert_close(found.to_differentiate, expected)


def test_the_logged_divergence_is_the_mean_over_tokens_of_unequal_microbatches() -> None:
    distilling = system(step=4, label_weight=0.5)
    loss, sums, counts = distilling.wrap_loss(stock), 0.0, 0
    for rows in (slice(0, 1), slice(1, 2)):  # 3 and 6 valid tokens
        whole = batch()
        part = Batch(whole.inputs[rows], whole.labels[rows], {"example_id": whole.examples[rows]})
        stats = loss(logits()[rows], part).stats
        sums, counts = sums + stats["divergence"].sum().item(), counts + int(stats["divergence_tokens"].sum())
        distilling.after_microbatch(part, stats)
    distilling.after_microbatch(batch(), None)  # another stage of a pipeline
    assert counts == 9 and "distillation/divergence" not in distilling.metrics()
    distilling.after_step()
    assert distilling.metrics()["distillation/divergence"] == pytest.approx(sums / 9)
    distilling.after_step()
    assert "distillation/divergence" not in distilling.metrics(), "nothing was seen since"


def test_the_costs_of_the_source_are_in_the_ledger_and_in_the_state() -> None:
    distilling = system(label_weight=0.5, students=5, source_seconds=1000.0)
    distilling.wrap_loss(stock)(logits(), batch())
    assert distilling.run.ledger.seconds["source"] > 0
    distilling.source_flops, distilling.changes = 12.0, 2
    state, seconds = distilling.state_dict(), distilling.run.ledger.seconds["source"]
    metrics = distilling.metrics()
    assert metrics["distillation/source_training_seconds"] == 1000.0
    assert metrics["distillation/source_training_seconds_per_student"] == 200.0
    resumed = system(label_weight=0.5)
    resumed.load_state_dict(state)
    assert resumed.run.ledger.seconds["source"] == pytest.approx(seconds)
    assert (resumed.source_flops, resumed.changes) == (12.0, 2)


def test_the_teacher_tells_the_weights_that_it_applied() -> None:
    """Those computed from the loss in the step included: they sum the losses of the examples up to its own loss."""
    statistics, weights = torch.tensor([1.0, 4.0, 1.3]), torch.tensor([0.5, 1.5])
    for weighting in ("loss", "inverse_probability"):
        teaching = Teaching.__new__(Teaching)
        rule = CappedLinear(0.7) if weighting == "loss" else None
        teaching.config = TeacherConfig(weighting=weighting, temperature=0.7)
        teaching.rule, teaching.weighted_loss = rule, build_weighted_loss(compile_loss=False, rule=rule)
        found = teaching._example_loss(logits(), batch(), weights, statistics)
        losses = found.stats["loss"]
        applied = weights if rule is None else weights * capped_linear_weights(losses, statistics, temperature=0.7)
        torch.testing.assert_close(found.stats["weight"], applied)
        total = (found.stats["weight"] * losses * found.stats["valid"]).sum()
        torch.testing.assert_close(total, found.to_differentiate.detach())
