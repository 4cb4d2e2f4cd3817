"""The savings that the report prints, on synthetic curves whose true saving is known."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titan_attent.data.run_record import RunRecord
from titan_attent.report import TRAIN, VALIDATION
from titan_attent.report import curves as curves_module
from titan_attent.report.comparing import Comparison, compare
from titan_attent.report.costs import Costs
from titan_attent.report.runs import ACCURACY, SPEED, RunScalars
from titan_attent.report.saving import LOSS, TOP1, final, reach
from titan_attent.report.summary import conclusion, summarize
from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.system import System

Curve = Callable[[float], float]


def curve(tokens: float) -> float:
    return 2.0 + 3.0 * math.exp(-tokens / 400_000)


def made(
    name: str, loss: Curve = curve, *, steps: int = 1000, tokens: float = 1000.0, every: int = 50, **more: Any
) -> RunScalars:
    """A run with ``loss`` of the tokens trained. ``more``: tag -> function of the step, or record, hosts, seconds."""
    record, hosts, pace = more.pop("record", RunRecord()), more.pop("hosts", {"h"}), more.pop("seconds", 1.0)
    at = [*range(every, steps + 1, every)]
    scalars = {VALIDATION: {s: loss(s * tokens) for s in at}, "n_tokens_seen": {1: tokens}}
    scalars[TRAIN] = {s: loss(s * tokens) for s in at}
    scalars |= {tag: {s: function(s) for s in at} for tag, function in more.items()}
    seconds = {tag: {s: pace * s for s in values} for tag, values in scalars.items()}
    return RunScalars(
        Path(name), scalars, seconds, record=record, hosts=hosts, session_starts=[1], wall_seconds=pace * steps
    )


def saved(comparison: Comparison, charge: Any = "tokens") -> float | None:
    saving = comparison.saving(charge)
    return None if saving is None else saving.percent


def test_equal_curves_of_another_batch_size_save_nothing() -> None:
    a, b = made("a"), made("b", steps=500, tokens=2000.0, every=25, seconds=2.0)
    found = compare(a, b, LOSS)
    assert found.own is not None and found.own.step == 500 and found.own.tokens == 1_000_000
    assert not any(saving.is_beyond_noise for saving in found.savings.values())
    assert "%" not in conclusion(a, b) and "no difference in tokens and FLOPs beyond the noise" in conclusion(a, b)
    assert "saved" not in "".join(summarize(b, [a, b]).values())


def test_settings_that_differ_are_named_where_both_runs_recorded_them() -> None:
    """A run of an earlier version, or whose data.json is damaged, has none or some."""
    full = RunRecord(setting={"model": "m 8B", "data": "x", "optimizer.lr": 0.1})
    some, other = (
        RunRecord(setting={"optimizer.lr": 0.2}),
        RunRecord(setting={"model": "m 8B", "data": "y", "optimizer.lr": 0.1}),
    )
    for own, base, differing in (
        (full, RunRecord(), {}),
        (RunRecord(), full, {}),
        (full, full, {}),
        (some, full, {"optimizer.lr": ("0.2", "0.1")}),
        (full, some, {"optimizer.lr": ("0.1", "0.2")}),
        (full, other, {"data": ("x", "y")}),
    ):
        runs = [made("a", record=base), made("b", lambda t: curve(1.25 * t), record=own)]
        assert conclusion(*runs).endswith("20.0% saved in tokens and FLOPs")
        columns = [summarize(run, runs) for run in runs]
        rows = {name: tuple(column.get(name, "-") for column in reversed(columns)) for name in full.setting}
        assert {name: row for name, row in rows.items() if row != ("-", "-")} == differing


@pytest.mark.parametrize("faster", [1.05, 1.25, 2.0, 0.8])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_true_saving_is_reported_in_tokens_and_flops(faster: float, batch: int) -> None:
    a = made("a", steps=1000)
    b = made("b", lambda t: curve(faster * t), steps=1600 // batch, tokens=1000.0 * batch, every=40 // batch)
    found, true = compare(a, b, LOSS), 100 * (1 - 1 / faster)
    assert saved(found) == pytest.approx(true, abs=0.3) and saved(found, "FLOPs") == pytest.approx(true, abs=0.3)
    word = f"{abs(saved(found) or 0):.1f}% {'saved' if true > 0 else 'more'}"
    assert f"{word} in tokens and FLOPs" in conclusion(a, b)
    assert f"({word})" in summarize(b, [a, b])["reached after tokens"]
    assert "%" not in summarize(b, [a, b])["reached at step"]


def test_scoring_is_charged() -> None:
    """20% fewer tokens; per step, 96 examples of 32 tokens are scored at a third each, 1,000 tokens are trained."""
    ledger: dict[str, Any] = {"ledger/examples_scored": lambda s: 96.0 * s, "seconds": 1.94}
    a = made("a", record=RunRecord(batch_size=31, tokens_per_example=32), tokens=992.0)
    b = made(
        "b", lambda t: curve(1.25 * t), record=RunRecord(batch_size=31, tokens_per_example=32), tokens=992.0, **ledger
    )
    found = compare(a, b, LOSS)
    assert saved(found) == pytest.approx(20.0, abs=0.3)
    assert saved(found, "FLOPs") == pytest.approx(100 * (1 - 0.8 * (1 + 96 * 32 / 3 / 992)), abs=0.6)
    assert saved(found, "seconds") == pytest.approx(100 * (1 - 0.8 * 1.94), abs=0.6)
    assert re.search(r"% saved in tokens, 6\d?\.\d% more in FLOPs with scoring", conclusion(a, b))
    # The same without the tokens per example: the saving in tokens alone would mislead.
    a, b = made("a"), made("b", lambda t: curve(1.25 * t), **ledger)
    found = compare(a, b, LOSS)
    assert found.withheld and "96,000 examples that it scored" in found.withheld
    assert "% saved" not in conclusion(a, b) and re.search(r": 55\.\d% more in seconds", conclusion(a, b))


def test_scorers_are_charged() -> None:
    """By their own FLOPs where recorded, else by their seconds at the run's pace; else no saving is reported."""
    speeds: dict[str, Any] = {SPEED: lambda s: 500.0, "tflops": lambda s: 500.0 * 6e9 / 1e12}
    ledger: dict[str, Any] = {"ledger/prepaid_seconds": lambda s: 100.0, "ledger/train_seconds": lambda s: 1.0 * s}
    a = made("a", **speeds)
    exact = made("b", record=RunRecord(losses=("x",), scorers_flops=6e9 * 50_000), **speeds, **ledger)
    paced, unknown = made("b", **speeds, **ledger), made("b", record=RunRecord(losses=("x",)), **speeds)
    assert Costs(exact).flops_per_token == pytest.approx(6e9)
    assert [Costs(run).charged_tokens(1000) for run in (a, exact, paced)] == pytest.approx([1e6, 1.05e6, 1.1e6])
    assert Costs(unknown).charged_tokens(1000) is None and "cost of its scorers" in str(
        compare(a, unknown, LOSS).withheld
    )
    assert saved(compare(a, paced, LOSS), "FLOPs") == pytest.approx(-10.0, abs=0.5)
    assert saved(compare(a, paced, LOSS), "seconds") == pytest.approx(-10.0, abs=0.5)


