"""The source that a run starts from is found and checked against the run before any process group exists."""

# ruff: noqa: F811

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat as compat  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_value_checks import quickstart, spec  # noqa: F401
from torch.distributed.checkpoint.metadata import TensorProperties
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.titan.changed_settings import SETTINGS, recorded_settings
from titan_attent.titan.checks import load_sources, preflight
from titan_attent.titan.checks.hugging_face_checks import model_shapes
from titan_attent.titan.checks.resume_checks import finished_message
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.loader import check_geometry, geometry_of
from titan_attent.titan.train_spec import attent_spec

STATES = {"optimizer": {"o": 1}, "lr_scheduler": {"last_epoch": 1}, "teacher": {"round": 0}}


@pytest.fixture
def run(quickstart: JobConfig, tmp_path: Path) -> JobConfig:
    config = copy.deepcopy(quickstart)
    config.model.flavor, config.training.steps, config.training.local_batch_size = "bench", 12, 16
    config.job.dump_folder = str(tmp_path / "run")
    return config


def save(run: JobConfig, spec: TrainSpec, path: Path, *, step: int, full: bool = True) -> None:
    """Write a checkpoint as a run does, except for the values."""
    dataset = DataSets().dataset(run.data.path, seq_len=run.training.seq_len)
    geometry = geometry_of(run, dataset, batch_size=run.training.global_batch_size)
    stored = json.dumps(geometry | {SETTINGS: recorded_settings(run)})
    state: dict[str, Any] = {name: torch.zeros(shape) for name, shape in model_shapes(run, spec).items()}
    if full:
        state |= STATES | {"train_state": {"step": step}, "dataloader": {"geometry": stored}}
    dcp.save(state, checkpoint_id=path, no_dist=True)


def check(run: JobConfig, spec: TrainSpec, **values: Any) -> JobConfig:
    changed = copy.deepcopy(run)
    for name, value in values.items():
        section, _, key = name.partition("__")
        setattr(getattr(changed, section), key, value)
    load_sources.check_start(changed)
    preflight.check_run(changed, spec, world_size=1)
    return changed


@pytest.fixture
def saved(run: JobConfig, spec: TrainSpec) -> JobConfig:
    for step in (4, 12):
        save(run, spec, load_sources.folder_of(run) / f"step-{step}", step=step)
    return run


def test_a_run_that_is_over(saved: JobConfig, spec: TrainSpec, tmp_path: Path) -> None:
    assert finished_message(check(saved, spec, training__steps=13)) == ""
    for load_step in (-1, 12):
        again = check(saved, spec, checkpoint__load_step=load_step)
        assert "nothing is left to train: the run has finished" in finished_message(again)
    with pytest.raises(
        ValueError, match=r"already at step 12, and \[training\] steps = 8. Set training.steps above 12"
    ):
        check(saved, spec, training__steps=8)
    with pytest.raises(ValueError, match=r"step-4 is already at step 4, and \[training\] steps = 4"):
        check(saved, spec, checkpoint__load_step=4, training__steps=4)  # nothing to train, and not the last checkpoint
    assert finished_message(check(saved, spec, checkpoint__load_step=4)) == ""
    # A full checkpoint of another folder: nothing would be written to the run's own folder.
    other = {"job__dump_folder": str(tmp_path / "new"), "checkpoint__initial_load_model_only": False}
    path = str(load_sources.folder_of(saved) / "step-12")
    with pytest.raises(ValueError, match="nothing is left to train"):
        check(saved, spec, **other, checkpoint__initial_load_path=path)
    check(saved, spec, **other, checkpoint__initial_load_path=path, training__steps=13)
    # The step is read from the checkpoint, not from the name of its folder.
    (load_sources.folder_of(saved) / "step-12").rename(load_sources.folder_of(saved) / "step-2")
    shutil.rmtree(load_sources.folder_of(saved) / "step-4")
    with pytest.raises(ValueError, match="step-2 is already at step 12"):
        check(saved, spec, training__steps=8)


