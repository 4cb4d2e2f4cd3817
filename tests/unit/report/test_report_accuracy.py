"""The report on runs on images: accuracies, and images per second."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_report import losses, points, speeds, tokens, validations, write

from titan_attent.report import SPEED, TRAIN, VALIDATION, draw, read_run, summarize
from titan_attent.report.runs import ACCURACY, IMAGE_SPEED, TOP5, RunScalars
from titan_attent.report.saving import TOP1, reach
from titan_attent.report.sentence import ends
from titan_attent.report.summary import conclusion
from titan_attent.report.teaching import panels_of

ROWS = ("validation accuracy", "best validation accuracy", "top-5 accuracy", "images/s/device")
REACHED = ("reached at step", "reached after tokens", "reached after seconds", "between validations at")


def accuracies(shares: dict[int, float], tag: str = ACCURACY) -> list[tuple[str, int, float]]:
    return [(tag, step, share) for step, share in shares.items()]


def image_speeds(start: int, values: Sequence[float]) -> list[tuple[str, int, float]]:
    return [(IMAGE_SPEED, start + i, value) for i, value in enumerate(values)]


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved."""
    kept: list[Figure] = []

    def keep(self: Figure, path: Path, **kw: Any) -> None:
        kept.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_run_of_images(tmp_path: Path) -> None:
    first, second = [1.0, 50.0, 53.0, 57.0], [2.0, 61.0, 70.0]
    shares = {1: math.nan, 2: 0.5, 3: math.nan}
    write(tmp_path, losses(1, 5) + image_speeds(1, first) + speeds(1, [640.0]) + accuracies(shares))
    later = accuracies({5: 0.75, 6: 0.75, 7: 0.625}) + accuracies({5: 0.9, 6: 0.90625}, TOP5)
    write(tmp_path, losses(5, 8) + image_speeds(5, second) + later, number=1, purge=5)
    facts = summarize(read_run(tmp_path))
    assert (
        [facts[row] for row in ROWS]
        == [
            "62.50%",
            "75.00% at step 5",  # of equals the first
            "90.62% at step 6",
            f"{statistics.median(first[1:] + second[1:]):.0f}",
        ]
    )
    assert not [fact for fact in facts if fact.startswith(("first run's", "accuracy"))]


def test_best_is_the_smallest_loss_and_the_largest_accuracy(tmp_path: Path) -> None:
    write(tmp_path, validations({1: 3.0, 2: 2.0, 3: 2.0, 4: 4.0}) + accuracies({1: 0.5, 2: 0.25, 3: 0.5, 4: 0.125}))
    facts = summarize(read_run(tmp_path))
    assert facts["best validation loss"] == "2.0000 at step 2"
    assert facts["best validation accuracy"] == "50.00% at step 1"


def test_text_and_masked_images_have_no_accuracy(tmp_path: Path) -> None:
    for name, rows in (("text", speeds(1, [1.0, 2.0])), ("mae", image_speeds(1, [1.0, 2.0]))):
        write(tmp_path / name, losses(1, 3) + validations({2: 3.0}) + rows)
    runs = [read_run(tmp_path / name) for name in ("text", "mae")]
    assert [{*ROWS} & summarize(run, runs).keys() for run in runs] == [set(), {"images/s/device"}]
    assert not [fact for run in runs for fact in summarize(run, runs) if "accuracy" in fact]
    assert "accuracy" not in conclusion(*runs)


def test_inputs_with_several_seeds_have_a_vote_and_worst_cases(tmp_path: Path, unsaved: list[Figure]) -> None:
    shares = {"exact_match": 0.5, "token_accuracy": 0.75, "exact_match_vote": 0.625}
    worst = {"input_match_p95": 0.25, "input_match_worst": 0.0, "input_loss_p95": 1.5, "input_loss_worst": 2.25}
    logged = [
        (f"validation_metrics/{name}", step, value) for step in (2, 4) for name, value in (shares | worst).items()
    ]
    write(tmp_path, losses(1, 5) + validations({2: 3.0, 4: 2.0}) + logged)
    run = read_run(tmp_path)
    facts = summarize(run)
    assert facts["exact match of the vote"] == "62.50%" and facts["right seeds of an input, worst 5%"] == "25.00%"
    assert facts["right seeds of an input, worst"] == "0.00%"
    assert facts["loss of an input, 95th percentile"] == "1.5000" and facts["loss of an input, worst"] == "2.2500"
    draw([run], tmp_path / "picture.png")
    (figure,) = unsaved
    legends = [text.get_text() for axes in figure.axes if (box := axes.get_legend()) for text in box.get_texts()]
    assert "of the seeds' vote" in legends


# -- the saving -------------------------------------------------------------------------------------------------------


