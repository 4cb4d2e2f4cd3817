"""The settings that ``[freezing]`` refuses before a run."""

from types import SimpleNamespace
from typing import Any

import pytest
from distributed.parallel_world import STEPS, config_of

from titan_attent.systems.freezing.system import Freezing
from titan_attent.titan.settings import settings_of


def check(settings: dict[str, Any], num_examples: int = 100) -> None:
    config = config_of({"freezing.policy": "mat", "freezing.warmup_steps": 1} | settings, data="", folder="")
    Freezing.check(config.freezing, settings_of(config))
    Freezing.check_data(config.freezing, SimpleNamespace(dataset=range(num_examples)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"parallelism.pipeline_parallel_degree": 2}, "parallelism.pipeline_parallel_degree = 2.*Set it to 1"),
        ({"parallelism.context_parallel_degree": 2}, "parallelism.context_parallel_degree = 2"),
        ({"parallelism.expert_parallel_degree": 2}, "parallelism.expert_parallel_degree = 2"),
        (
            {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
            "which is DDP.*Set data_parallel_shard_degree above 1",
        ),
        ({"parallelism.data_parallel_replicate_degree": 4}, "which is DDP"),  # in four processes
        ({"optimizer.early_step_in_backward": True}, "early_step_in_backward = true.*Set it to false"),
        ({"freezing.warmup_steps": STEPS}, f"warmup_steps = {STEPS} leaves no step of training.steps = {STEPS}"),
        ({"freezing.probe_groups": 26}, "probe_groups x probe_examples = 104 is more than the 100 examples"),
        ({"freezing.heads": True, "parallelism.tensor_parallel_degree": 2}, "heads = true with tensor_parallel_degree"),
        ({"freezing.probe": "fisher"}, "probe = 'fisher' is unknown"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message) as caught:
        check(settings)
    assert str(caught.value).startswith("[freezing] ")


def test_accepted_settings() -> None:
    check({})
    check({"freezing.policy": "random", "freezing.probe_groups": 26})  # probes nothing
    check({"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2})


def test_off_by_default() -> None:
    assert not Freezing.is_on(config_of({}, data="", folder="").freezing)
