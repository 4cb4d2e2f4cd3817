"""The configuration and the order of the charts, read back by TensorBoard's own reader."""

import sys
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
    read_back = tomllib.loads("\n".join(line.removeprefix("    ") for line in shown.splitlines()))
    assert read_back["data"]["sources"] == config.data.sources
    (layout,) = events.Tensors("custom_scalars__config__")
    read = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    titles = [category.title for category in read.category]
    assert titles == [*["answers"][:exact_match], "loss", "teacher", "speed", "ledger", *["mixture"][:exact_match]]
    first = read.category[titles.index("loss")].chart[0]
    assert list(first.multiline.tag) == ["loss_metrics/global_avg_loss$", "validation_metrics/loss$"]


def test_nothing_without_tensorboard() -> None:
    write_start(BaseLogger(), merged())
    write_start(LoggerContainer(), merged())
