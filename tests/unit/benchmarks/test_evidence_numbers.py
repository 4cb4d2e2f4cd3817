"""The single-pass experiment's rules, numbers, goals and tables, on synthetic results."""

import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from synthetic_results import result, rows

from benchmarks.common import intervals
from benchmarks.single_pass import __main__ as evidence
from benchmarks.single_pass import corpora, goals, numbers, rules, table
from titan_attent.foundations.toml import to_toml
from titan_attent.job_config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_validates_at_its_last_step(name: str) -> None:
    for corpus in corpora.CORPORA:
        task = rules.rule_task(corpus, name, 3)
        assert tomllib.loads(to_toml(task.config)) == task.config
        check_config(TeacherConfig(**task.config["teacher"]))
        assert task.steps % task.config["validation"]["freq"] == 0 and task.steps <= 400
        assert task.steps % task.config["metrics"]["log_freq"] == 0


def test_the_runs_are_those_that_a_rule_is_for_and_that_are_not_known() -> None:
    everything = Namespace(rules=list(rules.RULES), corpora=list(corpora.CORPORA))
    known = {"runs/junk/difference/seed-1", "runs/web/difference_87/seed-0"}
    tasks = {task.folder: task for task in evidence.runs(everything, 1, known, {"junk": "abc"})}
    found = tasks.keys()
    shorter = {
        "difference_87": ["near_duplicates", "web"],
        "difference_67": ["junk", "near_duplicates", "target", "web"],
        "difference_55": ["junk", "near_duplicates", "target"],
        "top_67": ["near_duplicates"],
        "dedup_67": ["near_duplicates"],
    }
    assert found | {"runs/junk/difference/seed-1"} == {
        f"runs/{corpus}/{rule}/seed-1" for rule in rules.RULES for corpus in shorter.get(rule, corpora.CORPORA)
    }
    assert "runs/junk/difference/seed-1" not in found
    labels = tasks["runs/junk/uniform/seed-1"].labels  # what its result will hold
    assert labels["rule"] == "uniform" and labels["data_fingerprint"] == {"junk": "abc", "validation-code": None}


def test_other_scorers_are_another_run_of_what_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def configs() -> dict[str, object]:
        tasks = {name: rules.rule_task("junk", name, 0) for name in rules.RULES}
        return {
            name: task.config
            for name, task in (tasks | {"scorers": rules.scorers_task("junk", 0, data="junk")}).items()
        }

    before = configs()
    monkeypatch.setattr(rules, "SCORED_BY", "scorers: of another kind")
    changed = {name for name, config in configs().items() if config != before[name]}
    assert changed == set(before) - {"uniform", "dedup"}


# -- costs ------------------------------------------------------------------------------------------------------------


def test_a_rule_is_charged_the_larger_of_operations_and_seconds() -> None:
    uniform = [
        result("uniform", "junk", seed, 3.0, last={"ledger/train_seconds": 400 * pace})
        for seed, pace in enumerate((0.2, 0.25, 5.0))
    ]
    scorers = {"scorer_share": 0.05, "scorer_seconds": 4.0}
    rows_of = {
        "seconds": result("difference", "junk", 0, 3.0, scorer_share=0.02, scorer_seconds=4.0),
        "operations": result("difference_55", "junk", 0, 3.0, **scorers),
        "half": result("attainment", "junk", 0, 3.0, **scorers),
        "the middle": result("perplexity", "junk", 0, 3.0, **scorers),
        "none": result("dedup", "junk", 0, 3.0, **scorers),
        "no uniform": result("difference", "web", 0, 3.0, wall_seconds=200.0, last={}, **scorers),
    }
    charged = numbers.charge([*uniform, *rows_of.values()])[3:]
    steps = dict(zip(rows_of, (r["scorer_steps"] for r in charged), strict=True))
    # 4 seconds at uniform's median pace of a quarter of a second; 5% of 400 steps.
    assert steps == {
        "seconds": 16.0, "operations": 20.0, "half": 10.0, "the middle": 10.0, "none": 0.0, "no uniform": 20.0
    }  # fmt: skip