DOCUMENTS = {
    "unit": "document",
    "packing": "concatenate",
    "max_examples_per_window": 7,
    "document_mask": True,
}


@pytest.mark.parametrize("key", DOCUMENTS)
def test_how_documents_are_packed_and_seen_must_be_that_of_the_checkpoint(run: JobConfig, key: str) -> None:
    first, changed = copy.deepcopy(run), copy.deepcopy(run)
    first.data.unit = changed.data.unit = "document"
    setattr(changed.data, key, "window" if key == "unit" else DOCUMENTS[key])
    datasets = DataSets()

    def geometry(config: JobConfig) -> dict[str, Any]:
        path, seq_len = config.data.path, config.training.seq_len
        is_of_documents = config.data.unit == "document"
        dataset = (datasets.documents if is_of_documents else datasets.dataset)(path, seq_len=seq_len)
        return geometry_of(config, dataset, batch_size=16)

    check_geometry(geometry(first), geometry(first), where="it")
    name = "data fingerprint" if key == "unit" else f"data.{key}"
    for before, after in ((first, changed), (changed, first)):
        with pytest.raises(ValueError, match=f"it was written for another .*{name} is .* in this run but"):
            check_geometry(geometry(before), geometry(after), where="it")


def test_another_model(saved: JobConfig, spec: TrainSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step-12 is of another model: .* \[128, 128\] there .*Set \[model\] name"):
        check(saved, spec, model__flavor="tiny", training__steps=20)
    path = str(load_sources.folder_of(saved) / "step-4")
    for model_only in (True, False):
        values = {"checkpoint__initial_load_path": path, "checkpoint__initial_load_model_only": model_only}
        with pytest.raises(ValueError, match="step-4 is of another model"):
            check(saved, spec, job__dump_folder=str(tmp_path / "new"), model__flavor="tiny", **values)
        check(saved, spec, job__dump_folder=str(tmp_path / "new"), **values)
    shorter = copy.copy(spec)
    args = dataclasses.replace(spec.model_args["bench"], n_layers=2)  # type: ignore[type-var]
    shorter.model_args = dict(spec.model_args) | {"bench": args}
    with pytest.raises(ValueError, match=r"layers\.2\..* is absent here and"):  # torchtitan would load the first two
        check(saved, shorter, training__steps=20)


def test_a_start_that_would_be_skipped(run: JobConfig, spec: TrainSpec, tmp_path: Path) -> None:
    first = tmp_path / "first" / "checkpoint" / "step-4"
    save(run, spec, first, step=4)
    start = {"checkpoint__initial_load_path": str(first)}
    for made in (False, True):  # a killed first save leaves a folder without .metadata
        if made:
            (load_sources.folder_of(run) / "step-4").mkdir(parents=True)
            (load_sources.folder_of(run) / "step-9.tmp").mkdir()
            (load_sources.folder_of(run) / "step-9.tmp" / ".metadata").touch()
        source = load_sources.source_of(check(run, spec, **start))
        assert source is not None and source.path == first and not source.is_own and not source.is_full
        with pytest.raises(ValueError, match=r"load_step = 4|step-4 does not exist or was never finished"):
            check(run, spec, **start, checkpoint__load_step=4)
        with pytest.raises(ValueError, match="initial_load_path = /nowhere does not exist"):
            check(run, spec, checkpoint__initial_load_path="/nowhere")
        with pytest.raises(
            ValueError, match="contains checkpoints but is not one itself: give one of them, such as .*step-4"
        ):
            check(run, spec, checkpoint__initial_load_path=str(first.parent))
    for values in (start, {"checkpoint__load_step": 4}, {"checkpoint__initial_load_in_hf": True}):
        with pytest.raises(ValueError, match="with enable = false: nothing would be loaded.*Set enable = true"):
            check(run, spec, **values, checkpoint__enable=False)
    with pytest.raises(ValueError, match="create_seed_checkpoint = true with enable = false"):
        check(run, spec, checkpoint__create_seed_checkpoint=True, checkpoint__enable=False)


def test_load_step_without_a_folder(run: JobConfig, spec: TrainSpec, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ValueError, match=r"load_step = 4: neither .*step-4 nor its parent folder exists.*or leave it out"
    ):
        check(run, spec, checkpoint__load_step=4)
    check(run, spec, checkpoint__load_step=0)
    assert "load_step = 0: there is no" in caplog.text and "starts from random weights" in caplog.text


def test_after_weights_in_safetensors(saved: JobConfig, spec: TrainSpec) -> None:
    end = load_sources.folder_of(saved) / "step-20"
    end.mkdir()
    (end / "model.safetensors.index.json").touch()
    with pytest.raises(ValueError, match=r"step-20 is in safetensors format .*load_step, or start in a new .*_in_hf$"):
        check(saved, spec, training__steps=30)
    check(saved, spec, training__steps=30, checkpoint__load_step=12)


def test_keys_that_contradict_each_other(
    saved: JobConfig,
    spec: TrainSpec,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where safetensors is installed
    with pytest.raises(ValueError, match="initial_load_model_only = true"):
        check(saved, spec, checkpoint__initial_load_in_hf=True, checkpoint__initial_load_model_only=False)
    with pytest.raises(
        ValueError, match="initial_load_in_hf_quantized = true has no effect without initial_load_in_hf"
    ):
        check(saved, spec, checkpoint__initial_load_in_hf_quantized=True)
    without = dataclasses.replace(spec, state_dict_adapter=None)
    hf = {"checkpoint__last_save_in_hf": True, "checkpoint__last_save_model_only": True}
    with pytest.raises(ValueError, match="last_save_in_hf = true: llama3_attent has no Hugging Face format"):
        check(saved, without, **hf)
    with pytest.raises(ValueError, match="exclude_from_loading: optimzer is not a state of this run. Its states are"):
        check(saved, spec, checkpoint__exclude_from_loading=["optimzer"], training__steps=20)
    check(saved, spec, checkpoint__exclude_from_loading=["optimizer", "lr_scheduler"], training__steps=20)
    check(saved, spec, checkpoint__export_dtype="bfloat16", training__steps=20)
    assert 'export_dtype = "bfloat16" has no effect' in caplog.text


def test_a_checkpoint_without_a_state(saved: JobConfig, spec: TrainSpec, tmp_path: Path) -> None:
    path = load_sources.folder_of(saved) / "step-14"
    save(saved, spec, path, step=14, full=False)
    with pytest.raises(ValueError, match="step-14 holds no dataloader state: it is model-only"):
        check(saved, spec, training__steps=20)
    with pytest.raises(ValueError, match="step-14 holds no train_state state"):
        check(saved, spec, training__steps=20, checkpoint__exclude_from_loading=["dataloader", "teacher"])


def test_checkpoints_from_elsewhere_are_warned_of(
    saved: JobConfig,
    spec: TrainSpec,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(saved, spec)
    assert "pickles" not in caplog.text, "no warning about the run's own checkpoint"
    path = load_sources.folder_of(saved) / "step-12"
    elsewhere = {"job__dump_folder": str(tmp_path / "new"), "checkpoint__initial_load_path": str(path)}
    check(saved, spec, **elsewhere)
    assert caplog.text.count("open only those of people that you trust") == 1
    stock = TensorProperties.__getstate__
    metadata = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    with monkeypatch.context() as later:
        later.setattr(TensorProperties, "__getstate__", lambda self: (*stock(self), (1,)))  # as torch 2.15
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    for values in ({}, elsewhere):
        with pytest.raises(ValueError, match="was written by a later torch"):
            check(saved, spec, **values)
    metadata.planner_data = print
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    for values in ({}, elsewhere):
        with pytest.raises(ValueError, match="contains builtins.print, which does not belong"):
            check(saved, spec, **values)


@pytest.mark.parametrize("model", ["llama3", "qwen3"])  # the others take long to build; tested by hand
def test_names_and_shapes_are_those_of_the_checkpoint(run: JobConfig, model: str) -> None:
    """Compares with a model built on CPU, with torchtitan's own wrapper."""
    run.model.name, run.model.flavor = f"{model}_attent", "debugmodel"
    its_spec = attent_spec(run.model.name)
    args = copy.deepcopy(its_spec.model_args["debugmodel"])
    args.update_from_config(run)
    built: Any = its_spec.model_cls(args)
    with torch.no_grad():
        built.init_weights(buffer_device=torch.device("cpu"))
    there = {name: list(weight.shape) for name, weight in ModelWrapper(built).state_dict().items()}
    assert model_shapes(run, its_spec) == there


def warnings_of_changes(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """(level, text up to the checkpoint) of each line about a setting that differs from the checkpoint's."""
    lines = [
        (record.levelname, record.message) for record in caplog.records if "which the checkpoint" in record.message
    ]
    return [(level, message.partition(", which the checkpoint")[0]) for level, message in lines]


def test_each_changed_setting_is_one_line(
    saved: JobConfig, spec: TrainSpec, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    check(saved, spec, training__steps=20)
    assert warnings_of_changes(caplog) == [("WARNING", "Resuming with [training] steps = 20 instead of 12")]
    caplog.clear()
    check(
        saved,
        spec,
        **{"training__steps": 20, "training__max_norm": 0.5, "debug__seed": 7, "lr_scheduler__decay_ratio": 0.5},
        **{"teacher__initial_ratio": 0.25, "compile__enable": True, "training__local_batch_size": 8},
        # Without effect on what is learned, or compared elsewhere.
        **{"metrics__log_freq": 3, "checkpoint__interval": 3, "data__num_workers": 1, "optimizer__lr": 1e-4},
    )
    assert sorted(warnings_of_changes(caplog)) == [
        ("INFO", "Resuming with [compile] enable = true instead of false"),
        ("INFO", "Resuming with [training] local_batch_size = 8 instead of 16"),
        ("WARNING", "Resuming with [debug] seed = 7 instead of 0"),
        ("WARNING", "Resuming with [lr_scheduler] decay_ratio = 0.5 instead of null"),
        ("WARNING", "Resuming with [teacher] initial_ratio = 0.25 instead of 0.5"),
        ("WARNING", "Resuming with [training] max_norm = 0.5 instead of 1.0"),
        ("WARNING", "Resuming with [training] steps = 20 instead of 12"),
    ]
    caplog.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(saved, spec)
    assert warnings_of_changes(caplog) == [("INFO", "Resuming with number of processes = 2 instead of 1")]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # one rank is enough
    check(saved, spec, training__steps=20)
    assert warnings_of_changes(caplog) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training__global_batch_size": 32}, "training.global_batch_size is 32 in this run but 16"),
        ({"data__seed": 5}, "data.seed is 5 in this run but 0"),
        ({"teacher__seed": 5}, "teacher.seed is 5 in this run but 0"),
        ({"teacher__pool_size": 32}, "teacher.pool_size is 32 in this run but 0"),
        ({"training__seq_len": 64, "validation__seq_len": 64}, "training.seq_len is 64 in this run but 128"),
        ({"data__unit": "document"}, "data.unit is 'document' in this run but None"),
    ],
)
def test_settings_that_must_be_equal(saved: JobConfig, spec: TrainSpec, values: dict[str, Any], message: str) -> None:
    """The rows of docs/reference/runs.md that say "refused"."""
    with pytest.raises(ValueError, match=message):
        check(saved, spec, training__steps=20, **values)


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_its_settings(
    run: JobConfig, spec: TrainSpec, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recorded in (None, [1], {}, {"training.steps": 12, "training.gone": 1}):
        monkeypatch.setattr("test_resume_checks.recorded_settings", lambda config, recorded=recorded: recorded)
        save(run, spec, load_sources.folder_of(run) / "step-4", step=4)
        check(run, spec)
        assert warnings_of_changes(caplog) == []
