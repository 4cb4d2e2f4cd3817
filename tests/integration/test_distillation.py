"""[distillation] by the real command: across a change of the source, killed and resumed, from targets, refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import launch, read_scalars, read_trace, read_weights, run

from titan_attent.titan.checkpoint_metadata import read_metadata

STEPS = 4
STUDENT = ["--model.flavor", "scorer_xs", "--distillation.flavor", "scorer_s", "--distillation.label_weight", "0.25"]
TAGS = ("loss_metrics/global_avg_loss", "grad_norm", "distillation/source_step", "distillation/divergence")


def arguments(small_run: list[str], dump: Path, *extra: str, steps: int = STEPS, save: int = 2) -> list[str]:
    settings = {
        "training.steps": steps,
        "training.local_batch_size": 4,
        "training.global_batch_size": 8,
        "lr_scheduler.total_steps": STEPS,
        "lr_scheduler.warmup_steps": 0,
        "checkpoint.interval": save,
        "job.dump_folder": dump,
        "teacher.strategy": "uniform",
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*small_run, *options, "--checkpoint.enable", "--checkpoint.keep_latest_k", "0", "--teacher.trace", *extra]


@pytest.fixture(scope="module")
def source(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a larger model with the checkpoints step-2 and step-4."""
    dump = tmp_path_factory.mktemp("source")
    run(*arguments(small_run, dump, "--model.flavor", "scorer_s", "--optimizer.lr", "0.02"), num_processes=1)
    return dump


def distilling(source: Path, schedule: str = "even", *extra: str) -> list[str]:
    return [
        *STUDENT,
        "--distillation.schedule",
        schedule,
        "--distillation.source",
        str(source / "checkpoint"),
        *extra,
    ]