def image_runs(folder: Path, *shares: dict[int, float]) -> list[RunScalars]:
    """Runs with 10 tokens per step, whose first event is at step 1, second 0."""
    read = []
    for i, own in enumerate(shares):
        write(folder / str(i), [(TRAIN, 1, 9.0), *tokens([1], 10.0), *accuracies(own)])
        read.append(read_run(folder / str(i)))
    return read


def test_the_saving_in_accuracy_by_hand(tmp_path: Path) -> None:
    """The second run is at 0.75 halfway from step 150 to 250; a step takes ten seconds, from step 1 on."""
    first = {100: 0.25, 200: 0.5, 300: 0.75}
    runs = image_runs(tmp_path, first, {50: 0.25, 150: 0.625, 250: 0.875}, {400: 0.5, 500: 0.625}, {150: 0.75}, {})
    facts = [[summarize(run, runs)[f"accuracy {fact}"] for fact in REACHED] for run in runs]
    assert facts == [
        ["300", "3,000", "2,990", "200 and 300"],
        ["200", "2,000", "1,990", "150 and 250"],
        ["not reached", "-", "-", "-"],
        [
            "at most 150",
            "at most 1,500",
            "at most 1,490",
            "at or before 150",
        ],
        ["-", "-", "-", "-"],
    ]
    assert {summarize(run, runs)["first run's final validation accuracy"] for run in runs} == {"75.00%"}
    assert {summarize(run, runs)["reached at step"] for run in runs} == {"-"}  # of the loss, which none has


@pytest.mark.parametrize("seed", range(20))
def test_an_accuracy_is_reached_where_the_share_of_errors_is(tmp_path: Path, seed: int) -> None:
    """The rising measure against the falling one, on random walks with gaps."""
    rng = np.random.default_rng(seed)
    shares = np.clip(np.cumsum(rng.integers(-8, 16, 12)) / 64, 0, 1)
    shares[rng.random(12) < 0.2] = math.nan
    steps = np.cumsum(rng.integers(1, 9, 12)).tolist()
    write(tmp_path, tokens([1], 10.0) + accuracies(dict(zip(steps, shares.tolist(), strict=True))))
    write(tmp_path / "falling", tokens([1], 10.0) + validations(dict(zip(steps, (1 - shares).tolist(), strict=True))))
    run, falling = read_run(tmp_path), read_run(tmp_path / "falling")
    for target in (0.0, 0.125, 0.5, 0.515625, 1.0, math.nan, None):
        assert reach(run, target, TOP1) == reach(falling, None if target is None else 1 - target)


@pytest.mark.parametrize(("first", "reason"), [({}, "it has no validation accuracy"), ({3: math.nan}, "it is nan")])
def test_no_accuracy_to_reach(tmp_path: Path, first: dict[int, float], reason: str) -> None:
    runs = image_runs(tmp_path, first, {10: 0.5})
    for run in runs:
        facts = summarize(run, runs)
        assert facts["first run's final validation accuracy"] == f"-: {reason}"
        assert [facts[f"accuracy {fact}"] for fact in REACHED] == ["-"] * 4
    expected = (
        "has no final validation accuracy to compare with; " if not first else "diverged: its last validation accuracy"
    )
    assert expected in conclusion(*runs)


def test_the_conclusion_speaks_of_accuracy_and_loss(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, losses(1, 2) + validations({20: 4.0, 40: 3.0}) + accuracies({20: 0.5, 40: 0.75}))
    prepaid = [("ledger/prepaid_seconds", 1, 7.0)]
    write(b, losses(1, 2) + validations({20: 3.5, 40: 3.25}) + accuracies({20: 0.75, 40: 1.0}) + prepaid)
    write(tmp_path / "c", losses(1, 2) + validations({40: 3.5}) + accuracies({40: 0.5}) + prepaid)
    first, second, third = (read_run(tmp_path / name) for name in "abc")
    assert ends(first, second)[1] == (
        f"{b} ended at a validation accuracy of 100.00%, 25.00% above {a} (75.00%); its best is 100.00%, 25.00% above "
        f"the best of {a} (75.00%)"
    )
    assert conclusion(first, second) == (
        f"{b} reached the final validation accuracy of {a}, 75.00%, after 20 steps instead of 40; "
        f"no saving is reported: {a} has 2 validations, too few to estimate their noise; "
        f"{b} did not reach the final validation loss of {a}, 3.0000"
    )
    assert conclusion(second, first) == (
        f"{a} did not reach the final validation accuracy of {b}, 100.00%; "
        f"{a} reached the final validation loss of {b}, 3.2500, after 35 steps instead of 40; "
        f"no saving is reported: {b} has 2 validations, too few to estimate their noise"
    )
    assert conclusion(first, third).endswith(f"did not reach the final validation loss of {a}, 3.0000")


# -- the picture ------------------------------------------------------------------------------------------------------


