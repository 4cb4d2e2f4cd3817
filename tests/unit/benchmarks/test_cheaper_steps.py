"""The rules of benchmarks/cheaper_steps, and the steps that follow from the savings of other rules."""

import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torchtitan.models.llama3 import Transformer

from benchmarks.cheaper_steps import __main__ as benchmark
from benchmarks.cheaper_steps import curves, ends, rules
from benchmarks.cheaper_steps import table as tables
from benchmarks.speed import gpu_steps as gpu
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.policy import History, decide
from titan_attent.systems.freezing.units import backward_flops, find_units, saved_flops
from titan_attent.systems.highway.account import HighwayAccount
from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.titan.models.flavors import EXTRA_FLAVORS


def made(tmp_path: Path, *rules: str) -> Any:
    args = benchmark.parse_args(["--output", str(tmp_path), "--rules", *rules, "--seeds", "0", "1", "--steps", "400"])
    return benchmark.Benchmark(args)


def finish(run: Any, monkeypatch: pytest.MonkeyPatch, numbers: dict[tuple[str, int], dict[str, Any]]) -> None:
    """As if these runs had ended: loss, seconds per step, share of a step saved."""
    scalars = {}
    for (name, seed), got in numbers.items():
        task = run.task(name, seed, run.steps_of(name) if name not in ("flops_of_prefix",) else 320)
        folder = run.args.output / task.folder
        folder.mkdir(parents=True)
        losses = {1: 7.0, 200: got["loss"] + 0.5, task.steps: got["loss"]}
        result = {"config": task.config, "final_validation_loss": got["loss"], "validation_loss": losses}
        (folder / "result.json").write_text(json.dumps(result))
        system, saved = got.get("system", "freezing"), got.get("saved", 0.0)
        scalars[folder] = {
            benchmark.SECONDS: dict.fromkeys((1, *range(40, 401, 40)), got["step"]) | {1: 99.0, 40: 99.0},
            f"{system}/saved_of_step": {200: 0.0, 400: saved},
            f"{system}/saved_of_backward": {400: 1.5 * saved},
        }
    monkeypatch.setattr(benchmark, "read_run", lambda folder: type("Run", (), {"scalars": scalars[folder]}))


def test_every_rule_is_a_good_configuration(tmp_path: Path) -> None:
    run = made(tmp_path, "modules", "highway")
    assert run.args.rules == list(benchmark.RULES)
    for name in run.args.rules:
        config = run.task(name, 0, 400).config
        FreezingConfig(**config.get("freezing", {})).validate()
        assert config.get("freezing", {}).get("warmup_steps", 1) in (1, 60, 200)
        HighwayConfig(**config.get("highway", {})).validate()
        assert ("freezing" in config or "highway" in config) == bool(benchmark.RULES[name].sections(400))


def test_a_method_brings_its_control_and_a_rule_what_it_follows(tmp_path: Path) -> None:
    assert made(tmp_path, "flops_of_prefix").args.rules == ["exact", "prefix", "flops_of_prefix"]
    assert {benchmark.RULES[name].method for name in made(tmp_path, "highway").args.rules} == {"", "highway"}
    with pytest.raises(SystemExit):
        made(tmp_path, "prefixx")


def test_steps_that_follow_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, "flops_of_prefix", "seconds_of_prefix")
    assert run.steps_of("prefix") == 400 and run.steps_of("flops_of_prefix") == 0
    numbers = {("exact", seed): {"loss": 3.0 + seed, "step": 1.0} for seed in (0, 1)}
    numbers |= {("prefix", seed): {"loss": 3.1 + seed, "step": 0.7, "saved": 0.21} for seed in (0, 1)}
    finish(run, monkeypatch, numbers)
    assert run.steps_of("flops_of_prefix") == 320  # 0.79 of 400, by twenties
    assert run.steps_of("seconds_of_prefix") == 280
    text = tables.table(run.results(), seeds=[0, 1], where="here")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if " | " in line}
    assert rows["exact"][2:4] == ["3.0000", "4.0000"] and rows["prefix"][2:4] == ["3.1000", "4.1000"]
    assert rows["prefix"][4].startswith("+0.100") and rows["prefix"][5] == "+2.86%"
    assert rows["prefix"][6:11] == ["31.5%", "21.0%", "0.7000", "30.0%", "30.0% |"]
    assert "flops_of_prefix" not in rows


