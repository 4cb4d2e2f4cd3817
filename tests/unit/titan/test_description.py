"""The run record that a run writes is read back for the report."""

import json
from dataclasses import field, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titan_attent.data.run_record import RunRecord, read_run_record, write_run_record
from titan_attent.titan.settings import describe


def a_run(folder: Path, name: str = "llama3_attent", *, tokenizer: str = "a", **changed: Any) -> SimpleNamespace:
    """A run whose configuration has the values below as defaults, and ``changed`` as section__key."""
    (folder / "validation").mkdir(exist_ok=True)
    (folder / "validation" / "index.json").write_text('{"fingerprint": "of validation"}')
    job: dict[str, dict[str, Any]] = {
        "model": {"name": name, "flavor": "8B"},
        "data": {
            "path": "data",
            "validation_path": str(folder / "validation"),
            "validation_sets": {},
            "seed": 3,
            "unit": "window",
            "validation_unit": "",
        },
        "validation": {"seq_len": 64, "steps": -1},
        "vision": {"mask_ratio": 0.5, "normalize_patches": False},
        "training": {"steps": 20},
        "optimizer": {"lr": 0.25},
        "debug": {"seed": 7},
    }
    sections = {
        name: make_dataclass(
            name, [(key, type(value), field(default_factory=lambda value=value: value)) for key, value in keys.items()]
        )
        for name, keys in job.items()
    }
    config = make_dataclass("Config", [(name, one, field(default_factory=one)) for name, one in sections.items()])()
    for key, value in changed.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    shards = SimpleNamespace(tokenizer_info={"name": "trained", "vocab_size": 300, "sha256": tokenizer * 64})
    return SimpleNamespace(
        job_config=config,
        dataset=SimpleNamespace(
            stored=SimpleNamespace(fingerprint="of data"), shards=shards, seq_len=96, tokens_per_example=128
        ),
        batch_size=16,
        device=torch.device("cpu"),
    )


def record_of(folder: Path, run: Any, *, losses: tuple[str | Path, ...] = ()) -> RunRecord:
    description = describe(run.job_config, run.dataset, batch_size=run.batch_size, device=run.device)
    write_run_record(folder / "run" / "teacher", description, losses=losses)
    return read_run_record(folder / "run")


def test_a_record_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = record_of(tmp_path, a_run(tmp_path))
    assert (found.path, found.fingerprint, found.batch_size, found.tokens_per_example) == ("data", "of data", 16, 128)
    assert found.setting["model"] == "llama3_attent 8B" and found.setting["debug.seed"] == 7
    assert found.devices is not None and found.devices.startswith("4 x cpu of ")
    assert (found.losses, found.scorers_flops) == ((), 0.0)


def test_the_keys_that_a_run_changes_are_recorded(tmp_path: Path) -> None:
    assert record_of(tmp_path, a_run(tmp_path)).configured == {}
    changed = {"optimizer__lr": 0.5, "debug__seed": None, "data__unit": ["a", "b"], "training__steps": 20}
    assert record_of(tmp_path, a_run(tmp_path, **changed)).configured == {
        "optimizer.lr": 0.5,
        "debug.seed": None,
        "data.unit": "['a', 'b']",
    }


def test_what_a_validation_measures(tmp_path: Path) -> None:
    """``measured`` is equal for runs whose validation losses are comparable, and differs for others."""
    base = record_of(tmp_path, a_run(tmp_path)).measured
    assert base == record_of(tmp_path, a_run(tmp_path, optimizer__lr=0.5, debug__seed=8, model__flavor="70B")).measured
    others = [{"validation__seq_len": 32}, {"validation__steps": 2}, {"data__validation_path": "gone"}]
    assert all(base != record_of(tmp_path, a_run(tmp_path, **other)).measured for other in others)
    assert base != record_of(tmp_path, a_run(tmp_path, tokenizer="b")).measured
    vit, mae = (a_run(tmp_path, name) for name in ("vit_attent", "mae_attent"))
    of_vit, of_mae = record_of(tmp_path, vit).measured, record_of(tmp_path, mae).measured
    assert base != of_vit != of_mae
    assert of_mae != record_of(tmp_path, a_run(tmp_path, "mae_attent", vision__mask_ratio=0.75)).measured
    assert of_vit == record_of(tmp_path, a_run(tmp_path, "vit_attent", vision__mask_ratio=0.75)).measured


@pytest.mark.parametrize("normalized", [False, True])
def test_patches_as_they_are_compare_in_the_units_of_one_training_set(normalized: bool, tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "mae_attent", vision__normalize_patches=normalized) for _ in range(2)]
    runs[1].dataset.stored.fingerprint = "of other data"
    first, second = (record_of(tmp_path, run).measured for run in runs)
    assert (first == second) == normalized


def test_what_scorers_took(tmp_path: Path) -> None:
    for name, content in (("a", '{"flops": 3e12}'), ("b", '{"flops": 1e12}'), ("c", '{"flops": NaN}'), ("d", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cost.json").write_text(content)
    for names, flops in (("ab", 4e12), ("ac", None), ("ad", None), ("ae", None)):
        found = record_of(tmp_path, a_run(tmp_path), losses=tuple(tmp_path / name for name in names))
        assert found.scorers_flops == flops and found.losses == tuple(str(tmp_path / name) for name in names)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7", '{"path": 7, "batch_size": true, "measured": []}', "\0"])
def test_a_damaged_file_is_an_empty_record(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "teacher").mkdir()
    if content is not None:
        (tmp_path / "teacher" / "data.json").write_text(content)
    assert read_run_record(tmp_path) == RunRecord()


@pytest.mark.parametrize("number", ["-1", "0", "1" + "0" * 400, "2.5", "NaN", "Infinity", "[1]", "true", "null"])
def test_impossible_numbers_are_dropped(tmp_path: Path, number: str) -> None:
    (tmp_path / "teacher").mkdir()
    keys = ("batch_size", "tokens_per_example", "fingerprint", "devices")
    fields = ", ".join(f'"{key}": {number}' for key in keys)
    content = (
        f'{{{fields}, "scorers_flops": {number if number not in ("0", "2.5") else -1}, "setting": {{"model": [1]}}}}'
    )
    (tmp_path / "teacher" / "data.json").write_text(content)
    assert read_run_record(tmp_path) == RunRecord()


def test_the_record_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "data.json").write_text(json.dumps({"path": "data", "validation_path": ""}))
    assert read_run_record(tmp_path) == RunRecord(path="data")
