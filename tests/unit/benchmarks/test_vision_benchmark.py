"""The vision experiment: its rules and their costs, its tasks, and its numbers and tables on synthetic results."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common.runner import load_result
from benchmarks.vision import __main__ as vision
from benchmarks.vision import data, numbers, pictures, rules, table, tasks
from titan_attent.foundations.toml import to_toml
from titan_attent.models.vision.config import VisionConfig
from titan_attent.models.vision.vit import ViTArgs
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config
from titan_attent.systems.teaching.schedule import repeat_bound

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


SEEDS = (0, 1, 2, 3, 4)
COUNTS = [100, 80, 60, 50, 40, 30, 25, 20, 15, 10]


def result(rule: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """A digits run of 10 steps per second whose accuracy rises linearly to its last."""
    condition = more.pop("condition", "clean")
    steps = rules.steps_of(rules.RULES[rule], rules.SETS["digits"], rows=1078)
    run = tasks.rule_run("digits", condition, rule, seed, rows=1078)
    made = {
        **run.labels,
        **{"config": run.config, "steps": steps, "final_accuracy": accuracy, "class_counts": COUNTS},
        **{"accuracy": {"1": 0.0, str(steps): accuracy}, "step_equivalents": float(steps), "dirt_trained": None},
        **{"class_accuracy": [accuracy] * 10, "train_seconds": steps / 10, "teaching_seconds": 0.0},
        **{"process_seconds": 36.0, "machine": "a machine", "versions": {"commit": "abc"}},
    }
    return made | more


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize("set_name", rules.SETS)
def test_a_rule_is_valid_and_spends_what_it_may(name: str, set_name: str) -> None:
    rule, task = rules.RULES[name], rules.SETS[set_name]
    for condition in filter(rule.is_for, rules.CONDITIONS):
        run = tasks.rule_run(set_name, condition, name, 3, rows=task.rows)
        assert tomllib.loads(to_toml(run.config)) == run.config
        check_config(TeacherConfig(**run.config["teacher"]))
        VisionConfig(**run.config["vision"]).validate()
        assert run.steps % run.config["validation"]["freq"] == 0 and run.steps % run.config["metrics"]["log_freq"] == 0
        assert run.config["checkpoint"]["enable"] == (condition == "long_tail")
        spent = rules.compute_of(rule, task, rows=task.rows, steps=run.steps)
        assert rule.share * task.steps - 0.05 * task.steps < spent <= rule.share * task.steps + 1e-6
        assert "<" not in str(run.config)


@pytest.mark.parametrize("name", ["scorers_70", "attainment_80"])
def test_many_passes_leave_out_what_the_scores_say(name: str) -> None:
    """The default of max_repeats, 4, would leave out nothing in 18 passes."""
    run = tasks.rule_run("digits", "copies", name, 0, rows=1078)
    config = TeacherConfig(**run.config["teacher"])
    free, bounded = (
        repeat_bound(bound, num_examples=1078, batch_size=rules.BATCH_SIZE, total_steps=run.steps).min_ratio
        for bound in (config, replace(config, max_repeats=0.0))
    )
    assert free == rules.BATCH_SIZE / 1078 and bounded == 1.0


def test_the_quickstart_leaves_out_what_the_scores_say() -> None:
    keys = tomllib.loads((Path(__file__).parents[3] / "train_configs" / "quickstart_vision.toml").read_text())
    steps, batch = keys["training"]["steps"], keys["training"]["global_batch_size"]
    config = TeacherConfig(**keys["teacher"])
    assert repeat_bound(config, num_examples=1438, batch_size=batch, total_steps=steps).min_ratio < 0.5


def test_results_from_before_max_repeats_are_known(tmp_path: Path) -> None:
    """They differ only in max_repeats, which they lack; a run with another value is another run."""
    made = result("attainment_80", 0, 0.9)
    teacher = {key: value for key, value in made["config"]["teacher"].items() if key != "max_repeats"}
    before = made | {"config": made["config"] | {"teacher": teacher}}
    for name, config in (("before", before["config"]), ("now", made["config"])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"results": [made | {"config": config}]}))
        assert list(vision.read_known([path], None)) == ["runs/digits/clean/attainment_80/seed-0"]
    run = tasks.rule_run("digits", "clean", "attainment_80", 0, rows=1078)
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / "result.json").write_text(json.dumps(before))
    assert load_result(tmp_path, run) == before
    other = made["config"] | {"teacher": teacher | {"max_repeats": 4.0}}
    (tmp_path / "other.json").write_text(json.dumps({"results": [made | {"config": other}]}))
    with pytest.raises(ValueError, match="other settings"):
        vision.read_known([tmp_path / "other.json"], None)


def test_every_control_is_run_where_it_is_needed() -> None:
    for condition in rules.CONDITIONS:
        here = {name for name, rule in rules.RULES.items() if rule.is_for(condition)}
        assert {f"uniform_{round(100 * rules.RULES[name].share)}" for name in here} <= here | {"uniform_100"}


def test_scoring_is_counted_round_by_round() -> None:
    assert rules.num_scored(rules.HARD, rows=1078, steps=240) == 0
    assert rules.num_scored(rules.ATTAINMENT, rows=1078, steps=240) == 1078
    # Ratio 1/2 of 640 rows gives 5 steps per pass, 2 passes per round: 10 rounds in 100 steps.
    teacher = rules.PAPER | {"ratio_schedule": "constant", "initial_ratio": 0.5, "interval_schedule": "fixed"}
    assert rules.num_scored(teacher, rows=640, steps=100) == 10 * 640
    assert rules.num_scored(teacher, rows=640, steps=101) == 11 * 640
    rule, task = rules.Rule(about="", teacher=teacher, share=0.5), rules.SETS["digits"]
    # A round of 10 steps costs 640 / 64 / 3 steps more.
    assert rules.compute_of(rule, task, rows=640, steps=100) == pytest.approx(100 + 10 * 10 / 3)
    assert rules.steps_of(rule, task, rows=640) == 110
    with pytest.raises(ValueError, match="costs more"):
        rules.steps_of(rules.Rule(about="a rule", teacher=teacher, share=0.01), task, rows=64_000)


@pytest.mark.parametrize("name, side", [("digits", 8), ("fashion", 28)])
def test_scorers_are_charged_by_their_flops(name: str, side: int) -> None:
    task = rules.SETS[name]
    learner, scorer = (
        ViTArgs(dim=64, n_layers=4, n_heads=4, image_size=side, channels=1, **chosen).flops_per_image()
        for chosen in (task.vision, task.scorer_vision)
    )
    assert task.flavor == "tiny" and task.scorer_cost == pytest.approx(scorer / learner, abs=1e-3)
    images = task.scorer_steps * task.scorer_batch + (task.rows + task.held_out) / 3
    charge = task.scorer_cost * images / 64
    assert rules.scorers_charge(rules.RULES["excess_70"], task) == pytest.approx(charge)
    assert rules.scorers_charge(rules.RULES["scorers_70"], task) == pytest.approx(2 * charge)
    assert rules.scorers_charge(rules.RULES["hard_70"], task) == 0


def test_scorers_are_made_in_order() -> None:
    made = tasks.scorer_runs("digits", "copies", 1)
    folders = [run.folder for run in made]
    for place, run in enumerate(made):
        assert set(run.needs) <= {*folders[:place], tasks.data_folder("digits", "copies", 1)}
    reading = tasks.rule_run("digits", "copies", "scorers_70", 1, rows=1078)
    written = {run.arguments[run.arguments.index("--output") + 1] for run in made if run.arguments}
    assert {f"{reading.config['teacher']['scores']}/{role}" for role in ("expert", "amateur")} < written
    assert {run.folder for run in made if run.module == "titan_attent.score"} < set(reading.needs)


# -- data -------------------------------------------------------------------------------------------------------------


def test_what_a_condition_does_to_images() -> None:
    images = data.ImageSet(np.zeros((400, 8, 8), np.uint8), np.arange(400) % 10, tuple("0123456789"))
    for condition in rules.CONDITIONS:
        options = tasks.data_task("digits", condition, 2).config["data"]
        made, dirty = data.soil(images, condition, 2, options)
        assert len(dirty) == len(made.labels) == len(made.images)
        assert dirty.sum() == {"wrong_labels": 80, "copies": 200}.get(condition, 0)
        assert (len(dirty) < 400) == (condition == "long_tail")
        if condition == "wrong_labels":
            assert np.array_equal(made.labels != images.labels, dirty)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_interval() -> None:
    found = numbers.interval([0.01, 0.02, 0.03])
    assert found.mean == pytest.approx(0.02) and found.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert found.points() == "+2.00 ± 2.48" and numbers.interval([]) is None
    assert math.isnan(numbers.interval([0.1]).half) and numbers.interval([0.1]).points(sign=False) == "10.00"


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    made = [result("uniform", seed, 0.9 + seed / 100) for seed in (0, 1)]
    made += [result("hard_80", seed, 0.91 + seed / 100) for seed in (1, 2)]
    own = numbers.Runs(made, "digits", "clean")
    found = own.difference("hard_80", "uniform")
    assert found.mean == pytest.approx(0.01) and math.isnan(found.half) and found.n == 1
    assert own.difference("uniform", "uniform") is None and own.difference("hard_80", "uniform_80") is None
    assert own.rules == ["uniform", "hard_80"] and own.compute("hard_80") == pytest.approx(0.8)


def test_time_to_uniform_charges_scoring() -> None:
    made = [result("uniform", 0, 0.8), result("attainment_80", 0, 1.0, step_equivalents=250.0, teaching_seconds=2.0)]
    own = numbers.Runs(made, "digits", "clean")
    steps = made[1]["steps"]
    step, images, seconds = own.time_to_uniform("attainment_80")
    assert step == pytest.approx(1 + 0.8 * (steps - 1))
    assert images == pytest.approx(64 * (step + 250 - steps)) and seconds == pytest.approx(step / 10 + 2)
    never = numbers.Runs([result("uniform", 0, 0.8), result("hard_80", 0, 0.7)], "digits", "clean")
    assert table.time_text(never.time_to_uniform("hard_80")) == "-"


@pytest.mark.parametrize(
    "full, equal, verdict",
    [
        ((-0.001, 0.002), (0.01, 0.002), "met"),
        ((0.01, 0.002), (0.01, 0.02), "equal, but so is shorter uniform"),
        ((-0.01, 0.002), (0.01, 0.002), "better than shorter uniform only"),
        ((-0.01, 0.002), (0.0, 0.002), "missed"),
        ((-0.3, 0.4), (0.0, 0.4), "missed"),
        ((0.0, math.nan), (0.0, math.nan), "one seed"),
    ],
)
def test_verdict_on_a_saving(full: tuple[float, float], equal: tuple[float, float], verdict: str) -> None:
    assert numbers.judge_saving(numbers.Interval(*full, 5), numbers.Interval(*equal, 5)) == verdict


def test_verdicts_by_the_numbers() -> None:
    noise = (0.0, 0.002, -0.002, 0.001, -0.001)
    made = []
    for seed in SEEDS:
        made += [result("uniform", seed, 0.9), result("uniform_80", seed, 0.88)]
        made += [result("hard_80", seed, 0.9 + noise[seed]), result("soft_80", seed, 0.85 + noise[seed])]
        for rule, rare in (("uniform", 0.7), ("hard_80", 0.699 + noise[seed]), ("soft_80", 0.6)):
            accuracies = [0.9] * 5 + [rare] * 5
            made.append(result(rule, seed, 0.8, condition="long_tail", class_accuracy=accuracies))
    found = {(one.goal, one.rule): one.verdict for one in numbers.verdicts(made, "digits")}
    assert found == {
        ("20% less compute, clean", "hard_80"): "met",
        ("20% less compute, clean", "soft_80"): "missed",
        ("rare classes not harmed", "hard_80"): "met",
        ("rare classes not harmed", "soft_80"): "missed",
    }
    text = table.report(made, command="a command")
    assert "- 20% less compute, clean: met by the best, hard_80" in text
    assert "| hard_80 | 240 | 0.800 | 90.00 ± 0.20 | +0.00 ± 0.20 | +2.00 ± 0.20 | 240 (15.4 k, 24.0 s) |  |" in text
    assert "The best rule for them, hard_80, class by class" in text


def test_rare_classes_are_the_half_with_fewest_images() -> None:
    accuracies = [i / 10 for i in range(10)]
    assert numbers.rare_accuracy({"class_counts": COUNTS, "class_accuracy": accuracies}) == pytest.approx(0.7)
    assert numbers.rare_accuracy({"class_counts": COUNTS[::-1], "class_accuracy": accuracies}) == pytest.approx(0.2)


# -- files ------------------------------------------------------------------------------------------------------------


def test_known_results_stand_beside_those_of_the_folder(tmp_path: Path) -> None:
    elsewhere, here = [result("uniform", 1, 0.9), result("hard_80", 0, 0.1)], result("uniform", 0, 0.7)
    (tmp_path / "there").mkdir()
    vision.write_all(tmp_path / "there", elsewhere, command="")
    folder = tmp_path / "here" / tasks.rule_run("digits", "clean", "uniform", 0, rows=1078).folder
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(vision.json.dumps(here))
    file = tmp_path / "there" / "results.json"
    known = vision.read_known([file], None)
    found = vision.gather(tmp_path / "here", known=known, lr=None)
    assert [(r["rule"], r["seed"]) for r in found] == [("uniform", 0), ("uniform", 1), ("hard_80", 0)]
    with pytest.raises(ValueError, match="other settings"):
        vision.read_known([file], 0.5)
    with pytest.raises(ValueError, match="optimizer.lr"):
        vision.gather(tmp_path / "here", known={}, lr=0.5)
    assert (tmp_path / "there" / "accuracy-digits.png").stat().st_size > 10_000
    assert "Nothing has finished" in table.report([], command="")
    arguments = ["--output", "x", "--conditions", "clean", "--rules", "uniform", "hard_80", "--seeds", "0", "1"]
    args = vision.parse_args(arguments)
    missing = [(run.labels["rule"], run.labels["seed"]) for run in vision.all_runs(args, known) if run.labels]
    assert missing == [("uniform", 0), ("hard_80", 1)]


def test_every_rule_has_a_look_of_its_own() -> None:
    kinds = {rule.rsplit("_", 1)[0] for rule in rules.RULES if rules.RULES[rule].teacher["strategy"] != "uniform"}
    assert kinds == set(pictures.LOOKS) and len(set(pictures.LOOKS.values())) == len(kinds)
