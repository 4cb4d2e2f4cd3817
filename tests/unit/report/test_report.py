"""The report against the plain lists that were written, and against TensorBoard's own accumulator."""

import json
import math
import os
import statistics
import subprocess
import sys
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
from titan_attent.report.summary import with_unit
from titan_attent.systems.teaching.system import Teaching

Rows = Sequence[tuple[str, int, float]]
STAMP = "20260101-1200"


def write(run: Path, rows: Rows, *, number: int = 0, purge: int | None = None, folder: str = STAMP) -> Path:
    """One session: ``rows`` of (tag, step, value), ten seconds per step, an hour's pause before the session."""
    target = run / "tb" / folder
    before = set(target.glob("*"))
    with SummaryWriter(str(target), purge_step=purge) as writer:
        for tag, step, value in rows:
            writer.add_scalar(tag, value, step, walltime=3600.0 * number + 10.0 * step)
    (file,) = set(target.glob("*")) - before
    # SummaryWriter names files by the second; sessions of a real run have more time between them.
    return file.rename(target / f"events.out.tfevents.{1_700_000_000 + number}.host.1.0")


def losses(start: int, stop: int, *, shift: float = 0.0) -> list[tuple[str, int, float]]:
    return [(TRAIN, step, shift + 8.0 / step) for step in range(start, stop)]


def speeds(start: int, values: Sequence[float]) -> list[tuple[str, int, float]]:
    return [(SPEED, start + i, value) for i, value in enumerate(values)]


def validations(losses_at: dict[int, float]) -> list[tuple[str, int, float]]:
    return [(VALIDATION, step, loss) for step, loss in losses_at.items()]


def tokens(steps: Sequence[int], per_step: float) -> list[tuple[str, int, float]]:
    return [("n_tokens_seen", step, step * per_step) for step in steps]


def decide(run: Path, records: Sequence[dict[str, float]], *, cut: str = "") -> Path:
    """Write ``rounds.jsonl``: whole ``records``, and a last line that a kill ``cut`` short."""
    file = run / "teacher" / "rounds.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + cut)
    return file


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
    assert run.seconds[TRAIN] == {s: 10.0 * (s - 1) for s in range(1, 12)} | {12: 180.0, 13: 190.0, 14: 200.0}
    assert run.session_seconds == [0.0, 180.0]
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


def test_tokens_are_those_of_all_ranks(tmp_path: Path) -> None:
    """torchtitan alone continues from one rank's count: 4 ranks with 512 tokens per step, then 2 ranks from step 10."""
    write(tmp_path, losses(1, 11) + tokens(range(1, 11), 512.0))
    wrong = [("n_tokens_seen", step, 2 * (10 * 128 + (step - 10) * 256.0)) for step in range(11, 21)]
    write(tmp_path, losses(11, 21) + wrong, number=1)
    run = read_run(tmp_path)
    assert run.tokens_per_step == 512.0
    x, values = run.along("tokens", TRAIN)
    assert x.tolist() == [512.0 * step for step in range(1, 21)] and len(values) == 20
    assert summarize(run)["tokens"] == "10,240"


def ledger(step: int, *, done: int, batch: int, example: int) -> list[tuple[str, int, float]]:
    """The ledger's rows at ``step``, ``done`` of them counted: 7 s per step, two examples covered per trained one."""
    trained, wall = float(batch * done), 7.0 * step
    facts = {"examples_trained": trained, "examples_covered": 2 * trained, "wall_seconds": wall}
    return [(f"ledger/{name}", step, x) for name, x in facts.items()] + [
        ("ledger/tokens_covered_per_second", step, 2 * trained * example / wall)
    ]


@pytest.mark.parametrize(
    ("seen", "example", "per_step"),
    [
        (4 * 48 * 96.0, 96, 48 * 96.0),  # four context parallel ranks count every token (torchtitan #2990)
        (48 * 96.0, 96, 48 * 96.0),
        (None, 96, 48 * 96.0),
        (48 * 96.0, 71, 48 * 96.0),  # a ledger that disagrees does not correct
    ],
)
def test_context_parallel_ranks_count_once(tmp_path: Path, seen: float | None, example: int, per_step: float) -> None:
    rows = losses(1, 4) + [row for step in (1, 200, 400) for row in ledger(step, done=step, batch=48, example=example)]
    write(tmp_path, rows + (tokens([1, 200, 400], seen) if seen else []))
    next_round = ledger(401, done=400, batch=48, example=example)
    decide(tmp_path, [{"step": 401} | {tag: value for tag, _, value in next_round}])
    assert read_run(tmp_path).tokens_per_step == per_step


