"""systems/distillation: the schedule of sources and of the labels' weight, the values of the section, the logs."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from titan_attent.data.branch import Branch, write_branch
from titan_attent.data.run_record import RunRecord, write_run_record
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.schedule import (
    Phase,
    label_weight,
    next_change,
    phases_of,
    source_at,
    steepest,
)
from titan_attent.systems.distillation.sources import (
    checkpoint_of,
    finished_steps,
    identity_of,
    losses_of,
    phases_on_disk,
    read_ahead,
    training_seconds,
)


def config(**keys: object) -> DistillationConfig:
    return DistillationConfig(source="source", **({"schedule": "even"} | keys))  # type: ignore[arg-type]


def phases(keys: DistillationConfig, checkpoints: list[int], *, steps: int = 100) -> tuple[Phase, ...]:
    return phases_of(keys, steps=steps, checkpoints=checkpoints, losses={})


def test_even_gives_every_checkpoint_as_many_steps() -> None:
    assert phases(config(), [10, 20, 30, 40]) == ((1, 10), (26, 20), (51, 30), (76, 40))
    assert phases(config(num_checkpoints=2), [10, 20, 30, 40]) == ((1, 20), (51, 40))
    assert phases(config(num_checkpoints=1), [10, 20, 30, 40]) == phases(config(schedule="final"), [10, 20, 30, 40])


@settings(deadline=None)
@given(num=st.integers(1, 12), count=st.integers(0, 12), steps=st.integers(12, 300))
def test_even_ends_with_the_last_checkpoint_and_rises(num: int, count: int, steps: int) -> None:
    checkpoints = [7 * (i + 1) for i in range(num)]
    if count > num:
        with pytest.raises(ValueError, match="fewer than num_checkpoints"):
            phases(config(num_checkpoints=count), checkpoints, steps=steps)
        return
    found = phases(config(num_checkpoints=count), checkpoints, steps=steps)
    by_step = [source_at(found, step) for step in range(1, steps + 1)]
    assert by_step == sorted(by_step) and by_step[-1] == checkpoints[-1] and len(set(by_step)) == (count or num)
    lengths = [by_step.count(checkpoint) for checkpoint in set(by_step)]
    assert max(lengths) - min(lengths) <= 1


def test_pairs_are_taken_as_they_are() -> None:
    found = phases(config(schedule="at", at="1:30, 5:10 80:40"), [10, 20, 30, 40])
    assert found == ((1, 30), (5, 10), (80, 40))
    assert [source_at(found, step) for step in (1, 4, 5, 79, 80, 100)] == [30, 30, 10, 10, 40, 40]
    assert next_change(found, 4) == (5, 10) and next_change(found, 5) == (80, 40) and next_change(found, 80) is None


def test_a_phase_with_the_same_checkpoint_is_no_change() -> None:
    assert next_change((Phase(1, 10), Phase(5, 10), Phase(9, 20)), 1) == (9, 20)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("2:10", "rise from 1"),
        ("1:10 1:20", "rise from 1"),
        ("1:10 101:20", "not exceed training.steps = 100"),
        ("1:10 50", "is not a list"),
        ("1:x", "is not a list"),
        ("1:10 50:25", "names step-25, which is not there"),  # skipped in silence in the method's reference code
    ],
)
def test_pairs_without_a_source_for_every_step_are_refused(at: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases(config(schedule="at", at=at), [10, 20])


def test_no_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        phases(config(), [])


def cliff(step: int) -> float:
    """A plateau, a fall between 40 and 60, another plateau."""
    return 1.0 if step <= 40 else 0.1 if step > 60 else 1.0 - 0.045 * (step - 40)


def test_two_shot_takes_a_checkpoint_inside_the_steepest_fall_and_the_last() -> None:
    losses, checkpoints = {step: cliff(step) for step in range(1, 101)}, [10, 25, 50, 75, 100]
    assert steepest(losses, checkpoints) == 50
    found = phases_of(config(schedule="two_shot", switch=0.3), steps=100, checkpoints=checkpoints, losses=losses)
    assert found == ((1, 50), (31, 100))


@pytest.mark.parametrize(("switch", "steps", "first_step"), [(0.28, 25, 8), (0.14, 50, 8), (0.95, 10, 10), (0.5, 1, 1)])
def test_two_shot_switches_after_its_share_of_the_steps(switch: float, steps: int, first_step: int) -> None:
    """0.28 x 25 is 7.000000000000001 in floating point; and the last checkpoint has at least the last step."""
    keys = config(schedule="two_shot", switch=switch)
    found = phases_of(keys, steps=steps, checkpoints=[10, 20, 30], losses={5: 3.0, 15: 1.0, 25: 0.9})
    assert found == ((1, 10), (first_step, 30)) and source_at(found, steps) == 30


def test_the_fall_is_per_step_of_the_source() -> None:
    """Ten times the distance between checkpoints with three times the fall is less steep."""
    losses = {step: 10 - 1.0 * min(step, 20) / 10 - 3.0 * max(0, step - 20) / 180 for step in range(1, 201)}
    assert steepest(losses, [10, 20, 110, 200]) == 10


def test_two_shot_without_logs_or_with_one_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no loss of the source in the logs"):
        steepest({}, [10, 20])
    with pytest.raises(ValueError, match="needs two checkpoints"):
        steepest({1: 0.0}, [10])


# -- the weight of the labels ---------------------------------------------------------------------------------------


def weights(**keys: object) -> list[float]:
    return [label_weight(config(**keys), step=step, steps=10) for step in range(1, 11)]


def test_the_labels_weight_follows_its_schedule() -> None:
    assert weights(label_weight=0.3) == [0.3] * 10
    linear = weights(label_weight=0.1, label_weight_schedule="linear", final_label_weight=1.0)
    assert linear == pytest.approx([0.1 * i for i in range(1, 11)])
    stable = weights(label_weight=0.2, label_weight_schedule="wsd", warmup=0.4, decay=0.2)
    assert stable == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.6, 1.0])


@settings(deadline=None)
@given(
    a=st.floats(0, 1), last=st.floats(0, 1), warmup=st.floats(0, 0.5), decay=st.floats(0, 0.5), step=st.integers(1, 50)
)
def test_the_labels_weight_stays_a_share(a: float, last: float, warmup: float, decay: float, step: int) -> None:
    for schedule in ("constant", "linear", "wsd"):
        keys = config(
            label_weight=a, final_label_weight=last, label_weight_schedule=schedule, warmup=warmup, decay=decay
        )
        assert 0.0 <= label_weight(keys, step=step, steps=50) <= 1.0


# -- values of the section ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "evne"}, 'did you mean "even"'),
        ({"label_weight": 1.5}, "label_weight = 1.5: it must be a number at least 0 and at most 1"),
        ({"switch": 1.0}, "switch = 1.0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1e-42}, "temperature = 1e-42: logits divided by it overflow.*set 0"),
        ({"temperature": 0.0, "softened": "both"}, "the limit has no gradient"),
        ({"warmup": 0.7, "decay": 0.6}, "more than all steps together"),
        ({"students": 0}, "students = 0"),
    ],
)
def test_values_out_of_range_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**keys).validate()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": ""}, "without source"),
        ({"schedule": "at"}, "without at"),
        ({"at": "1:10"}, 'only "at" reads it'),
        ({"schedule": "final", "num_checkpoints": 3}, 'only "even" reads it'),
        ({"switch": 0.3}, 'switch = 0.3 with schedule = "even": only "two_shot" reads it'),
        ({"final_label_weight": 0.5}, 'with label_weight_schedule = "constant": only "linear" reads it'),
        ({"label_weight_schedule": "linear", "warmup": 0.2}, 'Remove it, or set label_weight_schedule = "wsd"'),
        ({"decay": 0.0}, 'decay = 0.0 with label_weight_schedule = "constant": only "wsd" reads it'),
        ({"schedule": "two_shot", "source": "", "targets": "targets"}, "it reads the logs"),
    ],
)
def test_keys_that_lack_or_are_not_read_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**({"schedule": "even", "source": "source"} | keys)).check_used()


# -- files ----------------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int, *, finished: bool = True) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 1000)
    if finished:
        (path / ".metadata").write_bytes(f"metadata of {step}".encode())
    return path


def test_finished_checkpoints_of_the_folder_count(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, finished=False)
    make_checkpoint(tmp_path / "other", 300)
    (tmp_path / "step-4-good").mkdir()
    assert finished_steps(tmp_path) == [3, 20, 100]
    with pytest.raises(ValueError, match="no such folder"):
        finished_steps(tmp_path / "missing")


def test_checkpoints_that_the_source_left_behind_count_only_by_name(tmp_path: Path) -> None:
    """Its run went from step 40 back to step 20, and has come to step 30 since."""
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    write_branch(tmp_path, Branch(20, (40,)))
    found = {
        schedule: phases_on_disk(DistillationConfig(schedule=schedule, source=str(tmp_path), at=at), steps=9)
        for schedule, at in {"final": "", "even": "", "at": "1:40"}.items()
    }
    assert found == {"final": ((1, 30),), "even": ((1, 10), (4, 20), (7, 30)), "at": ((1, 40),)}
    write_branch(tmp_path, Branch(0, (10, 20, 30, 40)))
    with pytest.raises(ValueError, match="left step-10, step-20, step-30, step-40 behind"):
        phases_on_disk(DistillationConfig(schedule="even", source=str(tmp_path)), steps=9)


def test_the_identity_is_of_the_checkpoints_not_of_their_folder(tmp_path: Path) -> None:
    for folder in ("first", "moved", "replaced"):
        for step in (10, 20):
            make_checkpoint(tmp_path / folder, step)
    (tmp_path / "replaced" / "step-20" / ".metadata").write_bytes(b"of another save")
    found = {
        folder: identity_of(DistillationConfig(schedule="even", source=str(tmp_path / folder)), steps=8)
        for folder in ("first", "moved", "replaced")
    }
    assert found["first"] == found["moved"] and list(found["first"]) == ["step-10", "step-20"]
    assert found["replaced"]["step-10"] == found["first"]["step-10"]
    assert found["replaced"]["step-20"] != found["first"]["step-20"]


def test_the_sources_losses_are_read_from_its_logs(tmp_path: Path) -> None:
    """A resumed session replaces the steps that it repeats; other tags and the later of two ranks are not read."""
    for folder, value, steps in (
        ("20250101-0000/rank_0", 1.0, (1, 2, 3)),
        ("20250102-0000/rank_0", 2.0, (3, 4)),
        ("20250102-0000/rank_1", 9.0, (4,)),
    ):
        with SummaryWriter(str(tmp_path / "tb" / folder)) as writer:
            for step in steps:
                writer.add_scalar("loss_metrics/global_avg_loss", value + step, step)
                writer.add_scalar("grad_norm", 7.0, step)
    assert losses_of(tmp_path) == {1: 2.0, 2: 3.0, 3: 5.0, 4: 6.0}
    assert losses_of(tmp_path / "missing") == {}


def test_steps_that_a_source_left_behind_are_not_its_losses(tmp_path: Path) -> None:
    """It went back, or another run had used its folder, and logs less often: not only the steps that it repeats go."""
    for i, (first, every, fall) in enumerate(((1, 1, 20), (5, 5, 60))):
        with SummaryWriter(str(tmp_path / "tb" / f"2025010{i}-0000"), purge_step=first) as writer:
            for step in range(first, 101, every):
                writer.add_scalar("loss_metrics/global_avg_loss", 5.0 if step <= fall else 1.0 - i / 2, step)
                writer.add_scalar("ledger/wall_seconds", step * (2.0 - i), step)
    found = losses_of(tmp_path)
    assert sorted(found) == [1, 2, 3, 4, *range(5, 101, 5)] and steepest(found, [20, 40, 60, 80, 100]) == 60
    write_run_record(tmp_path / "teacher", RunRecord(devices="1 x CPU"), losses=())
    keys = DistillationConfig(schedule="final", source=str(tmp_path / "checkpoint"))
    assert training_seconds(keys, until=99) == 95.0


def test_two_shot_reads_the_logs_beside_the_checkpoints(tmp_path: Path) -> None:
    for step in (20, 50, 100):
        make_checkpoint(tmp_path / "checkpoint", step)
    with SummaryWriter(str(tmp_path / "tb" / "20250101-0000")) as writer:
        for step in range(1, 101):
            writer.add_scalar("loss_metrics/global_avg_loss", cliff(step), step)
    keys = DistillationConfig(schedule="two_shot", source=str(tmp_path / "checkpoint"))
    assert phases_on_disk(keys, steps=10) == ((1, 50), (6, 100))


def test_the_folder_that_is_meant_is_named(tmp_path: Path) -> None:
    """The folder of the run, or of one checkpoint, in place of that of all; and targets are no checkpoints."""
    for folder, key, file in (("checkpoint", "source", ".metadata"), ("targets", "targets", "targets.json")):
        (tmp_path / folder / "step-10").mkdir(parents=True)
        (tmp_path / folder / "step-10" / file).write_bytes(b"x")
        for path, fix in (
            (tmp_path, f"give {tmp_path / folder}$"),
            (tmp_path / folder / "step-10", f"it is one itself, so name the folder above, {tmp_path / folder}$"),
            (tmp_path / "checkpoint" / "empty", "check the path$"),
        ):
            (tmp_path / "checkpoint" / "empty").mkdir(exist_ok=True)
            keys = DistillationConfig(schedule="final", **{key: str(path)})  # type: ignore[arg-type]
            what = "checkpoint" if key == "source" else "targets"
            message = rf"{key} = {path}: it holds no finished {what} \(a folder step-N with {file}\): {fix}"
            with pytest.raises(ValueError, match=message):
                phases_on_disk(keys, steps=10)


def test_unfinished_targets_are_not_skipped_in_silence(tmp_path: Path) -> None:
    """A killed command left those of the last checkpoint: "final" would learn from the one before."""
    for step, file in ((2, "targets.json"), (4, "progress.json")):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / file).write_bytes(b"x")
    for schedule in ("final", "even"):
        with pytest.raises(ValueError, match="step-4 are unfinished: .* again, .* delete the folder, or"):
            phases_on_disk(DistillationConfig(schedule=schedule, targets=str(tmp_path)), steps=9)
    named = DistillationConfig(schedule="at", at="1:2", targets=str(tmp_path))
    assert phases_on_disk(named, steps=9) == ((1, 2),)
    (tmp_path / "step-4" / "targets.json").write_bytes(b"x")  # killed between the last two writes
    assert phases_on_disk(DistillationConfig(schedule="final", targets=str(tmp_path)), steps=9) == ((1, 4),)


def test_reading_ahead_reads_the_files_and_survives_missing_ones(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    read_ahead(path).join(timeout=10)
    assert checkpoint_of(DistillationConfig(source=str(tmp_path)), 10) == path
    (path / "__1_0.distcp").mkdir()  # cannot be read: left to the load itself
    thread = read_ahead(path)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_sources_training_time_is_that_of_its_ledger(tmp_path: Path) -> None:
    """Up to the checkpoint that is used, times its devices; the key, where it is given; 0 of stock torchtitan."""
    with SummaryWriter(str(tmp_path / "tb" / "20250101-0000")) as writer:
        for step in (5, 10, 15):
            writer.add_scalar("ledger/wall_seconds", 2.0 * step, step)
    keys = DistillationConfig(schedule="final", source=str(tmp_path / "checkpoint"))
    assert training_seconds(keys, until=10) == 0, "nothing says on how many devices"
    write_run_record(tmp_path / "teacher", RunRecord(devices="8 x NVIDIA H200"), losses=())
    assert training_seconds(keys, until=10) == 8 * 20.0
    assert training_seconds(keys, until=3) == 0
    assert training_seconds(replace(keys, source_seconds=7.0), until=10) == 7.0
    assert training_seconds(replace(keys, source="", targets="targets"), until=10) == 0