@pytest.fixture(scope="module")
def whole(small_run: list[str], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts; it saves every step."""
    dump = tmp_path_factory.mktemp("whole")
    run(*arguments(small_run, dump, *distilling(source), save=1), num_processes=1)
    return dump


def test_a_run_across_a_change_of_the_source(whole: Path) -> None:
    assert read_scalars(whole, "distillation/source_step") == {1: 2, 2: 2, 3: 4, 4: 4}
    assert read_scalars(whole, "distillation/source_changes") == {1: 0, 2: 0, 3: 1, 4: 1}
    assert set(read_scalars(whole, "distillation/divergence")) == {2, 3, 4}
    assert read_scalars(whole, "ledger/source_seconds")[4] > 0
    assert read_scalars(whole, "ledger/source_load_seconds")[4] > read_scalars(whole, "ledger/source_load_seconds")[2]


def test_the_source_is_in_no_checkpoint_and_no_optimizer(whole: Path) -> None:
    """The student has one layer, the source has two."""
    names = read_metadata(whole / "checkpoint" / f"step-{STEPS}").state_dict_metadata
    assert [name for name in names if name.startswith("distillation")] == ["distillation.state"]
    layers = {name.split("layers.")[1].split(".")[0] for name in names if "layers." in name}
    assert layers == {"0"}


@pytest.mark.parametrize("step", [1, 2])
def test_resumed_off_or_on_a_change_a_run_is_the_uninterrupted_one(
    step: int, small_run: list[str], source: Path, whole: Path, tmp_path: Path
) -> None:
    """On two ranks, too: the same sources, ids, losses and weights."""
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(whole / "checkpoint" / f"step-{step}", tmp_path / "checkpoint" / f"step-{step}")
    run(*arguments(small_run, tmp_path, *distilling(source)), num_processes=step)
    for tag in (*TAGS[:3], "distillation/source_flops"):
        found, expected = read_scalars(tmp_path, tag), read_scalars(whole, tag)
        steps = range(step + 1, STEPS + 1)
        np.testing.assert_allclose([found[i] for i in steps], [expected[i] for i in steps], rtol=1e-4, err_msg=tag)
    assert [line["ids"] for line in read_trace(tmp_path)] == [line["ids"] for line in read_trace(whole)[step:]]
    weights = read_weights(whole, step=STEPS)
    for name, found_weight in read_weights(tmp_path, step=STEPS).items():
        if "." in name and not name.startswith("optimizer"):
            torch.testing.assert_close(found_weight, weights[name], rtol=1e-3, atol=1e-5, msg=name)


def test_targets_on_disk(small_run: list[str], source: Path, tmp_path: Path) -> None:
    """Written by 2 ranks as by 1; a run learns from them as the source's largest logits; refused where they differ."""
    for num_processes, folder in ((1, "alone"), (2, "targets")):
        for step in (2, 4):
            command = ["targets", "--output", str(tmp_path / folder), "--kind", "argmax", *small_run]
            checkpoint = ["--checkpoint.initial_load_path", str(source / "checkpoint" / f"step-{step}")]
            own = ["--model.flavor", "scorer_s", "--validation.local_batch_size", "5"]
            run(*command, *checkpoint, *own, num_processes=num_processes, module="titan_attent.score")
    for step in (2, 4):
        files = [tmp_path / folder / f"step-{step}" / "targets.bin" for folder in ("alone", "targets")]
        assert files[0].read_bytes() == files[1].read_bytes()
    live, stored = tmp_path / "live", tmp_path / "stored"
    coldest = ["--distillation.temperature", "0"]
    targets = ["--distillation.targets", str(tmp_path / "targets")]
    run(*arguments(small_run, live, *distilling(source), *coldest), num_processes=1)
    run(*arguments(small_run, stored, *distilling(source), *coldest, *targets), num_processes=2)
    for tag in (*TAGS, "distillation/source_changes"):
        found, expected = read_scalars(stored, tag), read_scalars(live, tag)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4, err_msg=tag)
    warm = launch(*arguments(small_run, tmp_path / "warm", *distilling(source), *targets), num_processes=1)
    assert warm.returncode == 1 and "was written with temperature 0 (argmax)" in warm.stderr
    other = ["--training.seq_len", "32"]
    short = launch(
        *arguments(small_run, tmp_path / "short", *distilling(source), *coldest, *targets, *other), num_processes=1
    )
    assert short.returncode == 1 and "holds the targets of other examples: seq_len is 32" in short.stderr
    facts = tmp_path / "targets" / "step-2" / "targets.json"
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps(content | {"checkpoint_sha256": "0" * 64}))
    swapped = launch(
        *arguments(small_run, tmp_path / "swapped", *distilling(source), *coldest, *targets), num_processes=1
    )
    assert swapped.returncode == 1 and "was written from another checkpoint" in swapped.stderr


REFUSED = {
    "another flavor": (
        ["--distillation.flavor", "scorer_xs"],
        "Name the family and flavor that it was trained with",
    ),
    "a missing checkpoint": (
        ["--distillation.schedule", "at", "--distillation.at", "1:2 3:3"],
        "names step-3, which is not there or was never finished; there are steps 2, 4",
    ),
    "another folder": (["--distillation.source", "nowhere"], "there is no such folder"),
}


def test_a_source_without_its_files_is_refused_before_the_start(
    small_run: list[str], source: Path, tmp_path: Path
) -> None:
    """A copy that was cut short, or a checkpoint whose weights were deleted: also of a later phase."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for file in (other / "checkpoint" / "step-4").glob("*.distcp"):
        file.unlink()
    result = launch(*arguments(small_run, tmp_path / "run", *distilling(other)), num_processes=1)
    assert result.returncode == 1 and "step-4 is damaged: __0_0.distcp is missing" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_source_is_refused_before_the_start(
    name: str, small_run: list[str], source: Path, tmp_path: Path
) -> None:
    extra, message = REFUSED[name]
    result = launch(*arguments(small_run, tmp_path, *distilling(source), *extra), num_processes=1)
    assert result.returncode == 1 and message in result.stderr
    assert not (tmp_path / "checkpoint").exists()


def with_a_nan(source: Path, folder: Path, *, step: int) -> Path:
    """A copy of the source's checkpoints, model-only, where one weight of ``step`` is NaN."""
    for number in (2, 4):
        weights = {
            name: weight
            for name, weight in read_weights(source, step=number).items()
            if name.partition(".")[0] in ("tok_embeddings", "layers", "norm", "output")
        }
        if number == step:
            weights["output.weight"][-1, 3] = float("nan")  # of the last rank
        dcp.save(weights, checkpoint_id=folder / f"step-{number}", no_dist=True)
    return folder


