"""The rules of benchmarks/cheaper_steps.py, and the steps that follow from what others have saved."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from titan_attent.highway.config import BackwardConfig
from titan_attent.modules.config import ModulesConfig

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
benchmark: Any = import_module("cheaper_steps")


def made(tmp_path: Path, *rules: str) -> Any:
    args = benchmark.parse_args(["--output", str(tmp_path), "--rules", *rules, "--seeds", "0", "1", "--steps", "400"])
    return benchmark.Benchmark(args)


def finish(run: Any, monkeypatch: pytest.MonkeyPatch, numbers: dict[tuple[str, int], dict[str, float]]) -> None:
    """As if these runs had ended: loss, seconds a step, share of a step saved."""
    scalars = {}
    for (name, seed), got in numbers.items():
        task = run.task(name, seed, run.steps_of(name) if name not in ("flops_of_prefix",) else 320)
        folder = run.args.output / task.folder
        folder.mkdir(parents=True)
        result = {"config": task.config, "final_validation_loss": got["loss"]}
        (folder / "result.json").write_text(json.dumps(result))
        scalars[folder] = {
            benchmark.SECONDS: dict.fromkeys(range(10), got["step"]) | {0: 99.0, 1: 99.0},
            "modules/saved_of_step": {10: 0.0, 400: got.get("saved", 0.0)},
            "modules/saved_of_backward": {400: 1.5 * got.get("saved", 0.0)},
        }
    monkeypatch.setattr(benchmark, "read_run", lambda folder: type("Run", (), {"scalars": scalars[folder]}))


def test_every_rule_is_a_good_configuration(tmp_path: Path) -> None:
    run = made(tmp_path, "modules", "highway")
    assert run.args.rules == list(benchmark.RULES)
    for name in run.args.rules:
        config = run.task(name, 0, 400).config
        ModulesConfig(**config.get("modules", {})).validate()
        BackwardConfig(**config.get("backward", {})).validate()
        assert ("modules" in config or "backward" in config) == bool(benchmark.RULES[name].sections)


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
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in run.table().splitlines() if " | " in line}
    assert rows["exact"][2:4] == ["3.0000", "4.0000"] and rows["prefix"][2:4] == ["3.1000", "4.1000"]
    assert rows["prefix"][4].startswith("+0.100") and rows["prefix"][5] == "+2.86%"
    assert rows["prefix"][6:10] == ["31.5%", "21.0%", "0.7000", "30.0% |"]
    assert "flops_of_prefix" not in rows