def test_a_run_whose_tokens_are_unknown(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 9))
    run = read_run(tmp_path)
    assert run.tokens_per_step is None and len(run.along("tokens", TRAIN)[0]) == 0
    assert summarize(run)["tokens"] == "-"


# -- the decisions ----------------------------------------------------------------------------------------------------


def test_passes_between_log_steps_are_known(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 41) + [("teacher/overlap", 20, 0.25), ("teacher/overlap", 40, 0.75)])
    records = [
        {"step": 1, "pass": 0, "num_steps": 12},
        {"step": 13, "pass": 0, "num_steps": 9, "teacher/overlap": 0.25, "ledger/score_seconds": 3.5},
        {"step": 22, "pass": 1, "num_steps": 9, "teacher/overlap": 0.5},
        {"step": 31, "pass": 0, "num_steps": 9, "teacher/overlap": 0.75},
    ]
    decide(tmp_path, records, cut='{"step": 41, "pass": 0, "teacher/overl')
    run = read_run(tmp_path)
    assert as_dict(run.series("teacher/overlap")) == {13: 0.25, 20: 0.25, 22: 0.5, 31: 0.75, 40: 0.75}
    assert as_dict(run.series("ledger/score_seconds")) == {13: 3.5}
    assert "pass" not in run.decided and run.scalars["teacher/overlap"] == {20: 0.25, 40: 0.75}
    assert run.last_step == 40


def test_without_decisions_tensorboard_is_read(tmp_path: Path) -> None:
    write(tmp_path, [("teacher/overlap", 20, 0.25)])
    assert as_dict(read_run(tmp_path).series("teacher/overlap")) == {20: 0.25}
    decide(tmp_path, [], cut='{"step": 1')
    assert as_dict(read_run(tmp_path).series("teacher/overlap")) == {20: 0.25}


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"pass": 1}', '{"step": 2, "teacher/overlap": "much"}', "\0\0", '{"step": 1e999}']
)
def test_a_bad_decision_is_named_and_left_out(tmp_path: Path, line: str) -> None:
    write(tmp_path, losses(1, 3))
    decide(tmp_path, [{"step": 1, "teacher/overlap": 0.5}], cut=f'{line}\n{{"step": 2, "teacher/overlap": 0.25}}\n')
    run = read_run(tmp_path)
    (note,) = run.notes
    assert "rounds.jsonl, line 2 is not a decision of the teacher" in note and note.endswith("left out")
    assert as_dict(run.series("teacher/overlap")) == {1: 0.5, 2: 0.25}


# -- the saving -------------------------------------------------------------------------------------------------------

SAVING = ("reached at step", "reached after tokens", "reached after seconds", "between validations at")


def saving(folder: Path, *runs: Rows, per_step: float = 10.0) -> list[tuple[str, ...]]:
    """The four facts of each run; its first event is at step 1, second 0."""
    read = []
    for i, rows in enumerate(runs):
        write(folder / str(i), [(TRAIN, 1, 9.0), *tokens([1], per_step), *rows])
        read.append(read_run(folder / str(i)))
    return [tuple(summarize(run, read)[fact] for fact in SAVING) for run in read]


def test_the_saving_by_hand(tmp_path: Path) -> None:
    """The second run is at 3.0 halfway from step 150 to 250; a step takes ten seconds, from step 1 on."""
    first = validations({100: 5.0, 200: 4.0, 300: 3.0})
    facts = saving(tmp_path, first, validations({50: 6.0, 150: 4.0, 250: 2.0}), validations({400: 3.5, 500: 2.5}))
    assert facts == [
        ("300", "3,000", "2,990", "200 and 300"),
        ("200", "2,000", "1,990", "150 and 250"),  # three validations are too few to report a saving
        ("450", "4,500", "4,490", "400 and 500"),
    ]


