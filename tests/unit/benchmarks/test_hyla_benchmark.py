"""benchmarks.hyla: rows of the two problems, scores, one small run, resumption, verdicts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.hyla import __main__ as command
from benchmarks.hyla.models import METHODS, ReferenceModel
from benchmarks.hyla.problems import PROBLEMS, OneHotSraven, RealFuzzyLogic
from benchmarks.hyla.table import page, verdict
from benchmarks.hyla.training import Run, learning_rate, train
from titan_attent.models.hyla.layer import HyperAttention
from titan_attent.tasks.checkers import CHECKERS, Row

METHODS_RUN = ("hyla", "softmax", "linear")
SMALL: dict[str, Any] = {"seed": 0, "steps": 2, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.1, "warmup": 1}


def test_rows_of_fuzzy_logic() -> None:
    problem = RealFuzzyLogic(seed=3, samples=6)
    for split in ("train", *problem.splits):
        batch = problem.batch(split, 5, 8)
        assert torch.equal(batch.inputs, problem.batch(split, 5, 8).inputs)
        assert not torch.equal(batch.inputs, problem.batch(split, 6, 8).inputs)
        functions = problem.task.functions[split].tolist()
        for row, target, variance in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.baseline, strict=True):  # type: ignore[arg-type]
            assert row[-1][-1] == 0
            outputs = [
                [max(min(1 - x if no else x for x, no in zip(s, term, strict=True)) for term in f) for s in xs]
                for f in functions
                for xs in [[sample[:-1] for sample in row]]
            ]
            wanted = [sample[-1] for sample in row[:-1]] + [target]
            assert any(max(abs(a - b) for a, b in zip(one, wanted, strict=True)) < 1e-6 for one in outputs)
            mean = sum(wanted) / len(wanted)
            assert float(variance) == pytest.approx(sum((one - mean) ** 2 for one in wanted) / len(wanted), rel=1e-4)
    perfect = batch.targets[:, None, None]
    assert problem.loss(perfect, batch) == 0 and (problem.scores(perfect, batch) == 1).all()


def test_rows_of_sraven() -> None:
    problem = OneHotSraven(seed=0)
    batch = problem.batch("held_out", 1, 4)
    words = torch.cat((batch.inputs[:, :-4].argmax(dim=2), batch.targets), dim=1)
    assert (batch.inputs[:, :-4].sum(dim=2) == 1).all() and (batch.inputs[:, -4:] == 0).all()
    facts = problem.task.facts()
    for row in words.tolist():
        checked = Row([str(word) for word in row], [False] * 32 + [True] * 4, "held_out")
        assert not CHECKERS["sraven"](checked, asdict(problem.task), facts)
    right = torch.nn.functional.one_hot(words[:, -4:], 8).float()
    assert (problem.scores(right, batch) == 1).all()
    right[0, -2] = 0
    right[0, -2, (batch.targets[0, 2] + 1) % 8] = 1
    assert problem.scores(right, batch).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("task", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradients_are_those_of_whole_rows(task: str, method: str) -> None:
    """Against the blocks of hyla_attent's reference flavors at all positions, for HYLA with its tiled attention."""
    torch.manual_seed(0)
    problem = PROBLEMS[task](seed=0)
    model = ReferenceModel(problem, task, method).double()
    batch = problem.batch("train", 0, 3)
    problem.loss(model(batch.inputs.double()), batch).backward()
    got = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.any() for grad in got)
    model.zero_grad(set_to_none=True)
    form, is_hypernetwork = METHODS[method]
    if is_hypernetwork:
        for block in model.blocks:
            block.attention.inner_attention = HyperAttention(form, causal=False)  # type: ignore[union-attr]
    x = model.embedding(batch.inputs.double())
    for block in model.blocks:
        x = block(x)
    problem.loss(model.output(model.norm(x))[:, -problem.answers :], batch).backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=1e-9)


def test_a_run_is_a_function_of_its_settings() -> None:
    run = Run(task="fuzzy_logic", method="linear", measured_rows=8, **SMALL)
    first, second = train(run), train(run)
    assert first["scores"] == second["scores"] and set(first["scores"]) == {"in_distribution", "held_out", "new_terms"}
    assert [learning_rate(run, step) for step in range(3)] == [0, 1e-3, pytest.approx(1e-4)]


def result(method: str, seed: int, score: float, *, trained: float = 0.9) -> dict[str, Any]:
    run = {"task": "sraven", "method": method, **SMALL, "seed": seed}
    return {"run": run, "scores": {"in_distribution": trained, "held_out": score}, "machine": "m", "versions": {}}


def test_verdicts() -> None:
    def of(hyla: list[float], **options: float) -> str:
        results = [result("hyla", seed, score, **options) for seed, score in enumerate(hyla)]
        results += [result(name, seed, 0.5, **options) for name in ("softmax", "linear") for seed in range(len(hyla))]
        (line,) = [line for line in page(results) if "Verdict" in line]
        return line

    assert "Verdict: reproduced (held_out, HYLA minus softmax: 30.0 ± " in of([0.79, 0.80, 0.81])
    assert "Verdict: not reproduced at this size: its intervals do not all leave out 0 (" in of([0.40, 0.80, 0.90])
    assert "Verdict: not reproduced (" in of([0.20, 0.21, 0.22])
    assert "not reachable at this size: the best score of trained combinations is 30.0" in of([0.8, 0.8], trained=0.3)
    assert verdict({"hyla": {}}, "sraven") == "not measured: it needs hyla, softmax and linear"


def test_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []

    def measured(run: Run) -> dict[str, Any]:
        trained.append(run)
        trained_score = 0.9 if run.lr == {"hyla": 1e-3}.get(run.method, 3e-3) else 0.8
        scores = {"in_distribution": trained_score, "held_out": 0.6, "new_terms": 0.5}
        return {"run": asdict(run), "scores": scores, "cpu_seconds": 1.0}

    monkeypatch.setattr(command, "train", measured)
    call = ["--output", str(tmp_path / "a"), "--tasks", "fuzzy_logic", "--seeds", "0", "1"]
    assert command.main(call) == command.main(call) == 0
    # Three attentions: a pilot at each of two rates, and two seeds at the better one.
    assert len(trained) == 12
    pilots, runs = ([run for run in trained if run.pilot is which] for which in (True, False))
    assert {(run.method, run.lr) for run in pilots} == {(m, lr) for m in METHODS_RUN for lr in (1e-3, 3e-3)}
    assert {(run.method, run.lr) for run in runs} == {("hyla", 1e-3), ("softmax", 3e-3), ("linear", 3e-3)}
    assert {run.steps for run in runs} == {4 * run.steps for run in pilots}
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in pilots)
    known = tmp_path / "a" / "results.json"
    other = ["--output", str(tmp_path / "b"), *call[2:], "2", "--known", str(known)]
    command.main([*other, "--publish", str(tmp_path / "page")])
    assert len(trained) == 15 and len(json.loads((tmp_path / "page.json").read_text())["results"]) == 15
    command.main(["--output", str(tmp_path / "c"), "--seeds", "--known", str(known)])
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Attention as a hypernetwork")
    assert "| hyla | 0.001 | 3 | 90.0 ± 0.0 |" in text and "| softmax | 0.003 | 3 | 90.0 ± 0.0 |" in text
    assert "in a pilot of 2,500 steps (hyla 0.001: 90.0, hyla 0.003: 80.0, softmax 0.001: 80.0" in text
    with pytest.raises(ValueError, match=r"was measured with .*'steps': 2500.*name another --output"):
        command.main([*call, "--steps", "5"])