@pytest.mark.parametrize("system", [Freezing, Highway])
def test_what_a_cheaper_step_saved_is_taken_off(system: type[System]) -> None:
    run = made("a", **{f"{system.name}/saved_of_step": lambda s: 0.25})
    assert Costs(run).charged_tokens(1000) == pytest.approx(0.75e6)


def diverged(t: float) -> float:
    return curve(t) if t < 600_000 else curve(600_000) + 2.5 * (t - 600_000) / 400_000


def overfitted(t: float) -> float:
    return curve(t) + 2.0 * max(0.0, t / 1e6 - 0.7)


def ends_in(value: float, *, since: float = 950_000) -> Curve:
    return lambda t: curve(1.3 * t) if t < since else value


def dips(t: float) -> float:
    """At the end of curve() early, and up again."""
    return 2.2 if 300_000 <= t < 400_000 else 2.2 + 0.5 * math.exp(-t / 2e6)


@pytest.mark.parametrize(
    ("first", "run", "reason"),
    [
        (made("a", diverged), made("b"), "a was at 2.7"),
        (made("a", overfitted), made("b"), "it diverged or overfitted"),
        (made("a", ends_in(math.nan)), made("b"), "a diverged: its last validation loss is nan"),
        (made("a"), made("b", ends_in(math.inf)), "b diverged: its last validation loss is inf"),
        (made("a"), made("b", ends_in(math.nan)), "b diverged: its last validation loss is nan"),
        (made("a"), made("b", **{TRAIN: lambda s: math.nan}), "b diverged: its last training loss is nan"),
        (made("a"), made("b", dips), "the curves cross afterwards: b ended at 2."),
        # The first is at its own end early, and then flat; the other comes later and ends far below.
        (made("a", lambda t: max(2.6, curve(3 * t))), made("b"), "the curves cross afterwards"),
        (made("a", every=1000), made("b"), "a has only one validation"),
        (made("a"), made("b", every=1000), "b has only one validation"),
        (made("a"), made("b", lambda t: curve(1.5 * t), every=300), "b has 3 validations, too few to estimate"),
        (made("a"), made("b", lambda t: 1.0), "b had already reached it at its first validation"),
        (made("a", record=RunRecord(measured={"validation data": "x"})),
         made("b", record=RunRecord(measured={"validation data": "y"})), "their validation data differ"),
        (made("a", record=RunRecord(measured={"validation.seq_len": 64})),
         made("b", record=RunRecord(measured={"validation.seq_len": 32})),
         "validation.seq_len is 32 for b and 64 for a"),
        (made("a", record=RunRecord(measured={"learner": "classifier"})),
         made("b", record=RunRecord(measured={"learner": "autoencoder"})), "learner is autoencoder for b"),
        (made("a"), made("b", **{"throughput(ips)": lambda s: 1.0}), "their losses are mean squared error and nats"),
    ],
)  # fmt: skip
def test_where_the_curves_do_not_allow_it(first: RunScalars, run: RunScalars, reason: str) -> None:
    text = conclusion(first, run)
    assert reason in text and "% saved" not in text and "% more" not in text
    assert not [fact for fact in summarize(run, [first, run]).values() if "% saved" in fact or "% more" in fact]