def test_accuracies_of_several_runs(tmp_path: Path, unsaved: list[Figure]) -> None:
    """Steps of 64 tokens and ten seconds from step 1 on; the second run is at 0.75 halfway from step 2 to 4."""
    for name, share in (("a", 0.75), ("b", 1.0)):
        rows = accuracies({2: 0.5, 4: share}) + validations({2: 4.0, 4: 3.0}) + image_speeds(1, [1.0, 2.0])
        write(tmp_path / name, losses(1, 5) + tokens([1], 64.0) + rows)
    draw([read_run(tmp_path / name) for name in "ab"], tmp_path / "both.png")
    (figure,) = unsaved
    titles = [axes.get_title() for axes in figure.axes]
    names = ["validation loss, nats per image", "validation accuracy", "training loss, nats per image, smoothed"]
    assert titles[:9] == [name for name in names for _ in range(3)]
    assert [axes.get_xlabel() for axes in figure.axes[3:6]] == ["step", "tokens trained (patches)", "seconds"]
    for axes, (x2, x4) in zip(figure.axes[3:6], [(2.0, 4.0), (128.0, 256.0), (10.0, 30.0)], strict=True):
        drawn = [points(line) for line in axes.lines]
        assert [[x2, 0.5], [x4, 0.75]] in drawn and [[x2, 0.5], [x4, 1.0]] in drawn
        assert [[0.0, 0.75], [1.0, 0.75]] in drawn  # the end of the first run, all across
        assert [[x4, 0.75]] in drawn and [[(x2 + x4) / 2, 0.75]] in drawn  # the stars
        assert axes.yaxis.get_major_formatter()(0.75) == "75%"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["end of the first run", "reached"]
    low, high = figure.axes[3].get_ylim()
    assert low < 0.5 and 1.0 < high < 1.2


def test_both_accuracies_of_one_run_share_a_row(tmp_path: Path, unsaved: list[Figure]) -> None:
    shares, top5 = {2: 0.5, 4: 0.75}, {2: 0.75, 4: 0.875}
    write(tmp_path, losses(1, 5) + accuracies(shares) + accuracies(top5, TOP5))
    draw([read_run(tmp_path)], tmp_path / "one.png")
    axes = unsaved[0].axes
    assert [a.get_title() for a in axes[:6]] == ["loss, nats per image"] * 3 + ["validation accuracy"] * 3
    lines = {line.get_color(): points(line) for line in axes[3].lines}
    assert lines == {"C1": [[2.0, 0.5], [4.0, 0.75]], "C2": [[2.0, 0.75], [4.0, 0.875]]}
    entries = {line.get_color(): line.get_label() for line in axes[3].get_legend().get_lines()}
    assert entries == {"C1": "top-1", "C2": "top-5"}
    assert [text.get_text() for text in axes[4].texts] == ["not logged"]  # tokens are not


@pytest.mark.parametrize(
    ("kinds", "title"),
    [
        ("text", "loss, nats per token"),
        ("vit", "loss, nats per image"),
        ("mae", "loss, mean squared error"),
        ("not validated", "loss"),
        ("text text", "validation loss, nats per token"),
        ("text vit", "validation loss"),
        ("vit not validated", "validation loss, nats per image"),
    ],
)
def test_the_unit_of_the_loss(tmp_path: Path, unsaved: list[Figure], kinds: str, title: str) -> None:
    rows = {
        "text": validations({2: 3.0}),
        "vit": validations({2: 3.0}) + accuracies({2: 0.5}) + image_speeds(1, [1.0, 2.0]),
        "mae": validations({2: 3.0}) + image_speeds(1, [1.0, 2.0]),
        "not": image_speeds(1, [1.0]),
    }
    names = [name for name in kinds.split() if name != "validated"]
    for i, name in enumerate(names):
        write(tmp_path / str(i), losses(1, 3) + rows[name])
    draw([read_run(tmp_path / str(i)) for i in range(len(names))], tmp_path / "curves.png")
    assert unsaved[0].axes[0].get_title() == title


def test_images_per_second_replace_tokens_per_second(tmp_path: Path, unsaved: list[Figure]) -> None:
    both = speeds(1, [9.0, 640.0, 641.0]) + image_speeds(1, [9.0, 10.0, 11.0])
    write(tmp_path / "images", losses(1, 4) + both)
    write(tmp_path / "text", losses(1, 4) + speeds(1, [9.0, 500.0]))
    images, text = read_run(tmp_path / "images"), read_run(tmp_path / "text")
    shown = [[tag for panel in panels_of(runs) for tag in panel.tags] for runs in ([images], [text], [images, text])]
    assert shown == [[IMAGE_SPEED], [SPEED], [SPEED]]
    draw([images], tmp_path / "curves.png")
    axes = unsaved[0].axes[-1]
    assert axes.get_title() == "images/s/device, smoothed"
    assert [points(line) for line in axes.lines] == [[[2.0, 10.0], [3.0, 11.0]]] * 2
    assert VALIDATION not in images.scalars  # without a validation there is a picture, too