def test_the_saving_over_a_resume(tmp_path: Path) -> None:
    """Steps 201 to 220 are trained twice and charged twice: 1490 s at step 150, 2190 s + 490 s at step 250."""
    write(tmp_path / "first", losses(1, 2) + validations({400: 3.0}))
    write(tmp_path / "other", losses(1, 221) + validations({150: 4.0}))
    write(tmp_path / "other", losses(201, 251) + validations({250: 2.0}), number=1, purge=201)
    runs = [read_run(tmp_path / name) for name in ("first", "other")]
    facts = summarize(runs[1], runs)
    assert (facts[SAVING[0]], facts[SAVING[2]]) == ("200", "2,085")
    assert facts[SAVING[1]] == "-"  # its tokens are unknown


def test_a_run_saves_nothing_against_itself(tmp_path: Path) -> None:
    """Even where it had reached its final loss long before: both are measured in the same way."""
    rows = validations({100: 5.0, 200: 3.0, 300: 4.0})
    first, same = saving(tmp_path, rows, rows)
    assert first[0] == same[0] == "150"


@pytest.mark.parametrize(
    ("other", "expected_facts"),
    [
        ({}, ("-", "-", "-", "-")),
        ({300: 3.5}, ("not reached", "-", "-", "-")),
        ({100: math.nan, 200: math.nan}, ("-", "-", "-", "-")),  # it diverged
        # Nothing to interpolate from: it may have been there before.
        ({200: 2.0}, ("at most 200", "at most 2,000")),
        ({100: 4.0, 150: math.nan, 200: 2.0}, ("at most 200",)),
        ({100: math.inf, 200: 2.0}, ("at most 200",)),
        ({100: math.nan, 150: 4.0, 250: 2.0}, ("200",)),
        ({100: 4.0, 200: 3.0, 300: 3.0}, ("200",)),  # not below, but reached
    ],
)
def test_few_validations(tmp_path: Path, other: dict[int, float], expected_facts: tuple[str, ...]) -> None:
    _, facts = saving(tmp_path, validations({399: 4.0, 400: 3.0}), validations(other))
    assert facts[: len(expected_facts)] == expected_facts


@pytest.mark.parametrize(
    ("first", "reason"),
    [({}, "-: it has no validation loss"), ({10: 3.0, 20: math.nan}, "-: it is nan"), ({20: math.inf}, "-: it is inf")],
)
def test_nothing_to_reach(tmp_path: Path, first: dict[int, float], reason: str) -> None:
    for name, rows in (("a", validations(first)), ("b", validations({10: 2.0}))):
        write(tmp_path / name, losses(1, 3) + rows)
    runs = [read_run(tmp_path / name) for name in "ab"]
    for facts in (summarize(run, runs) for run in runs):
        assert facts["first run's final validation loss"] == reason
        assert [facts[fact] for fact in SAVING] == ["-"] * 4
    if math.isnan(first.get(20, 0.0)):
        draw(runs, tmp_path / "both.png")


def test_one_run_has_no_saving(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 3) + validations({2: 3.0}))
    run = read_run(tmp_path)
    assert not {*SAVING, "first run's final validation loss"} & summarize(run, [run]).keys()


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
            ("ledger/unheard_of", 7, 5.0),
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
    assert facts["teacher/overlap"] == "12.35% at step 6"
    assert facts["teacher/quarantined"] == "2"
    assert facts["ledger/unheard_of"] == "5"  # a tag that the report does not know
    assert facts["ledger/tokens_covered_per_second"] == "-"
    assert facts["checkpoint"] == "checkpoint/step-10"
    assert facts["trace"] == "teacher/trace.jsonl"


def test_what_was_not_logged_is_a_dash(tmp_path: Path) -> None:
    write(tmp_path, losses(1, 3) + speeds(1, [9.0]))
    facts = summarize(read_run(tmp_path))
    present = {"run", "steps", "train loss", "wall time", "tensorboard"}
    assert {fact for fact, value in facts.items() if value != "-"} == present
    # The tags that DESIGN.md promises for a teaching run, and the teacher's own cost.
    assert {"teacher/ratio", "teacher/max_weight", "ledger/select_seconds", "ledger/overhead_percent"} <= facts.keys()


def test_two_runs_stand_side_by_side() -> None:
    text = table([{"run": "a", "steps": "1,000"}, {"run": "long/name", "steps": "2", "teacher/new": "0.5"}])
    assert text.split("\n") == [
        "run          a      long/name",
        "steps        1,000  2",
        "teacher/new  -      0.5",
    ]