@pytest.mark.parametrize("every", [100, 50, 10])
def test_noise_is_no_saving(every: int) -> None:
    """The same run twice, with noise, the second validating more often: a saving is reported only by chance, and no
    side is favored."""
    rng = np.random.default_rng(every)
    points, claims, tried = [], 0, 150
    for _ in range(tried):
        a, b = (made(name, lambda t: curve(t) + 0.05 * rng.normal(), every=e) for name, e in (("a", 100), ("b", every)))
        found = compare(a, b, LOSS)
        claims += saved(found) is not None
        if found.own and found.base:
            points.append(100 * (1 - found.own.step / found.base.step))
    assert claims <= 0.05 * tried
    assert abs(float(np.median(points))) < 1.5 and len(points) > 0.7 * tried


def test_a_saving_is_seen_through_noise() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        a = made("a", lambda t: curve(t) + 0.005 * rng.normal())
        b = made("b", lambda t: curve(1.5 * t) + 0.005 * rng.normal())
        found.append(saved(compare(a, b, LOSS)))
    clear = [x for x in found if x is not None]
    assert len(clear) > 30 and np.mean(clear) == pytest.approx(100 / 3, abs=1.5)


def test_an_end_within_the_noise_is_near() -> None:
    rng = np.random.default_rng(1)
    a, b = (made(name, lambda t: curve(t) + 0.01 * rng.normal()) for name in "ab")
    b.scalars[VALIDATION] = {s: x + max(0.0, 2.25 - x) for s, x in b.scalars[VALIDATION].items()}
    text = conclusion(a, b)
    assert "% " not in text or "within its noise" in text or "beyond the noise of the validations" in text


