"""The distillation experiments: their arms, students trained together, resumption, known results, pages."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.distillation import __main__ as command
from benchmarks.distillation import results as stored
from benchmarks.distillation.arms import ARMS, LABELS_LONG, LAST, MIDDLE, ONE_SHOT, TWO_SHOT, WRONG_PHASE, phases
from benchmarks.distillation.problems import PROBLEMS, Grammar, OneHiddenLayer, Parity
from benchmarks.distillation.runs import Source, of_labels, probabilities, run, run_together, train
from benchmarks.distillation.table import in_steps, page, row, verdict
from benchmarks.distillation_text import __main__ as text_command
from benchmarks.distillation_text import rules, table
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.divergence import kl_divergence
from titan_attent.systems.distillation.config import DistillationConfig

SMALL = Parity(
    steps=16, source_steps=12, save_every=3, every=8, evaluated=64, batch=4, source_width=20, student_width=5, bits=9
)
CLIFF = {step: 1.0 if step <= 60 else 0.0 for step in range(1, 101)}


# -- arms and runs ----------------------------------------------------------------------------------------------------


def test_arms_differ_in_the_first_quarter_alone() -> None:
    checkpoints = list(range(10, 101, 10))
    found = {
        name: phases(arm, steps=40, losses=CLIFF, checkpoints=checkpoints) for name, arm in ARMS.items() if arm.first
    }
    assert found[TWO_SHOT] == ((1, 60), (11, 100)) == found[f"{TWO_SHOT}, argmax"]
    assert found[WRONG_PHASE] == ((1, 30), (11, 100)) and found["after the fall"] == ((1, 80), (11, 100))
    assert {checkpoint for _, checkpoint in found[ONE_SHOT]} == {100}
    assert [checkpoint for _, checkpoint in found["progressive"]] == checkpoints


def test_a_students_gradient_is_that_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 1, 3, generator=generator).requires_grad_()
    source = torch.randn(6, 1, 3, generator=generator)
    valid = torch.ones(6, 1, dtype=torch.bool)
    for temperature in (0.5, 1.0, 2.0):
        losses = kl_divergence(student, source, valid, source_temperature=temperature)
        (expected,) = torch.autograd.grad(losses.mean(), student)
        loss = torch.nn.functional.cross_entropy(
            student.flatten(0, 1), probabilities(source, temperature).flatten(0, 1)
        )
        (found,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(probabilities(source, 0.0).argmax(-1), source.argmax(-1))


def test_students_trained_together_are_those_trained_alone(tmp_path: Path) -> None:
    source = Source(SMALL, 0, tmp_path / "source.pt")
    arms = {name: arm for name, arm in ARMS.items() if not arm.equal_flops}
    together = run_together(source, arms)
    for name, arm in arms.items():
        alone = run(source, arm)
        assert together[name]["loss"] == pytest.approx(alone["loss"], rel=1e-4), name
        assert {**together[name], "loss": 0, "seconds": 0, "accuracy": 0} == {
            **alone,
            "loss": 0,
            "seconds": 0,
            "accuracy": 0,
        }


def test_the_softened_source_has_the_entropy_of_the_one_in_the_fall(tmp_path: Path) -> None:
    source = Source(SMALL, 0, tmp_path / "source.pt")
    wanted = source.entropy(source.named[MIDDLE], 1.0)
    assert source.entropy(source.named[LAST], source.softening()) == pytest.approx(wanted, rel=1e-2)


def test_equal_flops_are_those_of_the_source_too(tmp_path: Path) -> None:
    """Per row 2 FLOPs per weight forward, twice that backward; the run ends where it has reached the target."""
    source = Source(replace(SMALL, target=2.0), 0, tmp_path / "source.pt")  # above 1: never reached
    student, teacher = 5 * 9 + 2 * 5, 20 * 9 + 2 * 20
    result = run(source, ARMS[LABELS_LONG])
    assert result["step_flops"] == 6 * SMALL.batch * student
    assert result["steps"] == int((16 * (3 * student + teacher) + 12 * 3 * teacher) / (3 * student))
    assert max(result["accuracy"]) > result["steps"] - SMALL.every


def test_rows_are_the_tasks(tmp_path: Path) -> None:
    inputs, labels = SMALL.rows(3, "train", 5, 20)
    support = inputs[:, : SMALL.k].prod(dim=1)
    assert torch.equal(labels[:, 0], ((1 - support * (-1) ** SMALL.k) / 2).long()) and inputs.abs().eq(1).all()
    inputs, labels = Grammar().rows(0, "train", 0, 30)
    rows = Grammar().task(0).rows("train", torch.arange(30).numpy())
    assert int((labels != IGNORE_INDEX).sum()) == int(rows.counts.sum())
    assert torch.equal(
        torch.cat((inputs[:, 1:], labels[:, -1:]), dim=1)[labels != IGNORE_INDEX], labels[labels != -100]
    )


def test_a_run_ends_at_its_target() -> None:
    curve = train(SMALL, OneHiddenLayer(9, 5), of_labels, seed=0, steps=16, target=0.0)
    assert list(curve) == [8]


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_second_call_and_known_results_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROBLEMS, "parity", SMALL)
    monkeypatch.setattr(command, "about_here", lambda: {"machine": "here", "versions": {"commit": "abc"}})
    some = ["--problems", "parity", "--arms", ONE_SHOT, TWO_SHOT, WRONG_PHASE, LABELS_LONG]
    first, published = tmp_path / "first", tmp_path / "published" / "distillation"
    published.parent.mkdir()
    assert command.main(["--output", str(first), "--seeds", "0", *some, "--publish", str(published)]) == 0
    text = published.with_suffix(".md").read_text()
    assert "## Sparse parity" in text and "## PCFG" not in text
    assert published.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(published.with_suffix(".json").read_text())["results"]) == 4

    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("it has finished"))
    monkeypatch.setattr(command, "run_together", lambda *_: pytest.fail("it has finished"))
    assert command.main(["--output", str(first), "--seeds", "0", *some]) == 0
    known = ["--known", str(published.with_suffix(".json"))]
    assert command.main(["--output", str(tmp_path / "second"), "--seeds", "0", *some, *known]) == 0
    assert not (tmp_path / "second" / "sources").exists()

    monkeypatch.setitem(PROBLEMS, "parity", replace(SMALL, steps=24))
    assert command.main(["--output", str(tmp_path / "third"), "--dry", *known]) == 0
    assert "4 of 4 results left out" in capsys.readouterr().err
    assert command.main(["--output", str(first), "--dry", "--seeds", "0"]) == 2
    assert "was measured with other sizes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not the results of this command"):
        stored.read_known([published.with_suffix(".md")])


# -- the page ---------------------------------------------------------------------------------------------------------


def result(arm: str, seed: int, reached: float, *, middle: int = 60) -> dict[str, Any]:
    """A run of 100 steps with an evaluation every 10; a source's step costs 2 of its own, and its training 300."""
    has_source = bool(ARMS[arm].first)
    return {
        "problem": "parity",
        "arm": arm,
        "seed": seed,
        "steps": 100,
        "accuracy": {str(step): 1.0 if step >= reached else 0.5 for step in range(10, 101, 10)},
        "target": 0.95,
        "step_flops": 3.0,
        "source_step_flops": 6.0 * has_source,
        "source_training_flops": 900.0 * has_source,
        "checkpoints": {"before": 30, "middle": middle, "after": 80, "last": 100},
        "source_accuracy": {"100": 1.0},
        "machine": "here",
        "versions": {"commit": "abc"},
        "seconds": 1.0,
    }


