"""The report against the plain lists that were written, and against TensorBoard's own accumulator."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from titan_attent.report import SPEED, TRAIN, VALIDATION, draw, main, read_run, summarize, table

Rows = Sequence[tuple[str, int, float]]
STAMP = "20260101-1200"


def write(run: Path, rows: Rows, *, number: int = 0, purge: int | None = None, folder: str = STAMP) -> Path:
    """One session: ``rows`` of (tag, step, value), ten seconds a step, an hour's pause before the session."""
    target = run / "tb" / folder
    before = set(target.glob("*"))
    with SummaryWriter(str(target), purge_step=purge) as writer:
        for tag, step, value in rows:
            writer.add_scalar(tag, value, step, walltime=3600.0 * number + 10.0 * step)
    (file,) = set(target.glob("*")) - before
    # SummaryWriter names files by the second; sessions of a real run are further apart than these.
    return file.rename(target / f"events.out.tfevents.{1_700_000_000 + number}.host.1.0")


def losses(start: int, stop: int, *, shift: float = 0.0) -> list[tuple[str, int, float]]:
    return [(TRAIN, step, shift + 8.0 / step) for step in range(start, stop)]


def speeds(start: int, values: Sequence[float]) -> list[tuple[str, int, float]]:
    return [(SPEED, start + i, value) for i, value in enumerate(values)]


def as_dict(series: tuple[np.ndarray, np.ndarray]) -> dict[int, float]:
    steps, values = series
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def expected(rows: Rows, tag: str = TRAIN) -> dict[int, float]:
    return {step: float(np.float32(value)) for name, step, value in rows if name == tag}


# -- reading ----------------------------------------------------------------------------------------------------------


def test_one_session_is_read_as_written(tmp_path: Path) -> None:
    rows = losses(1, 30) + [(VALIDATION, 10, 3.5), ("teacher/ratio", 29, 0.5)]
    write(tmp_path, rows)
    run = read_run(tmp_path)
    for tag in (TRAIN, VALIDATION, "teacher/ratio"):
        assert as_dict(run.series(tag)) == expected(rows, tag)
    assert (run.last_step, run.session_starts, run.wall_seconds) == (29, [1], 280.0)


@pytest.mark.parametrize("folder", [STAMP, "20260102-0000"])
def test_a_resumed_run_hides_what_it_trains_again(tmp_path: Path, folder: str) -> None:
    first = losses(1, 20) + [(VALIDATION, 15, 1.0)]
    second = losses(12, 15, shift=1.0)  # ends before the first session did
    write(tmp_path, first)
    write(tmp_path, second, number=1, purge=12 if folder == STAMP else None, folder=folder)
    run = read_run(tmp_path)
    assert as_dict(run.series(TRAIN)) == expected(first[:11]) | expected(second)
    assert len(run.series(VALIDATION)[0]) == 0
    assert run.session_starts == [1, 12]
    assert run.wall_seconds == 180.0 + 20.0  # the pause between them is not training
    if folder == STAMP:
        accumulator = EventAccumulator(str(tmp_path / "tb" / STAMP), size_guidance={SCALARS: 0}).Reload()
        assert as_dict(run.series(TRAIN)) == {event.step: event.value for event in accumulator.Scalars(TRAIN)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8), st.booleans()), min_size=1, max_size=5))
def test_any_sessions(sessions: list[tuple[int, int, bool]]) -> None:
    reference: dict[int, float] = {}
    spans: list[int] = []
    with TemporaryDirectory() as folder:
        for number, (start, length, purge) in enumerate(sessions):
            rows = losses(start, start + length, shift=float(number))
            write(Path(folder), rows, number=number, purge=start if purge else None)
            reference = {step: value for step, value in reference.items() if step < start}
            spans = [*(spans if reference else []), 10 * (length - 1)]
            reference |= expected(rows)
        run = read_run(folder)
    assert as_dict(run.series(TRAIN)) == reference
    assert run.wall_seconds == sum(spans)
    assert run.series(TRAIN)[0].tolist() == sorted(reference)


def test_a_new_run_in_an_old_folder_is_the_run(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 50))
    write(tmp_path, losses(1, 4, shift=1.0), number=1, folder="20260102-0000")
    run = read_run(tmp_path)
    assert (run.last_step, run.session_starts, run.wall_seconds) == (3, [1], 20.0)


