"""Settings that differ, seeds of one setting with their intervals, and what is not subtracted; the page."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from titan_attent.data.run_record import FILE
from titan_attent.report import TRAIN, VALIDATION, main, read_run
from titan_attent.report.groups import difference, mean_of, t_quantile
from titan_attent.report.sentence import conclusion, ends
from titan_attent.report.settings import groups_of


def write(run: Path, shift: float = 0.0, *, seed: int = 0, strategy: str = "uniform", **more: Any) -> Path:
    """A run of 40 steps whose loss is 2 + shift at the end and 1.9 + shift at best. ``more``: of the record."""
    with SummaryWriter(str(run / "tb" / "20260101-1200")) as writer:
        for step in range(2, 41, 2):
            value = 2.0 + shift + (1.0 - step / 40) - 0.1 * (step == 38)
            writer.add_scalar(TRAIN, value, step, walltime=10.0 * step)
            writer.add_scalar(VALIDATION, value, step, walltime=10.0 * step)
    record = {"batch_size": 4, "tokens_per_example": 8, "measured": {"validation data": "x", "tokenizer": "t"}}
    configured = {
        "teacher.strategy": strategy,
        "job.dump_folder": str(run),
        "debug.seed": seed,
        "teacher.scores": str(run),
    }
    configured = {key: value for key, value in configured.items() if value != "uniform"}
    record |= {"setting": {"debug.seed": seed, "data": "d"}, "configured": configured, **more}
    (run / "teacher").mkdir()
    (run / "teacher" / FILE).write_text(json.dumps(record))
    return run


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [*range(1, 41), 100, 1000])
def test_the_quantiles_are_those_of_scipy(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (5, 9), (12, 3)])
def test_the_intervals_are_those_of_scipy(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(sizes))
    a, b = (rng.normal(size=size) * (1 + size) for size in sizes)
    low, high = stats.t.interval(0.95, len(a) - 1, np.mean(a), stats.sem(a))
    assert mean_of(a.tolist()) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    mean, half = difference(a.tolist(), b.tolist(), paired=False)
    # Welch's degrees of freedom are rounded down, so that the interval is no narrower.
    assert mean == pytest.approx((found.low + found.high) / 2)
    assert (found.high - found.low) / 2 - 1e-3 <= half <= 2 * (found.high - found.low)
    if len(a) == len(b):
        paired = stats.ttest_rel(a, b).confidence_interval()
        assert difference(a.tolist(), b.tolist(), paired=True)[1] == pytest.approx(
            (paired.high - paired.low) / 2, rel=1e-3
        )
    assert math.isnan(mean_of([1.0]).half)


# -- groups and settings ----------------------------------------------------------------------------------------------


def facts_of(out: str, name: str) -> list[str]:
    """The cells of a row of a printed table."""
    (line,) = [line for line in out.splitlines() if re.match(rf"{re.escape(name)}  ", line)]
    return re.split(r"  +", line)[1:]


def test_seeds_of_a_setting_have_a_mean_and_an_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shifts, saved = [0.0, 0.3, -0.2], [-0.5, -0.4, -0.6]
    runs = [write(tmp_path / "uniform" / f"seed-{i}", shift, seed=i) for i, shift in enumerate(shifts)]
    # In another order: the differences are taken seed by seed.
    for i in (2, 0, 1):
        runs.append(write(tmp_path / "soft" / f"seed-{i}", shifts[i] + saved[i], seed=i, strategy="soft"))
    assert main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert facts_of(out, "setting") == [f"{tmp_path}/uniform/seed-*", f"{tmp_path}/soft/seed-*"]
    assert facts_of(out, "runs") == ["3", "3"]
    half = stats.t.ppf(0.975, 2) * stats.sem(saved)
    expected = ["-", f"{np.mean(saved):.4f} ± {half:.4f}"]
    assert facts_of(out, "final validation loss, difference") == expected
    assert facts_of(out, "best validation loss, difference") == expected
    assert facts_of(out, "teacher.strategy") == ["default"] * 3 + ["soft"] * 3
    assert facts_of(out, "debug.seed") == ["0", "1", "2", "2", "0", "1"]
    assert "job.dump_folder" not in out
    sentence = out.strip().splitlines()[-2]
    assert f"soft/seed-* (3 runs) against {tmp_path}/uniform/seed-*; validation loss at the end " in sentence
    assert f"({expected[1]}), at best " in sentence and "% of its tokens" in sentence
    assert out.strip().splitlines()[-1].startswith("picture: ")


def test_what_is_one_setting(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", seed=0),
        write(tmp_path / "b", seed=1),
        write(tmp_path / "c", seed=1),  # the same seed: no second sample
        write(tmp_path / "d", seed=2, strategy="hard"),
        write(tmp_path / "e", seed=3, setting={"data": "other", "debug.seed": 3}),
        write(tmp_path / "f", seed=4, configured=None),  # of an earlier version
        write(tmp_path / "g", seed=5, configured=None),
    ]
    groups = groups_of([read_run(run) for run in runs])
    assert [[run.path.name for run in group] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]


# -- what is not subtracted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"validation data": "y"}, "their validation data differ"),
        ({"validation data": "y", "tokenizer": "u"}, "tokenizer is u for"),
        ({"validation.seq_len": 64}, "validation.seq_len is 64 for"),
        ({"data.validation_unit": "document"}, "data.validation_unit is document for"),
    ],
)
def test_other_validations_are_said_and_not_subtracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: dict[str, Any], words: str
) -> None:
    base = {"validation data": "x", "tokenizer": "t", "validation.seq_len": 32, "data.validation_unit": "window"}
    runs = [write(tmp_path / f"a{i}", seed=i, measured=base) for i in range(2)]
    runs.append(write(tmp_path / "b", -0.5, strategy="soft", measured=base | measured))
    first, other = read_run(runs[0]), read_run(runs[2])
    (sentence,) = ends(first, other)
    assert sentence.endswith(f"b ended at a validation loss of 1.5000, {runs[0]} at 2.0000: not comparable")
    assert words in conclusion(first, other) and "saved" not in conclusion(first, other)
    assert main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert facts_of(out, "final validation loss, difference") == ["-", "not comparable"]


def test_the_best_is_compared_beside_the_end(tmp_path: Path) -> None:
    first, other = read_run(write(tmp_path / "a")), read_run(write(tmp_path / "b", -0.5))
    (sentence,) = ends(first, other)
    assert sentence.startswith(
        f"{tmp_path}/b ended at a validation loss of 1.5000, 0.5000 below {tmp_path}/a (2.0000); "
    )
    assert sentence.endswith(f"its best is 1.4500, 0.5000 below the best of {tmp_path}/a (1.9500)")
    (sentence,) = ends(other, first)
    assert "2.0000, 0.5000 above" in sentence


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a"), write(tmp_path / "b<i>", -0.5, strategy="soft")]
    bad = tmp_path / "bad"
    (bad / "tb").mkdir(parents=True)
    page = tmp_path / "page.html"
    assert main([str(runs[0]), str(bad), str(runs[1]), "--html", str(page)]) == 0
    printed, text = capsys.readouterr(), page.read_text()
    assert printed.out.strip().splitlines()[-1] == f"written: {runs[0] / 'curves.png'}, {page}"
    assert len([line for line in printed.err.splitlines() if "bad" in line]) == 1, "a bad run is one line"
    assert text.count('<img alt="curves.png" src="data:image/png;base64,iVBOR') == 1
    assert "<td>soft</td>" in text and "b&lt;i&gt;" in text and "<i>" not in text and "below" in text and "bad" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "it needs no other file"


@pytest.mark.parametrize("name", ["page.txt", "missing/page.html"])
def test_a_page_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = write(tmp_path / "a")
    assert main([str(run), "--html", str(tmp_path / name)]) == 2
    assert "name a .html file in a writable folder" in capsys.readouterr().err
    assert not (run / "curves.png").exists()
