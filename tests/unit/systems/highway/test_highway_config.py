"""[highway]: every value out of range and every unsupported run is refused, with the fix in the message."""

import re
from typing import Any

import pytest
from distributed.parallel_world import Settings, config_of

from titan_attent.systems.highway.checks import rounds
from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.systems.highway.stages import HighwayStages
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.system import System
from titan_attent.titan.settings import settings_of


def check(system: type[System], settings: Settings) -> None:
    config = config_of(settings, data="", folder="")
    system.check(config.highway, settings_of(config))


OUT_OF_RANGE = [
    ("method", "higway", 'did you mean "highway"'),
    ("method", "", '"exact", "highway"'),
    ("iterations", -2, "a whole number at least -1"),
    ("iterations", 1.5, "a whole number"),
    ("iterations", True, "a whole number"),
    ("cut", "branches", 'did you mean "branch"'),
    ("tolerance", -0.1, "at least 0 and below 1"),
    ("tolerance", 1.0, "at least 0 and below 1"),
    ("exact_fraction", 1.5, "at least 0 and at most 1"),
    ("exact_fraction", float("nan"), "a number"),
]


@pytest.mark.parametrize(("key", "value", "hint"), OUT_OF_RANGE)
def test_a_value_out_of_range(key: str, value: Any, hint: str) -> None:
    config = HighwayConfig(**{"method": "highway", "iterations": 1, "cut": "block", key: value})
    with pytest.raises(ValueError, match=re.escape(f"[highway] {key} = {value!r}") + ".*" + re.escape(hint)):
        config.validate()


@pytest.mark.parametrize(("key", "value"), [("fit_gain", True), ("tolerance", 0.1)])
def test_values_that_need_input_gradients(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\[highway\] {key} = .* with iterations = 0.*Set iterations = 1"):
        HighwayConfig(method="highway", **{key: value}).validate()
    HighwayConfig(method="highway", cut="block", iterations=1, **{key: value}).validate()
    HighwayConfig(method="highway", cut="block", iterations=-1, **{key: value}).validate()


@pytest.mark.parametrize(("key", "value"), [("iterations", 1), ("iterations", -1), ("log_cosine", True)])
def test_values_refused_with_branches(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf'\[highway\] {key} = .* with cut = "branch".*Set cut = "block"'):
        HighwayConfig(method="highway", **{key: value}).validate()


REFUSED: list[tuple[Settings, str]] = [
    (
        {"parallelism.pipeline_parallel_degree": 2},
        'pipeline_parallel_degree = 2: no rank has all blocks. Set cut = "stage"',
    ),
    (
        {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
        "data_parallel_replicate_degree = 2.*DDP.*Set data_parallel_shard_degree",
    ),
    ({"parallelism.data_parallel_replicate_degree": 2}, "DDP"),  # in two processes
    ({"activation_checkpoint.mode": "full"}, 'mode = "full".*Set the mode to "none"'),
    ({"activation_checkpoint.mode": "selective"}, 'mode = "selective"'),
    ({"optimizer.early_step_in_backward": True}, "early_step_in_backward = true.*Set it to false"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_settings(settings: Settings, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    on: Settings = {"highway.method": "highway"}
    check(Highway, on)
    with pytest.raises(ValueError, match=message):
        check(Highway, on | settings)


STAGES: Settings = {"highway.method": "highway", "highway.cut": "stage", "parallelism.pipeline_parallel_degree": 4}
REFUSED_STAGES: list[tuple[Settings, str]] = [
    ({"parallelism.pipeline_parallel_degree": 1}, 'there are no stages to cut between. Set cut = "block" or "branch"'),
    ({"parallelism.pipeline_parallel_schedule": "ZBVZeroBubble"}, "one stage per rank. Use one of 1F1B, GPipe"),
    ({"compile.enable": True}, "a compiled stage computes input and weight gradients together"),
    ({"optimizer.early_step_in_backward": True}, "early_step_in_backward"),
    ({"highway.log_cosine": True}, 'log_cosine with cut = "stage": stages do not compare rounds'),
    ({"highway.tolerance": 0.1, "highway.iterations": 1}, 'tolerance with cut = "stage"'),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_STAGES)
def test_refused_settings_between_stages(settings: Settings, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for good in ({}, {"activation_checkpoint.mode": "full"}, {"parallelism.pipeline_parallel_schedule": "GPipe"}):
        check(HighwayStages, STAGES | good)
    with pytest.raises(ValueError, match=message):
        check(HighwayStages, STAGES | settings)


def test_one_of_the_two_systems_is_on() -> None:
    for settings, on in (({}, []), ({"highway.method": "highway"}, [Highway]), (STAGES, [HighwayStages])):
        config = config_of(settings, data="", folder="")
        assert [system for system in (Highway, HighwayStages) if system.is_on(config.highway)] == on


@pytest.mark.parametrize("shard", [-1, 2])
def test_sharded_copies_are_not_ddp(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    degrees = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": shard}
    settings = {f"parallelism.{name}": value for name, value in degrees.items()}
    check(Highway, {"highway.method": "highway"} | settings)


def test_rounds_of_a_model() -> None:
    assert [rounds(HighwayConfig(iterations=k), 4) for k in (-1, 0, 3, 4)] == [4, 0, 3, 4]
    with pytest.raises(ValueError, match=r"iterations = 5 with a model of 4 blocks.*-1"):
        rounds(HighwayConfig(iterations=5), 4)


def test_it_is_off_by_default() -> None:
    assert not Highway.is_on(HighwayConfig())
    assert Highway.is_on(HighwayConfig(method="higway")), "a typo would silently train by backpropagation"