def test_a_file_cut_short_keeps_its_whole_events(tmp_path: Path) -> None:
    file = write(tmp_path, losses(1, 10))
    file.write_bytes(file.read_bytes()[:-5])
    assert as_dict(read_run(tmp_path).series(TRAIN)) == expected(losses(1, 9))


def test_of_several_ranks_the_lowest_is_read(tmp_path: Path) -> None:
    for rank in (10, 2, 0):
        write(tmp_path, losses(1, 5, shift=rank), folder=f"{STAMP}/rank_{rank}")
    write(tmp_path, losses(5, 7), number=1, folder=f"{STAMP}/rank_0")
    run = read_run(tmp_path)
    assert as_dict(run.series(TRAIN)) == expected(losses(1, 7))
    assert run.session_starts == [1, 5]


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_resumed_run(tmp_path: Path) -> None:
    first, second = [10.0, 500.0, 503.0, 507.0], [20.0, 511.0, 530.0]
    validation = [(VALIDATION, 1, math.nan), (VALIDATION, 3, 3.25), (VALIDATION, 5, 9.0), (VALIDATION, 6, 3.5)]
    write(tmp_path, losses(1, 5) + speeds(1, first) + validation[:2])
    write(
        tmp_path,
        [
            *losses(5, 8),
            *speeds(5, second),
            *validation[2:],
            ("teacher/round", 7, 3.0),
            ("teacher/selected", 7, 123456.0),
            ("teacher/overlap", 6, 0.123456),
            ("teacher/quarantined", 7, 2.0),
        ],
        number=1,
        purge=5,
    )
    for name in ("step-9", "step-10", "step-20", "step-best"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
        if name != "step-20":  # still being written
            (tmp_path / "checkpoint" / name / ".metadata").touch()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "trace.jsonl").touch()
    facts = summarize(read_run(tmp_path))
    assert facts["run"] == str(tmp_path)
    assert facts["steps"] == "7 (1 resume)"
    assert facts["train loss"] == f"{8 / 7:.4f}"
    assert facts["validation loss"] == "3.5000 at step 6"
    assert facts["best validation loss"] == "3.2500 at step 3"
    # The first step of each session is compilation.
    assert facts["tokens/s/device"] == f"{statistics.median(first[1:] + second[1:]):.0f}"
    assert facts["wall time"] == "0 h 00 min 50 s"
    assert facts["teacher/round"] == "3"
    assert facts["teacher/selected"] == "123,456"
    assert facts["teacher/overlap"] == "0.1235 at step 6"
    assert facts["teacher/quarantined"] == "2"  # a tag that the report does not know
    assert facts["ledger/tokens_covered_per_second"] == "-"
    assert facts["checkpoint"] == "checkpoint/step-10"
    assert facts["trace"] == "teacher/trace.jsonl"


def test_what_was_not_logged_is_a_dash(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 3) + speeds(1, [9.0]))
    facts = summarize(read_run(tmp_path))
    present = {"run", "steps", "train loss", "wall time", "tensorboard"}
    assert {fact for fact, value in facts.items() if value != "-"} == present
    # What DESIGN.md promises of a teaching run, and the teacher's own cost.
    assert {"teacher/ratio", "teacher/max_weight", "ledger/select_seconds", "ledger/overhead_percent"} <= facts.keys()


def test_two_runs_stand_side_by_side() -> None:
    text = table([{"run": "a", "steps": "1,000"}, {"run": "long/name", "steps": "2", "teacher/new": "0.5"}])
    assert text.split("\n") == [
        "run          a      long/name",
        "steps        1,000  2",
        "teacher/new  -      0.5",
    ]


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    saved: list[Figure] = []
    save = Figure.savefig

    def save_and_keep(self: Figure, *args: Any, **kw: Any) -> None:
        saved.append(self)
        save(self, *args, **kw)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return saved


def points(line: Line2D) -> list[list[float]]:
    return np.column_stack(line.get_data()).tolist()