def runs(**reached: tuple[float, float]) -> list[dict[str, Any]]:
    names = {"two": TWO_SHOT, "one": ONE_SHOT, "wrong": WRONG_PHASE, "labels": LABELS_LONG}
    return [result(names[key], seed, step) for key, steps in reached.items() for seed, step in enumerate(steps)]


NEVER = math.inf


def test_the_goal_is_judged_seed_by_seed() -> None:
    assert "**met**" in verdict(runs(two=(30, 40), one=(NEVER, 100), wrong=(NEVER, 60)), "parity")
    assert "**met in part**" in verdict(runs(two=(30, 60), one=(NEVER, 100), wrong=(NEVER, NEVER)), "parity")
    assert "**missed**" in verdict(runs(two=(60, NEVER), one=(80, NEVER), wrong=(NEVER, NEVER)), "parity")
    assert "**missed**" in verdict(runs(two=(30, 30), one=(NEVER, 100), wrong=(30, 30)), "parity")
    same = [replace_middle(each) for each in runs(two=(30, 30), one=(NEVER, 100), wrong=(30, 30))]
    assert "**no test of it**" in verdict(same, "parity")


def replace_middle(each: dict[str, Any]) -> dict[str, Any]:
    return each | {"checkpoints": each["checkpoints"] | {"middle": each["checkpoints"]["before"]}}


