"""job_config.py: every value out of range is refused with the key, the value and the mend."""

import re

import pytest

from titan_attent.foundations.checks import closest
from titan_attent.job_config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config
from titan_attent.systems.teaching.importance import IMPORTANCES, reads

NAN, INF = float("nan"), float("inf")

UNKNOWN = [
    # key, value, hint
    ("strategy", "sotf", "soft"),
    ("strategy", "Hard", "hard"),
    ("strategy", "unifrom", "uniform"),
    ("strategy", "treshold", "threshold"),
    ("strategy", "zzz", None),
    ("strategy", None, None),
    ("importance", "los", "loss"),
    ("importance", "excess", "excess_loss"),
    ("importance", "functional-gradient", "functional_gradient"),
    ("importance", "", None),
    ("ratio_schedule", "constnat", "constant"),
    ("ratio_schedule", "incremetal", "incremental"),
    ("ratio_schedule", "cosin", "cosine"),
    ("ratio_schedule", "adaptve", "adaptive"),
    ("scoring", "foward", "forward"),
    ("scoring", "never", None),
    ("interval_schedule", "Fixed", "fixed"),
    ("interval_schedule", "cosine", None),
    ("normalization", "soft_max", "softmax"),
    ("normalization", "sigmod", "sigmoid"),
    ("weighting", "inverse-probability", "inverse_probability"),
    ("weighting", True, None),
]

CHOICES = {
    "strategy": ["uniform", "random", "hard", "soft", "threshold"],
    "ratio_schedule": ["constant", "incremental", "cosine", "adaptive", "calibrated"],
    "interval_schedule": ["fixed", "incremental"],
    "scoring": ["train", "forward", "forward_once", "amateur"],
    "normalization": ["softmax", "sigmoid"],
    "weighting": ["none", "inverse_probability", "loss"],
}

LOSSES = {"reference_path": "an expert's", "amateur_path": "an amateur's"}
NEEDED = {
    "calibrated": {"importance": "cross_entropy_difference", **LOSSES},
    "amateur": {"importance": "attainment", **LOSSES},
}

OUT_OF_RANGE = [
    # key, values, what it must be
    ("initial_ratio", [0, 0.0, -0.5, 1.5, NAN, INF, True, "0.5", None], "a number above 0 and at most 1"),
    ("final_ratio", [0, 1.0001, NAN, -INF, False, [0.5]], "a number above 0 and at most 1"),
    ("temperature", [0, 0.0, -1.0, NAN, INF, True, "1"], "a number above 0"),
    ("min_inclusion_probability", [-0.01, 1, 1.0, NAN, True], "a number at least 0 and below 1"),
    ("max_repeats", [-1, -0.5, NAN, INF, True, "4"], "a number at least 0"),
    ("max_weight", [0.99, 0, -4.0, NAN, INF, True], "a number at least 1"),
    ("anneal_fraction", [-0.1, 1.1, NAN, INF, True], "a number at least 0 and at most 1"),
    ("warmup_passes", [-2, 0.5, 1.0, NAN, True, "1"], "a whole number at least -1"),
    ("initial_interval", [0, -1, 1.0, 1.5, NAN, True], "a whole number at least 1"),
    ("max_interval", [0, 2.0, NAN, True], "a whole number at least 1"),
    ("scoring_batch_size", [-1, 2.0, NAN, True], "a whole number at least 0"),
    ("pool_size", [-1, 2.0, NAN, True], "a whole number at least 0"),
    ("loss_chunks", [0, -1, 2.0, NAN, True], "a whole number at least 1"),
    ("quarantine_after", [-1, 1.0, NAN, True], "a whole number at least 0"),
    ("min_effective_sample_size", [-0.1, 1, NAN, True], "a number at least 0 and below 1"),
    ("seed", [0.0, 1.5, NAN, True, "0", None], "a whole number"),
]

GOOD = {
    "initial_ratio": [1e-9, 0.5, 1, 1.0],
    "final_ratio": [1e-9, 1],
    "temperature": [1e-3, 1, 100.0],
    "min_inclusion_probability": [0, 0.0, 0.999],
    "max_repeats": [0, 1, 1.5, 1e6],
    "max_weight": [1, 1.0, 1e6],
    "anneal_fraction": [0, 0.125, 1, 1.0],
    "warmup_passes": [-1, 0, 1, 3],
    "initial_interval": [1, 2],
    "max_interval": [1, 7],
    "scoring_batch_size": [0, 64],
    "pool_size": [0, 64],
    "loss_chunks": [1, 8],
    "quarantine_after": [0, 1],
    "min_effective_sample_size": [0, 0.5],
    "seed": [-1, 0, 2**40],
    **CHOICES,
}


def refusal(**values) -> str:
    with pytest.raises(ValueError) as caught:
        check_config(TeacherConfig(**values))
    return str(caught.value)


def test_the_defaults_are_good_and_teach_nothing():
    check_config(TeacherConfig())
    assert TeacherConfig().strategy == "uniform"