def teaching(stop: int) -> list[tuple[str, int, float]]:
    tags = ("ratio", "round", "importance_mean", "importance_p99", "effective_sample_size", "never_selected", "overlap")
    names = [f"teacher/{tag}" for tag in tags] + ["ledger/overhead_percent", SPEED]
    return [(name, step, 0.5 + i / 100 * step) for i, name in enumerate(names) for step in range(1, stop)]


def test_every_series_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    validation = [(VALIDATION, step, 4.0 / step) for step in range(10, 100, 10)]
    write(tmp_path, losses(1, 100) + validation + teaching(60))
    write(tmp_path, losses(80, 120), number=1, purge=80)
    assert main([str(tmp_path)]) == 0
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 1200
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
    assert {path.name for path in tmp_path.iterdir()} == {"tb", "curves.png"}
    (figure,) = figures
    assert figure.get_suptitle() == tmp_path.name
    drawn = [points(line) for axes in figure.axes for line in axes.lines]
    run = read_run(tmp_path)
    for tag in {tag for tag, _, _ in teaching(2)} | {TRAIN, VALIDATION}:
        assert np.column_stack(run.series(tag)).tolist() in drawn, tag
    assert not [text for axes in figure.axes for text in axes.texts]
    low, high = figure.axes[0].get_ylim()
    assert low < 8 / 119 and 8 / 6 < high < 8  # the first steps do not flatten the curve
    assert [[80.0, 0.0], [80.0, 1.0]] in drawn  # the resume


def test_two_runs_overlaid(tmp_path: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "one" / "out", tmp_path / "two" / "out"]
    for i, run in enumerate(runs):
        write(run, losses(1, 100, shift=i) + teaching(100))
    assert main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert all(str(run) in out.split("\n")[0] for run in runs)
    assert f"picture: {runs[0] / 'curves.png'}" in out and not (runs[1] / "curves.png").exists()
    assert imread(runs[0] / "curves.png").std() > 0.05
    (figure,) = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one/out", "two/out"]
    for axes in figure.axes:
        colors = {line.get_color() for line in axes.lines if points(line)}
        assert colors == {"C0", "C1"}


def test_panels_without_data_say_so(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, [(TRAIN, 1, math.nan), (TRAIN, 2, 3.0), (TRAIN, 3, math.inf)])
    draw([read_run(tmp_path)], tmp_path / "other.png")
    assert [text.get_text() for axes in figures[0].axes for text in axes.texts] == ["not logged"] * 5
    assert imread(tmp_path / "other.png").ndim == 3


def test_the_smoothed_loss_is_a_mean_of_the_logged_one(tmp_path: Path, figures: list[Figure]) -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 400)
    write(tmp_path, [(TRAIN, i + 1, value) for i, value in enumerate(values)])
    draw([read_run(tmp_path)], tmp_path / "curves.png")
    raw, smooth = (np.asarray(line.get_ydata()) for line in figures[0].axes[0].lines[:2])
    np.testing.assert_allclose(raw, values, rtol=1e-6)
    np.testing.assert_allclose(smooth[100], values[92:109].mean(), rtol=1e-6)  # 400 / 50 to either side
    np.testing.assert_allclose(smooth[[0, -1]], [values[0], values[-9:].mean()], rtol=1e-6)


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, losses(1, 5))
    run = read_run(tmp_path)
    (tmp_path / "curves.png").write_text("old")

    def fail(self: Figure, path: Path, **kw: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"tb", "curves.png"}


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "arguments", "message"),
    [
        ("nothing", ["missing"], "missing is not a folder: name the job.dump_folder of a run"),
        ("folder", ["run"], "holds no TensorBoard scalars: set metrics.enable_tensorboard = true"),
        ("empty file", ["run"], "holds no TensorBoard scalars: set metrics.enable_tensorboard = true"),
        ("run", ["run", "missing"], "missing is not a folder"),
        ("run", ["run", "--output", "curves.pdf"], "curves.pdf cannot be written: name a .png file"),
        ("run", ["run", "--output", "nowhere/curves.png"], "curves.png cannot be written: name a .png file"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setup: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if setup == "folder":
        Path("run").mkdir()
    elif setup != "nothing":
        write(Path("run"), [] if setup == "empty file" else losses(1, 3))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("titan_attent.report: ") and message in err and err.count("\n") == 1