def test_a_fact_of_one_run_keeps_its_place() -> None:
    text = table([{"run": "a", "z": "1", "end": "2"}, {"run": "b", "x": "3", "z": "4", "y": "5", "end": "6"}])
    assert [line.split() for line in text.split("\n")] == [
        ["run", "a", "b"], ["x", "-", "3"], ["z", "1", "4"], ["y", "-", "5"], ["end", "2", "6"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "value", "text"),
    [
        ("ledger/save_seconds", 0.0, "0 s"),
        ("ledger/save_seconds", 2e-5, "under 1 ms"),
        ("ledger/save_seconds", 12345.6, "12,346 s"),
        ("ledger/overhead_percent", 0.12345, "0.123%"),
        ("ledger/break_even_share", 0.0625, "6.25%"),
        ("teacher/never_selected", 1.0, "100.00%"),
        ("teacher/loss_age", 12.5, "12.5 steps"),
        ("teacher/nonfinite", 3.0, "3"),
        ("ledger/examples_skipped", 1234567.0, "1,234,567"),
        ("teacher/importance_mean", -1.23456, "-1.235"),
    ],
)
def test_units(tag: str, value: float, text: str) -> None:
    assert with_unit(tag, value, unit=Teaching.tag_units.get(tag, "")) == text


def test_seconds_come_with_their_share_of_the_wall_time(tmp_path: Path) -> None:
    write(tmp_path, [("ledger/save_seconds", 5, 30.0), ("ledger/wall_seconds", 5, 120.0)])
    facts = summarize(read_run(tmp_path))
    assert (facts["ledger/save_seconds"], facts["ledger/wall_seconds"]) == ("30 s (25.0%)", "120 s")


def inclusion(step: int, shares: Sequence[float]) -> dict[str, float]:
    return {"step": step} | {f"teacher/inclusion/s/{i:02}": share for i, share in enumerate(shares)}


def test_many_sources_show_their_ends(tmp_path: Path) -> None:
    """Means over the selections, of which there are two, however often they were logged."""
    shares = [i / 100 for i in range(11)]
    logged = [(tag, step, x) for step in (5, 6, 7) for tag, x in inclusion(0, shares).items() if tag != "step"]
    write(tmp_path, losses(1, 8) + logged)
    decide(tmp_path, [inclusion(1, shares), {"step": 3}, inclusion(5, [share + 0.5 for share in shares])])
    facts = {fact: value for fact, value in summarize(read_run(tmp_path)).items() if "inclusion" in fact}
    means = {i: f"{i + 25:.2f}%" for i in range(11)}
    assert list(facts.items()) == [
        *((f"teacher/inclusion/s/{i:02}", means[i]) for i in (10, 9, 8, 7, 3, 2, 1, 0)),
        ("teacher/inclusion/* (3 others)", means[5]),
    ]


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, for inspection."""
    saved: list[Figure] = []
    save = Figure.savefig

    def save_and_keep(self: Figure, *args: Any, **kw: Any) -> None:
        saved.append(self)
        save(self, *args, **kw)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return saved


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved; rendering takes a second each."""
    kept: list[Figure] = []

    def keep(self: Figure, path: Path, **kw: Any) -> None:
        kept.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def points(line: Line2D) -> list[list[float]]:
    return np.column_stack(line.get_data()).tolist()


def teaching(stop: int) -> list[tuple[str, int, float]]:
    tags = ("ratio", "round", "importance_mean", "importance_p99", "effective_sample_size", "never_selected", "overlap")
    shares = ["ledger/overhead_percent", "ledger/skipped_share", "ledger/break_even_share"]
    names = [f"teacher/{tag}" for tag in tags] + [*shares, SPEED, "n_tokens_seen"]
    return [(name, step, 0.5 + i / 100 * step) for i, name in enumerate(names) for step in range(1, stop)]


