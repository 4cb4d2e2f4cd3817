"""titan/models/flavors.py: the flavors to begin with, and a vocabulary that follows the data."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.parallel_world import config_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchtitan.models.llama3 import llama3_args

from titan_attent.data.text.writer import write_dataset
from titan_attent.titan import launch
from titan_attent.titan.checks import preflight
from titan_attent.titan.checks.hugging_face_checks import model_shapes
from titan_attent.titan.checks.resume_checks import compare_shapes
from titan_attent.titan.checks.toml_checks import run_custom_import
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.flavors import LADDER, SCORER_FLAVORS, vocabulary
from titan_attent.titan.train_spec import attent_spec


@given(num_ids=st.integers(1, 300_000), own=st.integers(0, 300_000))
def test_the_size_of_a_vocabulary(num_ids: int, own: int) -> None:
    size = vocabulary(own, num_ids=num_ids)
    if own >= num_ids:
        assert size == own
    else:
        assert size % 64 == 0 and size - 64 < num_ids <= size


def sizes(model: str, data: Path | str) -> dict[str, int]:
    return {name: vars(args)["vocab_size"] for name, args in attent_spec(model, data=str(data)).model_args.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose tokenizer has more ids than the flavor "bench", and not a multiple of 64."""
    path = tmp_path_factory.mktemp("large") / "data"
    write_dataset([Path(dataclasses.__file__), Path(copy.__file__)], output=path, tokenizer="train:1100")
    return path


def test_the_vocabulary_follows_the_data(token_data: dict[str, Path], large: Path) -> None:
    small, big = sizes("llama3_attent", token_data["train"]), sizes("llama3_attent", large)
    assert {small[name] for name in LADDER} == {512} and {big[name] for name in LADDER} == {1152}
    assert {small[f"{name}_flex"] for name in LADDER} == {512}
    assert small["bench"] == 1024 and big["bench"] == 1152 and big["bench_flex"] == 1152
    assert small["8B"] == big["8B"] == 128256
    assert {big[name] for name in SCORER_FLAVORS} == {1100}
    assert sizes("qwen3_attent", large)["10M"] == 1152 and sizes("qwen3_attent", large)["0.6B"] == 151936


@pytest.mark.parametrize("model", ["llama3_attent", "qwen3_attent"])
def test_the_ladder_has_the_parameters_of_its_names(model: str, large: Path) -> None:
    spec = attent_spec(model, data=str(large))
    for name in LADDER:
        args: Any = spec.model_args[name]
        with torch.device("meta"):
            built: Any = spec.model_cls(args)
        assert isinstance(built, nn.Module)
        layers = sum(weight.numel() for weight in built.layers.parameters())
        assert 0.98 < layers / 1e6 / int(name.removesuffix("M")) < 1.08
        assert args.dim // args.n_heads == 64


SAID = {
    "10M": "llama3_attent 10M has 1,152 token ids: the data {} has 1,100",
    "bench": "llama3_attent bench has 1,152 token ids, and not the 1,024 of the flavor: the data {} has 1,100",
    "tiny": "",
    "scorer_xs": "",
}


@pytest.mark.parametrize("flavor", SAID)
def test_the_checks_of_a_run_and_its_log(
    flavor: str, large: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    caplog.set_level(logging.INFO)
    config = config_of({"model.flavor": flavor}, data=str(large), folder=str(tmp_path))
    datasets = DataSets()
    spec = launch.spec_of(config, datasets)
    preflight.check_run(config, spec, world_size=1, datasets=datasets)
    launch.log_vocabulary(config, spec, datasets)
    said = [record.message for record in caplog.records if "token ids" in record.message]
    assert said == [SAID[flavor].format(large)] * bool(SAID[flavor])


def test_data_that_cannot_be_opened_are_refused_by_their_key(tmp_path: Path) -> None:
    config = config_of({"model.flavor": "10M"}, data=str(tmp_path / "none"), folder=str(tmp_path))
    datasets = DataSets()
    with pytest.raises(ValueError, match=r"\[data\] path: .*none"):
        preflight.check_run(config, launch.spec_of(config, datasets), world_size=1, datasets=datasets)


def test_a_checkpoint_of_another_vocabulary_is_one_clear_error(token_data: dict[str, Path], large: Path) -> None:
    shapes = []
    for data in (token_data["train"], large):
        config = config_of({"model.flavor": "10M"}, data=str(data), folder="")
        shapes.append(model_shapes(config, launch.spec_of(config, DataSets())))
    compare_shapes(shapes[0], shapes[0], "step-1")
    with pytest.raises(
        ValueError,
        match="step-1 is of another vocabulary: it has 512 token ids, and this model has 1,152, .*Use data written",
    ):
        compare_shapes(shapes[1], shapes[0], "step-1")
    other = shapes[0] | {"norm.weight": [1]}
    with pytest.raises(ValueError, match="step-1 is of another model: norm.weight is .*tok_embeddings"):
        compare_shapes(shapes[1], other, "step-1")


MODULE = """
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

llama3_args["{name}"] = TransformerModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=0)
"""


def test_a_custom_import_comes_before_the_check_of_the_flavor(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(llama3_args, "of_mine", raising=False)
    (tmp_path / "flavors_of_mine.py").write_text(MODULE.format(name="of_mine"))
    argv = ["--model.name", "llama3_attent", "--model.flavor", "of_mine", "--data.path", str(large)]
    config = launch.parse([*argv, "--experimental.custom_import", "flavors_of_mine"])
    datasets = DataSets()
    try:
        spec = launch.spec_of(config, datasets)
        preflight.check_run(config, spec, world_size=1, datasets=datasets)
    finally:
        del llama3_args["of_mine"]
    assert {vars(spec.model_args[name])["vocab_size"] for name in ("of_mine", "of_mine_flex")} == {1152}


@pytest.mark.parametrize("content", ["", "import nowhere_at_all\n"])
def test_a_custom_import_that_fails(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if content:
        (tmp_path / "failing_import.py").write_text(content)
    missing = "nowhere_at_all" if content else "failing_import"
    with pytest.raises(ValueError, match=rf"custom_import = failing_import: .*'{missing}'; check the name, and PYTHON"):
        run_custom_import("failing_import")