@pytest.mark.parametrize("key, value", [(key, value) for key, values in GOOD.items() for value in values])
def test_good_values(key, value):
    needed = NEEDED.get(value, {}) if isinstance(value, str) else {}
    # The default schedule swaps nothing: a final ratio below the initial one is another test's.
    schedule = {} if key == "ratio_schedule" else {"ratio_schedule": "constant"}
    strategy = {} if key == "strategy" else {"strategy": "hard"}
    check_config(TeacherConfig(**{key: value} | strategy | schedule | needed))


@pytest.mark.parametrize("key, value, hint", UNKNOWN)
def test_an_unknown_choice_is_refused_with_the_choices_and_a_hint(key, value, hint):
    message = refusal(**{key: value})
    assert message.startswith(f"[teacher] {key} = {value!r} is unknown: use one of ")
    assert re.findall(r'"(\w+)"', message.split("; did you mean")[0]) == CHOICES.get(key, list(IMPORTANCES))
    assert message.endswith(f'did you mean "{hint}"?') if hint else "did you mean" not in message


@pytest.mark.parametrize("key, value, must", [(key, v, must) for key, values, must in OUT_OF_RANGE for v in values])
def test_a_number_out_of_range_is_refused_with_its_range(key, value, must):
    assert refusal(**{key: value}) == f"[teacher] {key} = {value!r}: it must be {must}"


def test_the_tables_name_every_key_that_has_a_range():
    covered = {row[0] for row in (*UNKNOWN, *OUT_OF_RANGE)}
    assert covered | {"trace", "shadow", "reference_path", "amateur_path"} == set(TeacherConfig.__dataclass_fields__)


def test_shadow_mode_shows_the_decisions_of_a_strategy_that_decides():
    """Under uniform it said ratio 1.0 where the rule would keep a quarter."""
    for values in ({}, {"strategy": "uniform"}, {"ratio_schedule": "constant", "initial_ratio": 0.25}):
        message = refusal(shadow=True, **values)
        assert message.startswith('[teacher] shadow = true with strategy = "uniform"')
        assert 'strategy = "hard"' in message and "shadow = false" in message
    for strategy in ("random", "hard", "soft"):
        check_config(TeacherConfig(shadow=True, strategy=strategy))


def test_the_excess_loss_needs_a_reference():
    message = refusal(importance="excess_loss")
    assert message.startswith('[teacher] importance = "excess_loss" needs reference_path: ')
    assert message.endswith("torchrun -m titan_attent.score")


def test_the_adaptive_ratio_moves_between_its_two_ends():
    message = refusal(ratio_schedule="adaptive", initial_ratio=0.9, final_ratio=0.2)
    assert message.startswith("[teacher] initial_ratio = 0.9 is above final_ratio = 0.2: ") and "swap" in message
    for schedule, initial, final in (("adaptive", 0.2, 0.9), ("adaptive", 0.5, 0.5), ("incremental", 0.9, 0.2)):
        check_config(TeacherConfig(ratio_schedule=schedule, initial_ratio=initial, final_ratio=final))


def test_the_largest_interval_is_not_below_the_first():
    assert "[teacher] max_interval = 2: it must be a whole number at least 3" in refusal(
        interval_schedule="incremental", initial_interval=3, max_interval=2
    )
    check_config(TeacherConfig(interval_schedule="incremental", initial_interval=3, max_interval=3))


def test_the_fixed_interval_schedule_does_not_read_the_largest_interval():
    check_config(TeacherConfig(interval_schedule="fixed", initial_interval=3))


def test_the_importances_are_those_that_validate_takes():
    for name in IMPORTANCES:
        amateur = "another" if "amateur" in reads(name) else ""
        check_config(TeacherConfig(importance=name, reference_path="folder", amateur_path=amateur))
    listed = re.findall(r'"(\w+)"', refusal(importance="nothing like it"))
    assert listed == list(IMPORTANCES)


def test_closest_names_only_a_near_miss():
    assert closest("sfot", ["soft", "hard"]) == '; did you mean "soft"?'
    assert closest("qqqq", ["soft", "hard"]) == ""


@pytest.mark.parametrize(
    "values, mend",
    [
        ({"scoring": "forward_once", "pool_size": 64}, 'use scoring = "forward", or pool_size = 0'),
        ({"strategy": "uniform", "weighting": "loss"}, 'use strategy = "random", ratio_schedule = "constant"'),
        ({"strategy": "uniform", "loss_chunks": 4}, "set it to 1, or choose another strategy"),
        ({"strategy": "threshold", "weighting": "loss"}, "weights of its own: choose another of the two"),
        ({"scoring": "amateur"}, "needs amateur_path: the folder of an amateur's losses"),
        ({"importance": "cross_entropy_difference", "reference_path": "a"}, "needs amateur_path: the folder"),
        ({"importance": "learnability", "amateur_path": "a"}, "or remove amateur_path"),
        ({"importance": "functional_gradient", "amateur_path": "a"}, "or remove amateur_path"),
        ({"importance": "cross_entropy_difference", "scoring": "forward", **LOSSES}, 'Use scoring = "amateur"'),
        ({"ratio_schedule": "calibrated", **LOSSES}, 'use importance = "cross_entropy_difference", or another'),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_the_mend(values, mend):
    assert mend in refusal(**values)


def test_a_share_of_a_repeat_is_refused():
    assert "set it to 1 or more, or to 0 for the default" in refusal(max_repeats=0.5)