def test_every_series_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    validation = [(VALIDATION, step, 4.0 / step) for step in range(10, 100, 10)]
    write(tmp_path, losses(1, 100) + validation + teaching(60))
    write(tmp_path, losses(80, 120), number=1, purge=80)
    assert main([str(tmp_path)]) == 0
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 1200
    assert len(np.unique(picture[::5, ::5].reshape(-1, picture.shape[-1]), axis=0)) > 50
    assert {path.name for path in tmp_path.iterdir()} == {"tb", "curves.png"}
    (figure,) = figures
    assert figure.get_suptitle() == str(tmp_path)
    drawn = [points(line) for axes in figure.axes for line in axes.lines]
    run = read_run(tmp_path)
    for tag in {tag for tag, _, _ in teaching(2)} - {"n_tokens_seen"} | {TRAIN, VALIDATION}:
        assert np.column_stack(run.series(tag)).tolist() in drawn, tag
    assert not [text for axes in figure.axes for text in axes.texts]
    low, high = figure.axes[0].get_ylim()
    assert low < 8 / 119 and 8 / 6 < high < 8  # the first steps do not flatten the curve
    assert [[80.0, 0.0], [80.0, 1.0]] in drawn  # the resume


def test_two_runs_overlaid(tmp_path: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "one" / "out", tmp_path / "two" / "out"]
    for i, run in enumerate(runs):
        write(run, losses(1, 100, shift=i) + teaching(100) + validations({50: 3.0, 90: 2.0 + i}))
    assert main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert all(str(run) in out.split("\n")[0] for run in runs)
    assert f"picture: {runs[0] / 'curves.png'}" in out and not (runs[1] / "curves.png").exists()
    assert imread(runs[0] / "curves.png").std() > 0.05
    (figure,) = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    for axes in figure.axes:
        colors = {line.get_color() for line in axes.lines if points(line)}
        assert colors - {"0.35"} == {"C0", "C1"}  # and the end of the first run


def test_panels_without_data_are_marked(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, [(TRAIN, 1, math.nan), (TRAIN, 2, 3.0), (TRAIN, 3, math.inf)])
    draw([read_run(tmp_path)], tmp_path / "other.png")
    (figure,) = figures
    assert len(figure.axes) == 3  # panels of teaching are left out
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [[], ["not logged"], []]  # tokens
    assert imread(tmp_path / "other.png").ndim == 3


def test_the_smoothed_loss_is_a_mean_of_the_logged_one(tmp_path: Path, unsaved: list[Figure]) -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 400)
    write(tmp_path, [(TRAIN, i + 1, value) for i, value in enumerate(values)])
    draw([read_run(tmp_path)], tmp_path / "curves.png")
    raw, smooth = (np.asarray(line.get_ydata()) for line in unsaved[0].axes[0].lines[:2])
    np.testing.assert_allclose(raw, values, rtol=1e-6)
    np.testing.assert_allclose(smooth[100], values[92:109].mean(), rtol=1e-6)  # 400 / 50 to either side
    np.testing.assert_allclose(smooth[[0, -1]], [values[0], values[-9:].mean()], rtol=1e-6)


def test_losses_against_steps_tokens_and_seconds(tmp_path: Path, unsaved: list[Figure]) -> None:
    """With a pause of an hour before step 3, and the stars of the saving."""
    rows = losses(1, 3) + tokens([1], 64.0) + validations({2: 4.0})
    for name, loss in (("a", 3.0), ("b", 2.0)):
        write(tmp_path / name, rows)
        write(tmp_path / name, losses(3, 5) + validations({4: loss}), number=1)
    draw([read_run(tmp_path / name) for name in "ab"], tmp_path / "both.png")
    steps = {1: (1, 64, 0), 2: (2, 128, 10), 3: (3, 192, 10), 4: (4, 256, 20)}
    (figure,) = unsaved
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "tokens trained", "seconds"] * 2
    for i in range(3):
        validation, training = ([points(line) for line in figure.axes[j].lines] for j in (i, 3 + i))
        assert [[float(steps[2][i]), 4.0], [float(steps[4][i]), 2.0]] in validation
        assert [[0.0, 3.0], [1.0, 3.0]] in validation  # the end of the first run, all across
        assert [[float(steps[4][i]), 3.0]] in validation and [[steps[2][i] / 2 + steps[4][i] / 2, 3.0]] in validation
        assert [[float(x[i]), 8.0 / step] for step, x in steps.items()] in [
            [[x, pytest.approx(y)] for x, y in line] for line in training
        ]
        assert [[float(steps[3][i]), 0.0], [float(steps[3][i]), 1.0]] in training  # the resume
        legend = [text.get_text() for text in figure.axes[i].get_legend().get_texts()]
        assert legend == ["end of the first run", "reached"]  # two validations are too few to report a saving


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


