"""Which checkpoints of a folder a run resumes from, keeps and deletes."""

from pathlib import Path

import pytest

from titan_attent.titan.checkpoint_folder import (
    Branch,
    go_back,
    is_finished,
    latest,
    move_aside,
    names,
    read_branch,
    steps_in,
    to_purge,
)


def save(folder: Path, *steps: int, content: str = "") -> None:
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (folder / f"step-{step}" / ".metadata").write_text(content)


def purge(folder: Path, *, keep: int, saving: int) -> set[int]:
    return {int(path.name[5:]) for path in to_purge(folder, keep=keep, saving=saving)}


def test_names_match_as_a_whole(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
    save(tmp_path, 4, 8)
    for other in ("step-16-bad", "old-step-20", "step-12.tmp", "step-012", "step-", "step--1", "step-1e3", "step-٣"):
        (tmp_path / other).mkdir()
        (tmp_path / other / ".metadata").touch()
    (tmp_path / "step-99").write_text("a file")
    (tmp_path / "step-30").mkdir()  # as a killed save leaves it
    assert steps_in(tmp_path) == {4: True, 8: True, 30: False}
    assert latest(tmp_path) == 8
    assert purge(tmp_path, keep=2, saving=8) == set()


def test_the_last_weights_of_a_run_count_as_its_end(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8" / "model.safetensors.index.json").touch()
    (tmp_path / "step-12" / "sharded").mkdir(parents=True)
    assert not is_finished(tmp_path / "step-12")
    (tmp_path / "step-12" / "model-00001-of-00001.safetensors").touch()
    assert steps_in(tmp_path) == {4: True, 8: True, 12: True}
    assert latest(tmp_path) == 12


@pytest.mark.parametrize("keep", [2, 3, 10])
def test_a_purge_keeps_the_newest_finished_ones(tmp_path: Path, keep: int) -> None:
    """Brute force over a run of 12 saves, of which some were killed."""
    done: list[int] = []
    for step in range(1, 13):
        save(tmp_path, step)
        if step % 4 == 0:
            (tmp_path / f"step-{step}" / ".metadata").unlink()
        gone = purge(tmp_path, keep=keep, saving=step)
        whole = [n for n in range(1, step + 1) if n % 4 or n == step]
        kept = whole[-keep:]
        assert gone == ({n for n in range(1, step) if n < kept[0]} if len(whole) > keep else set())
        done.append(step)


def test_a_run_that_went_back_resumes_from_its_new_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 4, 8, 12, 16)
    message = go_back(tmp_path, 4)
    assert "resumes from step 4" in message and "step-8, step-12, step-16" in message and "load_step" in message
    assert read_branch(tmp_path) == Branch(4, (8, 12, 16))
    assert latest(tmp_path) == 4, "a kill before the first save must not lead back to the old branch"
    save(tmp_path, 6)
    assert latest(tmp_path) == 6
    message = move_aside(tmp_path, 8)
    assert "abandoned/step-8" in message and is_finished(tmp_path / "abandoned" / "step-8")
    save(tmp_path, 8, content="new")
    assert latest(tmp_path) == 8
    save(tmp_path, 10)
    assert purge(tmp_path, keep=2, saving=10) == {6}, "checkpoints of the earlier branch stay"
    assert move_aside(tmp_path, 10).count("abandoned/step-10") == 1
    assert steps_in(tmp_path).keys() == {4, 6, 8, 12, 16}


def test_going_back_twice_and_forth(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    assert go_back(tmp_path, 8) == "" and read_branch(tmp_path) == Branch(), "the newest checkpoint is not a way back"
    go_back(tmp_path, 4)
    move_aside(tmp_path, 8)
    save(tmp_path, 8, content="second")
    go_back(tmp_path, 4)
    assert latest(tmp_path) == 4
    move_aside(tmp_path, 8)
    aside = tmp_path / "abandoned" / "step-8.2" / ".metadata"
    assert aside.read_text() == "second", "no earlier checkpoint is lost"
    save(tmp_path, 8, 12, content="third")
    save(tmp_path, 16)
    go_back(tmp_path, 8)
    assert latest(tmp_path) == 8
    assert "step 16" in go_back(tmp_path, 16)  # forward, to a checkpoint that was left behind
    assert latest(tmp_path) == 16 and read_branch(tmp_path) == Branch(16, ())
    assert go_back(tmp_path, 0) and latest(tmp_path.parent / "nothing") is None


def test_a_folder_with_only_abandoned_steps_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    go_back(tmp_path, 4)
    (tmp_path / "step-4" / ".metadata").unlink()
    with pytest.raises(
        ValueError, match="only checkpoints that the run left behind .*step-8.* --checkpoint.load_step 8"
    ):
        latest(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": "titan_attent.checkpoint_branch", "version": 1, "start": -2}']
)
def test_a_damaged_branch_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "branch.json").write_text(content)
    save(tmp_path, 4)
    with pytest.raises(ValueError, match="branch.json.*remove it, and give checkpoint.load_step"):
        latest(tmp_path)


def test_many_names() -> None:
    assert names([1, 2, 3, 4, 5, 6]) == "step-1, step-2, ..., step-6"