def test_the_files_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, "highway_0", "prefix")
    numbers = {("exact", seed): {"loss": 3.0 + seed, "step": 1.0} for seed in (0, 1)}
    numbers |= {("prefix", seed): {"loss": 3.1 + seed, "step": 0.7, "saved": 0.21} for seed in (0, 1)}
    numbers |= {("highway_0", 0): {"loss": 3.2, "step": 0.75, "saved": 0.2, "system": "highway"}}
    finish(run, monkeypatch, numbers)
    text = run.write()
    assert (tmp_path / "table.md").read_text() == text
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["rows"]["highway_0"]["of_step"] == 0.2 and found["rows"]["highway_0"]["half_width"] is None
    assert found["rows"]["prefix"]["seeds"]["1"]["loss"] == 4.1
    assert found["rows"]["prefix"]["half_width"] == pytest.approx(0, abs=1e-9)
    assert [one["rule"] for one in found["goals"]["highway"]] == ["highway_0"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert ends.end(found["rows"]["highway_0"]) == pytest.approx((400 * 0.8, 3.2 - 3.0, 0.0))
    assert ends.main([str(tmp_path / "table.json"), str(tmp_path / "ends.png")]) == 0
    assert (tmp_path / "ends.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        ends.main([str(tmp_path / "other.json"), str(tmp_path / "ends.png")])
    assert "other.json: not the results of this benchmark" in capsys.readouterr().err


def test_seconds_of_steps_that_are_not_exact() -> None:
    paces = {1: 9.0, 10: 9.0, 20: 0.5, 30: 0.7, 40: 1.0, 50: 1.0}
    is_exact = {step: float(step > 30) for step in paces}
    found = benchmark.numbers_of({benchmark.SECONDS: paces, benchmark.IS_EXACT: is_exact}, steps=50)
    assert found["step"] == pytest.approx(0.85) and found["cut_step"] == pytest.approx(0.6)
    assert found["seconds"] == pytest.approx(0.8 * 50)
    assert found["seconds_at"] == pytest.approx({0: 0, 1: 0.5, 10: 5, 20: 10, 30: 17, 40: 27, 50: 37})
    assert found["of_step"] == 0.0


def test_a_curve_is_drawn_against_what_was_spent() -> None:
    run = {"validation_loss": {1: 7.0, 40: 4.0, 80: 3.0}, "saved_at": {0: 0.0, 20: 0.0, 60: 0.2, 80: 0.25}}
    spent, losses = curves.points(run | {"seconds_at": {0: 0.0, 80: 16.0}}, "flops")
    assert spent.tolist() == pytest.approx([40 * 0.9, 80 * 0.75]) and losses.tolist() == [4.0, 3.0]
    assert curves.points(run | {"seconds_at": {0: 0.0, 80: 16.0}}, "seconds")[0].tolist() == [8.0, 16.0]


def results(**losses: list[float]) -> dict[str, dict[int, dict[str, float]]]:
    """Runs of these final losses, which save 45% of the backward and 25% of the seconds of a step."""
    made = {"steps": 400, "of_backward": 0.45, "of_step": 0.3, "step": 0.75, "cut_step": 0.75, "seconds": 300.0}
    exact = made | {"of_backward": 0.0, "of_step": 0.0, "step": 1.0, "cut_step": 1.0, "seconds": 400.0}
    return {
        name: {seed: (exact if name == "exact" else made) | {"loss": loss} for seed, loss in enumerate(own)}
        for name, own in losses.items()
    }


@pytest.mark.parametrize(
    "own, reached, said",
    [
        (
            {"mat_40": [3.01, 3.01, 3.012], "random_40": [3.1, 3.12, 3.11]},
            True,
            "**reached**; saves 45.0% of the backward's FLOPs (enough)",
        ),
        ({"mat_40": [3.01, 3.01, 3.012], "random_40": [3.1, 3.0, 3.11]}, False, "not better than `random_40`"),
        ({"mat_40": [3.01, 3.01, 3.012]}, False, "not compared with `random_40`"),
        ({"mat_40": [3.02, 3.02, 3.02], "random_40": [3.1, 3.12, 3.11]}, False, "+0.67% from `exact` (0.5% were allow"),
        ({"mat_40": [3.01], "random_40": [3.1]}, True, "one seed"),
    ],
)
def test_whether_mat_reached_its_goal(own: dict[str, list[float]], reached: bool, said: str) -> None:
    found = results(exact=[3.0, 3.0, 3.0], **own)
    (verdict,) = tables.verdicts(found)["modules"]
    assert verdict["rule"] == "mat_40" and verdict["reached"] == reached
    assert said in tables.table(found, seeds=[0, 1, 2], where="here")


@pytest.mark.parametrize("cut_step, loss, reached", [(0.75, 3.02, True), (0.85, 3.02, False), (0.75, 3.04, False)])
def test_whether_the_highway_reached_its_goal(cut_step: float, loss: float, reached: bool) -> None:
    found = results(exact=[3.0, 3.0], highway_0=[loss, loss])
    found["highway_0"] = {seed: run | {"cut_step": cut_step} for seed, run in found["highway_0"].items()}
    (verdict,) = tables.verdicts(found)["highway"]
    assert verdict["reached"] == reached


def test_the_truncated_control_costs_about_what_the_highway_does() -> None:
    """Counted on the benchmark's model, in the steps that are cut."""
    model = Transformer(EXTRA_FLAVORS["llama3"]["bench"])  # type: ignore[arg-type]
    units = find_units(model, seq_len=96)
    account = HighwayAccount(model, list(model.layers.values()), seq_len=96, is_compiled=False)
    account.step_done(branches=True)
    config = FreezingConfig(**rules.RULES["truncated_from_start"].sections(400)["freezing"])
    active = decide(units, History(active=[True] * len(units)), config)
    truncated = sum(saved_flops(units, active)) / backward_flops(units)
    assert config.warmup_steps == 1
    assert account.metrics()["saved_of_backward"] == pytest.approx(truncated, abs=0.03)


def test_the_table_of_one_gpu() -> None:
    made = {"peak": 2**30, "backward": 0.0, "step": 0.0, "probe": 0.0, "start": 1.0}
    exact = [made | {"seconds": [1.0, 1.2]}, made | {"seconds": [1.0, 0.9], "peak": 3 * 2**30}]
    prefix = [made | {"seconds": [0.7, 0.8, 0.75], "backward": 0.4, "step": 0.3, "probe": 0.5}]
    runs = {("exact", False): exact, ("prefix", False): prefix, ("mat", False): [], ("prefix", True): prefix}
    first, second, alone = gpu.shown(gpu.rows_of(runs))
    assert (
        first["seconds per step"] == "1.0000" and first["peak memory, GiB"] == "3.00" and first["of exact"] == "1.000"
    )
    assert second["of exact"] == "0.750" and second["step FLOPs saved"] == "30.0%" and second["probe, s"] == "0.50"
    assert alone["compiled"] == "yes" and alone["of exact"] == ""  # exact was not compiled


def test_the_rules_of_one_gpu_are_those_of_the_benchmark() -> None:
    """Except for the schedule: those of one GPU apply from the second step on, and to the end."""
    when = {"warmup_steps", "interval", "final_fraction", "exact_fraction"}
    for name, command in gpu.RULES.items():
        settings = dict(zip(command[::2], command[1::2], strict=True))
        expected = {
            f"--{section}.{key}": str(value)
            for section, keys in rules.RULES[name].sections(400).items()
            for key, value in keys.items()
            if key not in when
        }
        assert expected.items() <= settings.items()