def test_where_the_time_went(tmp_path: Path, unsaved: list[Figure]) -> None:
    spent = {"train": 60.0, "save": 5.0, "select": 1.0, "new": 4.0, "wall": 100.0}
    for name in ("a", "b"):
        write(tmp_path / name, losses(1, 3) + [(f"ledger/{tag}_seconds", 2, x) for tag, x in spent.items()])
    draw([read_run(tmp_path / name) for name in "ab"], tmp_path / "both.png")
    (axes,) = (axes for axes in unsaved[0].axes if axes.get_title() == "where the time went")
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    row = [(0.0, 60.0), (60.0, 5.0), (65.0, 1.0), (66.0, 4.0), (70.0, 30.0)]
    assert bars == [(pytest.approx(float(i)), *bar) for i in (0, 1) for bar in row]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["train", "save", "select", "new", "unaccounted"]
    assert [text.get_text() for text in axes.texts] == ["a: 100 s", "b: 100 s"]


@pytest.mark.parametrize(("struck", "drawn"), [(0.0, False), (1.0, True)])
def test_guards_are_drawn_if_one_struck(tmp_path: Path, unsaved: list[Figure], struck: float, drawn: bool) -> None:
    write(tmp_path, losses(1, 3) + [("teacher/quarantined", 2, 0.0), ("teacher/nonfinite", 2, struck)])
    draw([read_run(tmp_path)], tmp_path / "one.png")
    assert ("guards" in [axes.get_title() for axes in unsaved[0].axes]) == drawn


def test_sources_are_lines_of_one_run_and_bars_of_several(tmp_path: Path, unsaved: list[Figure]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, losses(1, 12))
        decide(tmp_path / name, [inclusion(1, [i / 20 for i in range(10)]), inclusion(6, [0.5] * 10)])
    runs = [read_run(tmp_path / name) for name in "ab"]
    draw(runs[:1], tmp_path / "a.png")
    draw(runs, tmp_path / "both.png")
    one, both = (next(axes for axes in figure.axes if "source" in axes.get_title()) for figure in unsaved)
    lines = [points(line) for line in one.lines]
    assert lines[0] == [[1.0, 0.45], [6.0, 0.5]] and lines[7] == [[1.0, 0.0], [6.0, 0.5]]  # the ends
    assert lines[8:] == [[[1.0, pytest.approx(0.225)], [6.0, 0.5]]]  # the mean of the two others, s/04 and s/05
    heights = [bar.get_height() for bar in both.patches]
    assert heights[:9] == heights[9:] == pytest.approx([i / 40 + 0.25 for i in (9, 8, 7, 6, 3, 2, 1, 0, 4.5)])


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_failure(tmp_path: Path) -> None:
    """As with ``| head``: the pipe is closed before the table comes."""
    write(tmp_path, losses(1, 9))
    command = [sys.executable, "-m", "titan_attent.report", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, "")
    assert imread(tmp_path / "curves.png").ndim == 3


def test_a_full_disk_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, losses(1, 5))

    def fail(self: Figure, path: Path, **kw: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == f"titan_attent.report: {tmp_path / 'curves.png'} cannot be written: No space left on device\n"
    assert out.startswith("run") and "picture" not in out


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "arguments", "message"),
    [
        ("nothing", ["missing"], "missing is not a folder: name the job.dump_folder of a run"),
        ("folder", ["run"], "holds no TensorBoard scalars: set metrics.enable_tensorboard = true"),
        ("empty file", ["run"], "holds no TensorBoard scalars: set metrics.enable_tensorboard = true"),
        ("run", ["run", "--output", "curves.pdf"], "curves.pdf cannot be written: name a .png file"),
        ("run", ["run", "--output", "nowhere/curves.png"], "curves.png cannot be written: name a .png file"),
        ("run", ["run", "--output", "folder.png"], "folder.png cannot be written: name a .png file"),
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
    Path("folder.png").mkdir()
    if setup == "folder":
        Path("run").mkdir()
    elif setup != "nothing":
        write(Path("run"), [] if setup == "empty file" else losses(1, 3))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("titan_attent.report: ") and message in err and err.count("\n") == 1
