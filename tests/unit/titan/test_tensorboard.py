"""The configuration and the order of the charts, read back by TensorBoard's own reader."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401, I001

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torchtitan.components import metrics
from torchtitan.config import ConfigManager

from titan_attent.foundations.toml import to_toml
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.titan.patches import compat
from titan_attent.titan.tensorboard import BaseLogger, JobConfig, LoggerContainer, write_start

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def merged() -> Any:
    return ConfigManager._merge_configs(JobConfig, OurSections)()


@pytest.mark.parametrize("exact_match", [False, True])
def test_configuration_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_match: bool) -> None:
    config, container = merged(), LoggerContainer()
    if exact_match:  # what a TOML may hold beside numbers and strings
        config.data.sources = {"web": {"proportion": [[3, 0.5], [9, 0.25]]}, "a.b": {"proportion": 0.5}}
    config.data.exact_match = exact_match
    config.optimizer.lr = 0.0123
    monkeypatch.setattr(metrics, "TensorBoardLogger", metrics.TensorBoardLogger)  # which a run replaces
    compat.continue_tensorboard(resumed=False)
    container.add_logger(metrics.TensorBoardLogger(str(tmp_path)))
    write_start(container, config)
    container.log({"loss": 1.0}, 1)
    container.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "    lr = 0.0123\n" in shown and "    [optimizer]\n" in shown
    assert [line.removeprefix("    ") for line in shown.splitlines()] == to_toml(config.to_dict()).splitlines()
    (sources,) = (line for line in shown.splitlines() if line.startswith("    sources = "))
    assert tomllib.loads(sources)["sources"] == config.data.sources
    (layout,) = events.Tensors("custom_scalars__config__")
    read = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    titles = [category.title for category in read.category]
    assert titles == [*["answers"][:exact_match], "loss", "teacher", "speed", "ledger", *["mixture"][:exact_match]]
    first = read.category[titles.index("loss")].chart[0]
    assert list(first.multiline.tag) == ["loss_metrics/global_avg_loss$", "validation_metrics/loss$"]


def test_nothing_without_tensorboard() -> None:
    write_start(BaseLogger(), merged())
    write_start(LoggerContainer(), merged())


def test_a_start_within_the_same_second_keeps_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file must not stand before that of the earlier start, as it would by the number of its process."""
    monkeypatch.setattr(metrics, "TensorBoardLogger", metrics.TensorBoardLogger)
    compat.continue_tensorboard(resumed=False)
    for process, steps in ((9999, (1, 2, 3)), (1000, (3, 4))):
        monkeypatch.setattr(os, "getpid", lambda number=process: number)
        logger = metrics.TensorBoardLogger(str(tmp_path))
        for step in steps:
            logger.log({"loss": float(process)}, step)
        logger.close()
    shown = {event.step: event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")}
    assert shown == {1: 9999.0, 2: 9999.0, 3: 1000.0, 4: 1000.0}


@pytest.mark.parametrize(
    ("second", "slept"), [(None, 0.0), (99, 0.0), (100, 0.25), (101, 1.25), (102, 0.0), (10_000, 0.0)], ids=str
)
def test_at_most_two_seconds_are_waited(
    second: int | None, slept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a later time is one of another clock."""
    (tmp_path / "events.out.tfevents.x").touch()
    if second is not None:
        (tmp_path / f"events.out.tfevents.{second:010d}.host.7.0").touch()
    waited = [0.0]
    monkeypatch.setattr(time, "time", lambda: 100.75)
    monkeypatch.setattr(time, "sleep", waited.append)
    compat.wait_for_a_second_of_its_own(str(tmp_path))
    compat.wait_for_a_second_of_its_own(str(tmp_path / "missing"))
    assert sum(waited) == slept