def test_a_source_with_nan_is_named_before_the_student_learns_from_it(
    small_run: list[str], source: Path, tmp_path: Path
) -> None:
    """Also where it comes in the middle of a run, on two ranks: the learning rate of the student is not at fault."""
    path = with_a_nan(source, tmp_path / "source", step=4)
    given = distilling(source, "even", "--distillation.source", str(path))
    for num_processes in (1, 2):
        dump = tmp_path / str(num_processes)
        result = launch(*arguments(small_run, dump, *given, save=1), num_processes=num_processes)
        assert result.returncode != 0 and f"{path}/step-4 has weights that are NaN or infinity" in result.stderr
        assert "Traceback" not in result.stderr and set(read_scalars(dump, "grad_norm")) == {1, 2}


@pytest.mark.parametrize("kind", ["draws", "argmax", "top_k"])
def test_a_source_with_nan_has_no_targets(kind: str, small_run: list[str], source: Path, tmp_path: Path) -> None:
    path = with_a_nan(source, tmp_path / "source", step=2) / "step-2"
    options = ["--output", str(tmp_path / "targets"), "--kind", kind, "--model.flavor", "scorer_s"]
    command = ["targets", *options, *small_run, "--checkpoint.initial_load_path", str(path)]
    result = launch(*command, num_processes=1, module="titan_attent.score")
    assert result.returncode != 0 and f"the source {path} predicts NaN or infinity" in result.stderr
    assert not (tmp_path / "targets" / "step-2" / "targets.json").exists()


def test_a_source_of_another_tokenizer_is_refused(small_run: list[str], source: Path, tmp_path: Path) -> None:
    """Its run recorded the tokenizer, though the vocabularies have one size."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    record = other / "teacher" / "data.json"
    content = json.loads(record.read_text())
    name, num, _ = content["measured"]["tokenizer"].rsplit(", ", 2)
    content["measured"]["tokenizer"] = f"{name}, {num}, 01234567"
    record.write_text(json.dumps(content))
    result = launch(*arguments(small_run, tmp_path / "run", *distilling(other)), num_processes=1)
    assert result.returncode == 1 and "was trained with another tokenizer" in result.stderr


def test_a_resume_with_another_checkpoint_under_the_name_is_refused(
    small_run: list[str], source: Path, whole: Path, tmp_path: Path
) -> None:
    other, dump = tmp_path / "other", tmp_path / "run"
    shutil.copytree(source, other)
    shutil.rmtree(other / "checkpoint" / "step-4")
    (other / "checkpoint" / "step-2").rename(other / "checkpoint" / "step-4")
    shutil.copytree(source / "checkpoint" / "step-2", other / "checkpoint" / "step-2")
    (dump / "checkpoint").mkdir(parents=True)
    shutil.copytree(whole / "checkpoint" / "step-2", dump / "checkpoint" / "step-2")
    result = launch(*arguments(small_run, dump, *distilling(other)), num_processes=1)
    assert result.returncode == 1 and "distillation.source is" in result.stderr


def test_two_shot_finds_its_checkpoint_in_the_logs(small_run: list[str], source: Path, tmp_path: Path) -> None:
    run(*arguments(small_run, tmp_path, *distilling(source, "two_shot"), steps=2), num_processes=1)
    assert read_scalars(tmp_path, "distillation/source_step") == {1: 2, 2: 4}