def test_a_run_against_itself() -> None:
    run = made("a")
    assert not any(saving.is_beyond_noise for saving in compare(run, run, LOSS).savings.values())


def test_accuracies_are_compared_as_losses_are() -> None:
    shares = {name: made(name, record=RunRecord()) for name in "ab"}
    for name, faster in (("a", 1.0), ("b", 1.25)):
        run = shares[name]
        run.scalars[ACCURACY] = {s: 1 - curve(faster * 1000 * s) / 5 for s in run.scalars[VALIDATION]}
        run.seconds[ACCURACY] = run.seconds[VALIDATION]
    assert saved(compare(shares["a"], shares["b"], TOP1)) == pytest.approx(20.0, abs=0.3)


def test_seconds_compare_on_one_machine() -> None:
    a = made("a", hosts={"x"})
    b, c = (made("b", lambda t: curve(1.25 * t), hosts={host}) for host in "xy")
    assert saved(compare(a, b, LOSS), "seconds") == pytest.approx(20.0, abs=0.3)
    assert "seconds" not in compare(a, c, LOSS).savings
    a.record = c.record = RunRecord(devices="8 x NVIDIA H200")
    assert saved(compare(a, c, LOSS), "seconds") is not None


def test_what_else_differs_is_named() -> None:
    setting = {"model": "llama3_attent 8B", "debug.seed": 0, "data": "x", "training.steps": 1000}
    a = made("a", record=RunRecord(setting=setting))
    b = made(
        "b", lambda t: curve(1.25 * t), record=RunRecord(setting=setting | {"debug.seed": 1, "training.steps": 2000})
    )
    text = conclusion(a, b)
    rows = [summarize(run, [a, b]) for run in (a, b)]
    assert [(row["debug.seed"], row["training.steps"]) for row in rows] == [("0", "1000"), ("1", "2000")]
    assert text.endswith("b is at step 1,000 of 2,000")


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 7])
def test_the_noise_of_a_curve_is_measured(gap: int) -> None:
    rng = np.random.default_rng(gap)
    steps = gap * np.arange(1, 401)
    values = 2 + 3 * np.exp(-steps / steps[-1] * 3) + 0.02 * rng.normal(size=400)
    assert curves_module.noise((steps, values)) == pytest.approx(0.02, rel=0.2)
    assert curves_module.noise((steps[:4], values[:4])) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_crossing_divides_best(seed: int) -> None:
    """Against every moment of a fine grid: steps above before it plus steps not above after it."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 9, 14))
    values = np.round(3 - np.arange(14) / 7 + rng.normal(size=14), 2)
    target = float(np.median(values))
    found = curves_module.crossing(steps, values, target)
    assert found is not None
    grid = np.linspace(steps[0], steps[-1], 20_001)
    above = np.interp(grid, steps, values) > target
    score = np.concatenate([[0], np.cumsum(above)]) + np.concatenate([np.cumsum(~above[::-1])[::-1], [0]])
    k = int(np.searchsorted(grid, found.step))
    best = int(score[:-1].max())
    assert score[k] >= best - 2 or values[-1] > target  # a curve that is left above has no down-crossing at its end


def test_the_level_of_a_noisy_end_is_a_mean() -> None:
    rng = np.random.default_rng(0)
    ends = []
    for _ in range(100):
        steps = np.arange(1, 41) * 25
        values = 2 + 3 * np.exp(-steps / 100) + 0.05 * rng.normal(size=40)
        ends.append(curves_module.level(steps, values))
    assert np.std(ends) < 0.03 and abs(np.mean(ends) - 2) < 0.02
    run = made("a")
    assert final(run, LOSS) == run.scalars[VALIDATION][1000]  # without noise the last one
    assert reach(run, final(run, LOSS)) is not None