def test_the_scorers_are_shared_by_runs() -> None:
    own = [result("difference_67", "junk", seed, 3.0, scorer_steps=steps) for seed, steps in enumerate((8.0, 12.0))]
    assert numbers.compute_of(own, "difference_67", "junk") == pytest.approx((0.7, 0.025))
    assert numbers.compute_of(own, "difference_67", "junk", runs=5) == pytest.approx((0.68, 0.005))
    assert numbers.compute_of(own, "difference_67", "web") is None
    (row,) = rows(table.make_costs(own))
    assert row == ["difference_67", "270", "10.0", "2.0", "280", "297", "0.0"]


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_of_equal_seeds_and_their_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    uniform, own = rng.normal(3.0, 0.1, 4), rng.normal(2.9, 0.1, 4)
    made = [result("uniform", "junk", seed, loss) for seed, loss in enumerate(uniform)]
    made += [result("difference", "junk", seed + 1, loss) for seed, loss in enumerate(own)]
    found = numbers.paired(numbers.all_losses(made), "difference", "junk")
    expected = own[:3] - uniform[1:]
    assert found == pytest.approx(expected)
    assert intervals.half_width(found) == pytest.approx(4.302653 * expected.std(ddof=1) / math.sqrt(3))
    text = f"{expected.mean():+.3f} ± {4.303 * expected.std(ddof=1) / math.sqrt(3):.3f}"
    assert rows(table.make_table(made)) == [["uniform", f"{uniform.mean():.3f}"], ["difference", text]]


def test_a_column_for_each_kind_and_the_number_of_few_seeds() -> None:
    made = [
        result("uniform", "web", 0, 3.5),
        result("uniform", "minority", 0, 3.0, kinds={"code": 2.5, "russian": 3.5}),
        result("difference", "minority", 0, 3.1, kinds={"code": 2.4, "russian": 3.8}),
        result("dedup", "web", 1, 3.0),  # without a control
    ]
    text = table.make_table(made)
    assert text.split("\n")[0] == "| rule | minority | minority: code | minority: russian | web |"
    assert rows(text) == [
        ["uniform", "3.000", "2.500", "3.500", "3.500"],
        ["difference", "+0.100 [1]", "-0.100 [1]", "+0.300 [1]", "-"],
    ]


# -- where uniform ended ----------------------------------------------------------------------------------------------


def test_when_a_run_reached_uniforms_final_loss() -> None:
    made = [
        *(result("uniform", "junk", seed, loss) for seed, loss in enumerate((3.0, 2.5, 2.0))),
        # From 4.0 at step 200 to 2.0 at 400: at 3.0, 2.5 and 2.0 at steps 300, 350 and 400.
        result("difference", "junk", 0, 2.0, validation_loss={"400": 2.0, "1": 7.0, "200": 4.0}),
        result("difference", "junk", 1, 2.0, validation_loss={"1": 7.0, "200": 4.0, "400": 2.0}),
        result("difference", "junk", 2, 2.0, validation_loss={"1": 7.0, "200": 4.0, "400": 2.5}),  # never
        result("difference", "junk", 3, 0.0),  # without a control
        result("attainment", "junk", 0, 4.0),
        result("attainment", "junk", 1, 1.0, last={}, wall_seconds=800.0),
        result("perplexity", "web", 0, 1.0),
        result("difference_55", "junk", 0, 1.0),  # has fewer steps
    ]
    assert numbers.reached(made[3], 3.0) == pytest.approx(300) and numbers.reached(made[5], 2.4) == math.inf
    assert rows(table.make_times(made)) == [
        ["uniform", "400 (1.23 M, 400 s)"],
        ["difference", "350 (1.08 M, 350 s)"],  # the median of 300, 350 and never
        ["attainment", "-"],  # of 250 and never
    ]
    # Between 7.0 at step 1 and 2.0 at 200; without seconds in its ledger a step takes 2 s, validation included.
    step = 1 + 199 * (7.0 - 2.5) / (7.0 - 2.0)
    seldom = numbers.time_to_uniform([made[8]], {1: 2.5})
    assert seldom == pytest.approx((step, step * 3072, 2 * step))


# -- the forecast -----------------------------------------------------------------------------------------------------


def test_the_forecast_pairs_what_was_left_out_with_the_gain() -> None:
    rng = np.random.default_rng(1)
    made, pairs = [], []
    for corpus in ("clean", "junk", "web"):
        for seed in range(2):
            kept, gain = rng.uniform(0.3, 1.0), rng.normal(0.2, 0.1)
            made += [
                result("uniform", corpus, seed, 3.0),
                result("difference", corpus, seed, 3.0 - gain, last={"teacher/ratio": kept}),
                result("attainment", corpus, seed, 1.0, last={"teacher/ratio": 0.1}),
            ]
            pairs.append((1 - kept, gain))
    made.append(result("difference", "copies", 0, 1.0))  # without a control
    text = table.make_forecast(made)
    shares, gains = np.array(pairs).reshape(3, 2, 2).mean(axis=1).T
    assert rows(text) == [
        [corpus, f"{share:.1%}", f"{gain:+.3f}", "2"]
        for corpus, share, gain in zip(("clean", "junk", "web"), shares, gains, strict=True)
    ]
    expected = np.corrcoef(np.array(pairs).T)[0, 1]
    assert text.endswith(f"Pearson's correlation over 6 (corpus, seed): {expected:.2f}.")


