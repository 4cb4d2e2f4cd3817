"""Runs with broken files: everything else is reported, and the missing parts are named."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from test_report import decide, losses, validations, write

from titan_attent.report import draw, main, read_run, summarize
from titan_attent.report.picture import run_names
from titan_attent.report.teaching import panels_of


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved."""
    kept: list[Figure] = []

    def keep(self: Figure, path: Path, **kw: object) -> None:
        kept.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def broken(folder: Path, how: str) -> Path:
    if how in ("empty folder", "no events", "a file"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("") if how == "a file" else folder.mkdir()
    if how == "no events":
        (folder / "tb" / "x").mkdir(parents=True)
        (folder / "tb" / "x" / "events.out.tfevents.1.host.1.0").touch()
    if how == "garbage":
        write(folder, losses(1, 9)).write_bytes(b"what is this, and why is it here" * 9)
    if how == "a huge length":
        file = write(folder, losses(1, 9))
        file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    return folder


HOW = ("empty folder", "no events", "a file", "garbage", "a huge length", "missing")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_broken_folder_does_not_cost_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, place: int
) -> None:
    good = [tmp_path / name for name in "ab"]
    for run in good:
        write(run, losses(1, 9) + validations({4: 3.0}))
    runs = good[:place] + [broken(tmp_path / "broken", how)] + good[place:]
    assert main([str(run) for run in runs]) == 0
    out, err = capsys.readouterr()
    assert str(good[0]) in out.split("\n")[0] and str(good[1]) in out.split("\n")[0]
    assert f"titan_attent.report: {tmp_path / 'broken'} is left out: {tmp_path / 'broken'}" in err
    assert ("the others are compared with the first run that could be read" in err) == (place == 0)
    assert f"picture: {good[0] / 'curves.png'}" in out


@pytest.mark.parametrize("how", HOW)
def test_nothing_but_broken_folders_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    run = broken(tmp_path / "broken", how)
    for runs in ([run], [run, tmp_path / "other"]):
        assert main([str(path) for path in runs]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("titan_attent.report: ") and err.count("\n") == 1


def test_a_damaged_event_file_keeps_what_comes_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a", losses(1, 200))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    write(tmp_path / "b", losses(1, 3)).write_bytes(content[: len(content) // 3])
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert [90 < runs[0].last_step < 110, 60 < runs[1].last_step < 70] == [True, True]
    (note,) = runs[0].notes
    assert str(file) in note and "is damaged at byte" in note and not runs[1].notes
    assert main([str(tmp_path / "a")]) == 0 and note in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 9)).chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_run(tmp_path)


@pytest.mark.parametrize("cut", ['{"step": 3, "teacher/ov', '{"step": 3, "teacher/ov\n', "\0\0\0\0", "\0\0\n", "é"[:1]])
def test_a_half_written_last_decision_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    write(tmp_path, losses(1, 9))
    decide(tmp_path, [{"step": 1, "teacher/overlap": 0.5}], cut=cut)
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "50.00%" in out and err.count("\n") == cut.endswith("\n")


@pytest.mark.parametrize("step", [-1, 10**400, 1e308, "x", None, [1]])
def test_a_decision_of_no_step_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], step: Any) -> None:
    write(tmp_path, losses(1, 9))
    decide(tmp_path, [{"step": step, "teacher/overlap": 0.9}, {"step": 1, "teacher/overlap": 0.5}])
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "50.00%" in out and "line 1 is not a decision of the teacher" in err


def test_a_run_named_twice_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", losses(1, 9))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert main([str(tmp_path / name) for name in ("a", "a", "link")]) == 0
    out, err = capsys.readouterr()
    assert out.split("\n")[0].count(str(tmp_path)) == 1 and "saved" not in out
    assert err.count("is the same run as") == err.count(": it is shown once") == 2


def test_names_that_matplotlib_would_read(tmp_path: Path, figures: list[Figure]) -> None:
    names = ["_old", "a$b$", "$\\oops$", "x" * 150, "x" * 149 + "y"]
    runs = []
    for name in names:
        write(tmp_path / name, losses(1, 5))
        runs.append(read_run(tmp_path / name))
    drawn = run_names(runs)
    assert len(set(drawn)) == 5 and max(map(len, drawn)) <= 64 and not any(name.startswith("_") for name in drawn)
    draw(runs, tmp_path / "all.png")
    figures[0].canvas.draw()  # invalid mathematics would raise
    assert len(figures[0].legends[0].get_texts()) == 5
    same = [tmp_path / parent / "run" for parent in ("one", "two")]
    for path in same:
        write(path, losses(1, 5))
    assert run_names([read_run(path) for path in same]) == ["one", "two"]


def test_the_repeats_are_shown(tmp_path: Path) -> None:
    for name, rows in (("a", [("teacher/repeats", 4, 3.5)]), ("b", [])):
        write(tmp_path / name, losses(1, 9) + rows)
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert summarize(runs[0])["teacher/repeats"] == "3.5 times at step 4"
    assert "teacher/repeats" not in summarize(runs[1])
    shown = [[tag for panel in panels_of([run]) for tag in panel.tags] for run in runs]
    assert ["teacher/repeats" in tags for tags in shown] == [True, False]