def test_costs_are_charged_and_bounds_are_marked() -> None:
    own = {0: result(TWO_SHOT, 0, 50)}
    steps = 49  # linear between the evaluations at 40 and 50
    assert in_steps(own) == [pytest.approx(3 * steps)]
    assert in_steps(own, 5) == [pytest.approx(3 * steps + 60)] and in_steps(own, 1) == [pytest.approx(3 * steps + 300)]
    assert row({0: result(ONE_SHOT, 0, NEVER)}, planned=5)[:2] == ["0 of 1 (of 5)", "> 100"]
    text = page(runs(two=(30, 30), one=(NEVER, 100), wrong=(NEVER, NEVER), labels=(70, 70)), command="c", planned=2)
    assert "a source that is there: 0 of 2; one of five students: 0 of 2; alone: 0 of 2" in text
    assert "No run has finished" in page([], command="c", planned=5)


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_text_arms_are_runs_that_the_section_accepts() -> None:
    for scale in (rules.FULL, rules.REHEARSAL):
        folders = set()
        for task in rules.tasks_of(list(rules.ARMS), 3, scale):
            assert folders.issuperset(task.needs), "each after those that it needs"
            folders.add(task.folder)
            if "distillation" in task.config:
                section = DistillationConfig(**task.config["distillation"])
                section.validate()
                section.check_used()
    assert len([name for name in folders if name.startswith("runs/")]) == len(rules.ARMS)


def text_results(**finals: float) -> list[dict[str, Any]]:
    about = {"machine": "here", "versions": {"commit": "abc"}, "seed": 0, "train_seconds": 1.0}
    found: list[dict[str, Any]] = [
        about | {"role": "source", "steps": 600, "parameters": 60},
        *(
            about | {"role": "targets", "kind": "draws", "step": step, "step_equivalents": 50.0}
            for step in range(100, 601, 100)
        ),
    ]
    for name, loss in finals.items():
        curve = {"100": 3.0, "200": loss}
        arm = {"labels": "labels", "final": "final, a = 0.5", "even": "even, a = 0.5"}[name]
        run = {"role": "student", "arm": arm, "parameters": 10, "steps": 420 if name != "labels" else 600}
        found.append(about | run | {"curves": {"python": curve, "cpp": curve}})
    return found


def test_the_text_page_charges_the_source_to_one_student_and_to_five() -> None:
    found = text_results(labels=2.0, final=1.9, even=2.1)
    assert table.cost(found, "labels", rules.FULL, sharing=1) == 600
    assert table.cost(found, "final, a = 0.5", rules.FULL, sharing=1) == 420 + 6 * (600 + 50)
    assert table.cost(found, "even, a = 0.5", rules.FULL, sharing=5) == 420 + 6 * (600 + 6 * 50) / 5
    text = table.page(found, command="c", scale=rules.FULL, planned=3)
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| met |" in lines["final, a = 0.5"] and "| missed |" in lines["even, a = 0.5"]
    assert "Missing: labels" in text


def test_known_students_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["labels", "final, a = 0.5", "two_shot, a = 0.5"]
    tasks = rules.tasks_of(arms, 0, rules.FULL)
    kept, other = rules.arm_task("two_shot, a = 0.5", 0, rules.FULL), rules.arm_task("labels", 0, rules.REHEARSAL)
    file = tmp_path / "known.json"
    content = [{"folder": task.folder, "config": task.config, "seed": 0} for task in (kept, other)]
    content.append({"folder": "runs/labels/seed-7", "config": {}, "seed": 7})  # not asked for: nothing to tell
    file.write_text(json.dumps({"results": content}))
    known = text_command.read_known([file], [0], rules.FULL)
    told = capsys.readouterr().err
    assert set(known) == {kept.folder} and "of another configuration: runs/labels" in told and "seed-7" not in told
    wanted = [task.labels for task in text_command.needed(tasks, known)]
    assert [each["step"] for each in wanted if each["role"] == "targets"] == [600]
    assert [each["arm"] for each in wanted if each["role"] == "student"] == arms[:2]