def test_a_correlation_of_too_little_is_none() -> None:
    assert math.isnan(numbers.correlation([(0.0, 1.0), (0.5, 2.0)]))
    assert math.isnan(numbers.correlation([(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)]))
    assert table.make_forecast([]).endswith("over 0 (corpus, seed): too few pairs.")


# -- goals ------------------------------------------------------------------------------------------------------------


def goals_of(made: list[dict]) -> dict[tuple[str, str], list[str]]:
    return {(row[0], row[1]): row[2:] for row in rows(goals.make_goals(made))}


def with_uniform(corpus: str, rule: str, differences: list[float], **more: float) -> list[dict]:
    made = [result("uniform", corpus, seed, 3.0) for seed in range(len(differences))]
    return made + [result(rule, corpus, seed, 3.0 + d, **more) for seed, d in enumerate(differences)]


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.10, -0.11, -0.12], "met"),
        ([-0.10, 0.01, -0.12], "likely"),  # -0.07 ± 0.17
        ([-0.10], "likely"),  # no interval
        ([0.01, 0.02, 0.01], "missed"),
    ],
)
def test_the_verdict_on_a_saving(differences: list[float], verdict: str) -> None:
    found = goals_of(with_uniform("junk", "difference_67", differences))
    assert list(found) == [("30% less compute on junk, one run", "difference_67")]
    ((compute, scorers, text, shown),) = found.values()
    assert (compute, scorers, shown) == ("0.675", "0.000", verdict)
    assert text.startswith(f"{np.mean(differences):+.3f}")


def test_a_saving_is_judged_by_the_most_compute_that_it_allows() -> None:
    made = with_uniform("junk", "difference_67", [0.1], scorer_steps=13.0)  # 0.7075: too much for one run, and of five
    made += with_uniform("junk", "difference_55", [-0.2], scorer_steps=8.0)[1:]  # 0.57, of five 0.554
    made += with_uniform("junk", "difference", [-0.9])[1:] + with_uniform("junk", "dedup", [-0.9], steps=240)[1:]
    found = goals_of(made)
    assert found == {
        ("30% less compute on junk, one run", "difference_55"): ["0.570", "0.020", "-0.200", "likely"],
        ("45% less compute on junk, of five runs", "difference_55"): ["0.554", "0.004", "-0.200", "likely"],
    }
    cheaper = [r | {"scorer_steps": 1.2} if r["rule"] == "difference_67" else r for r in made]
    row = goals_of(cheaper)["30% less compute on junk, one run", "difference_67"]
    assert row == ["0.678", "0.003", "+0.100", "missed"]  # though a shorter one does better


def test_no_harm_is_a_small_difference_and_cheap_scorers() -> None:
    made = with_uniform("clean", "difference", [0.006, 0.004], scorer_steps=8.0)
    made += with_uniform("clean", "attainment", [0.0], scorer_steps=8.4)[1:]
    kinds = [{"code": 2.5, "russian": 3.5}, {"code": 2.4, "russian": 3.6}]
    pairs = zip(("uniform", "attainment"), kinds, strict=True)
    made += [result(rule, "minority", 0, 3.0, kinds=k) for rule, k in pairs]
    found = goals_of(made)
    assert {key: row[-1] for key, row in found.items()} == {
        ("no harm on clean", "difference"): "met",
        ("no harm on clean", "attainment"): "missed",  # 2.1% of the compute
        ("no harm on minority", "attainment"): "met",
        ("no harm on minority: code", "attainment"): "met",
        ("no harm on minority: russian", "attainment"): "missed",
    }
    assert found["no harm on clean", "difference"][:2] == ["1.020", "0.020"]


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_it_is_and_where_it_was_made(tmp_path: Path) -> None:
    made = with_uniform("junk", "difference", [-0.1, -0.2])
    made[0]["versions"] = {"titan_attent": "0.1.0", "commit": "def"}
    made[3]["trained_kinds"] = {"code": 0.5, "random": 0.5}
    duplicates = {"junk": {"rows": 200, "equal": 1, "window": 2, "minhash": 50}}
    text = table.report(tmp_path, made, duplicates=duplicates, command="the command")
    assert (tmp_path / "table.md").read_text() == text
    assert text.startswith("# A single pass, all costs charged\n\nSeeds 0, 1.")
    end = text[text.index("- 4 runs, ") :].split("\n")
    assert end[0] == f"- 4 runs, {4 * 480 / 3600:.1f} core-hours; `the command`" and end[1] == "- machine: a machine"
    assert {line[-3:] for line in end[2:-1]} == {"abc", "def"}
    assert "| junk | 200 | 0.5% | 1.0% | 25.0% |" in text
    assert "| junk | code | 100.0% | 75.0% | - | - |" in text
    assert table.report(tmp_path, [], duplicates={}, command="").startswith("# A single pass")
