"""job_config.py: every value out of range is refused with the key, the value and how to fix it."""

import re
from dataclasses import replace

import pytest

from titan_attent.foundations.checks import closest
from titan_attent.job_config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config, check_scores_named, scorers_read
from titan_attent.systems.teaching.importance import IMPORTANCES
from titan_attent.systems.teaching.rule import KEYS, check_rule, with_rule

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
    ("strategy", "diference", "difference"),
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
    ("level", "spam", "span"),
    ("level", None, None),
]

CHOICES = {
    "level": ["example", "span"],
    "strategy": ["uniform", "difference", "random", "hard", "soft", "threshold"],
    "ratio_schedule": ["constant", "incremental", "cosine", "adaptive", "calibrated"],
    "interval_schedule": ["fixed", "incremental"],
    "scoring": ["train", "forward", "forward_once", "amateur"],
    "normalization": ["softmax", "sigmoid"],
    "weighting": ["none", "inverse_probability", "loss", "worst_case"],
}

SCORES = {"scores": "a pair's"}
NEEDED = {
    "calibrated": {"importance": "cross_entropy_difference", **SCORES},
    "amateur": {"importance": "attainment", **SCORES},
    "difference": SCORES,
    "span": {"strategy": "difference", **SCORES},
    "worst_case": {"strategy": "uniform"},
}

OUT_OF_RANGE = [
    # key, values, what it must be
    ("initial_ratio", [0, 0.0, -0.5, 1.5, NAN, INF, True, "0.5", None], "a number above 0 and at most 1"),
    ("final_ratio", [0, 1.0001, NAN, -INF, False, [0.5]], "a number above 0 and at most 1"),
    ("temperature", [0, 0.0, -1.0, NAN, INF, True, "1"], "a number above 0"),
    ("min_inclusion_probability", [-0.01, 1, 1.0, NAN, True], "a number at least 0 and below 1"),
    ("max_repeats", [-1, -0.5, NAN, INF, True, "4"], "a number at least 0"),
    ("max_weight", [0.99, 0, -4.0, NAN, INF, True], "a number at least 1"),
    ("full_data_tail", [-0.1, 1.1, NAN, INF, True], "a number at least 0 and at most 1"),
    ("warmup_passes", [-2, 0.5, 1.0, NAN, True, "1"], "a whole number at least -1"),
    ("initial_interval", [0, -1, 1.0, 1.5, NAN, True], "a whole number at least 1"),
    ("max_interval", [0, 2.0, NAN, True], "a whole number at least 1"),
    ("scoring_batch_size", [-1, 2.0, NAN, True], "a whole number at least 0"),
    ("pool_size", [-1, 2.0, NAN, True], "a whole number at least 0"),
    ("loss_chunks", [0, -1, 2.0, NAN, True], "a whole number at least 1"),
    ("quarantine_after", [-1, 1.0, NAN, True], "a whole number at least 0"),
    ("min_effective_sample_size", [-0.1, 1, NAN, True], "a number at least 0 and below 1"),
    ("q", [0.99, 0, -1.0, NAN, INF, True, "2"], "a number at least 1"),
    ("seed", [0.0, 1.5, NAN, True, "0", None], "a whole number"),
]

GOOD = {
    "initial_ratio": [1e-9, 0.5, 1, 1.0],
    "final_ratio": [1e-9, 1],
    "temperature": [1e-3, 1, 100.0],
    "min_inclusion_probability": [0, 0.0, 0.999],
    "max_repeats": [0, 1, 1.5, 1e6],
    "max_weight": [1, 1.0, 1e6],
    "full_data_tail": [-1, 0, 0.125, 1, 1.0],
    "warmup_passes": [-1, 0, 1, 3],
    "initial_interval": [1, 2],
    "max_interval": [1, 7],
    "scoring_batch_size": [0, 64],
    "pool_size": [0, 64],
    "loss_chunks": [1, 8],
    "quarantine_after": [0, 1],
    "min_effective_sample_size": [0, 0.5],
    "q": [1, 1.0, 100],
    "seed": [-1, 0, 2**40],
    **CHOICES,
}


def refusal(**values) -> str:
    with pytest.raises(ValueError) as caught:
        config = TeacherConfig(**values)
        check_config(config)
        check_scores_named(config)
    return str(caught.value)


def test_the_defaults_are_good_and_teach_nothing():
    check_config(TeacherConfig())
    assert TeacherConfig().strategy == "uniform"


@pytest.mark.parametrize("key, value", [(key, value) for key, values in GOOD.items() for value in values])
def test_good_values(key, value):
    needed = NEEDED.get(value, {}) if isinstance(value, str) else {}
    # The default schedule swaps nothing: a final ratio below the initial one is another test's.
    schedule = {} if key == "ratio_schedule" or value in ("difference", "span") else {"ratio_schedule": "constant"}
    strategy = {} if key == "strategy" else {"strategy": "hard"}
    config = TeacherConfig(**{key: value} | strategy | schedule | needed)
    check_config(config)
    check_scores_named(config)


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
    assert covered | {"trace", "dry_run", "scores"} == set(TeacherConfig.__dataclass_fields__)


def test_a_dry_run_shows_the_decisions_of_a_strategy_that_decides():
    """Under uniform it said ratio 1.0 where the rule would keep a quarter."""
    for values in ({}, {"strategy": "uniform"}, {"ratio_schedule": "constant", "initial_ratio": 0.25}):
        message = refusal(dry_run=True, **values)
        assert message.startswith('[teacher] dry_run = true with strategy = "uniform"')
        assert 'strategy = "hard"' in message and "dry_run = false" in message
    for strategy in ("random", "hard", "soft"):
        check_config(TeacherConfig(dry_run=True, strategy=strategy))


@pytest.mark.parametrize(
    "values, key",
    [
        ({"importance": "excess_loss"}, 'importance = "excess_loss"'),
        ({"importance": "cross_entropy_difference"}, 'importance = "cross_entropy_difference"'),
        ({"strategy": "difference"}, 'importance = "cross_entropy_difference"'),
        ({"scoring": "amateur"}, 'scoring = "amateur"'),
    ],
)
def test_a_rule_that_reads_scores_needs_them(values, key):
    message = refusal(**values)
    assert message.startswith(f"[teacher] {key} needs scores: the folder that ")
    assert message.endswith("torchrun -m titan_attent.score pair writes")


def test_the_recommended_rule_is_the_keys_that_it_stands_for():
    config = TeacherConfig(strategy="difference", max_repeats=2.0, seed=3, **SCORES)
    by_hand = TeacherConfig(
        strategy="hard",
        importance="cross_entropy_difference",
        ratio_schedule="calibrated",
        interval_schedule="fixed",
        full_data_tail=0.0,
        max_repeats=2.0,
        seed=3,
        **SCORES,
    )
    assert with_rule(config) == by_hand and with_rule(by_hand) is by_hand
    assert scorers_read(with_rule(config)) == {"expert", "amateur"}


@pytest.mark.parametrize(
    "values, given, key",
    [
        ({"importance": "loss"}, (), "importance"),
        ({"ratio_schedule": "constant"}, (), "ratio_schedule"),
        ({"interval_schedule": "incremental"}, (), "interval_schedule"),
        ({"full_data_tail": 0.125}, (), "full_data_tail"),
        ({}, ("importance",), "importance"),  # the default's value, written in the TOML
        ({}, ("ratio_schedule",), "ratio_schedule"),
    ],
)
def test_a_key_that_the_recommended_rule_sets_is_refused_beside_it(values, given, key):
    config = TeacherConfig(strategy="difference", **SCORES, **values)
    with pytest.raises(ValueError, match=rf'\[teacher\] {key} = .* with strategy = "difference", which sets {key} = '):
        check_rule(config, given=given)
    check_rule(replace(config, strategy="hard"), given=given)
    same = {key: KEYS[key]}
    check_rule(replace(config, **{name: getattr(TeacherConfig(), name) for name in values} | same), given=given)


def test_only_what_can_be_read_of_the_scores_is_read():
    for importance in IMPORTANCES:
        read = scorers_read(TeacherConfig(strategy="hard", importance=importance, **SCORES))
        expected = {"excess_loss": {"expert", "amateur"}, "cross_entropy_difference": {"expert", "amateur"}}
        one_loss = {"loss": {"amateur"}, "attainment": {"amateur"}}
        assert read == (expected | one_loss).get(importance, set())
        assert scorers_read(TeacherConfig(importance=importance, **SCORES)) == set()


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
        check_config(TeacherConfig(importance=name, **SCORES))
    listed = re.findall(r'"(\w+)"', refusal(importance="nothing like it"))
    assert listed == list(IMPORTANCES)


def test_closest_names_only_a_near_miss():
    assert closest("sfot", ["soft", "hard"]) == '; did you mean "soft"?'
    assert closest("qqqq", ["soft", "hard"]) == ""


@pytest.mark.parametrize(
    "values, fix",
    [
        ({"scoring": "forward_once", "pool_size": 64}, 'use scoring = "forward", or pool_size = 0'),
        ({"strategy": "uniform", "weighting": "loss"}, 'use strategy = "random", ratio_schedule = "constant"'),
        (
            {"strategy": "soft", "weighting": "worst_case"},
            'with strategy = "soft": it is the worst case over the inputs',
        ),
        ({"weighting": "worst_case", "pool_size": 64}, "pool_size = 64 with weighting"),
        ({"weighting": "worst_case", "q": 1.0, "loss_chunks": 4}, "set it to 1, or choose another strategy"),
        ({"strategy": "uniform", "loss_chunks": 4}, "set it to 1, or choose another strategy"),
        ({"strategy": "threshold", "weighting": "loss"}, "sets its own weights: choose another weighting or strategy"),
        ({"strategy": "hard", "importance": "learnability", **SCORES}, "or remove scores"),
        ({"strategy": "hard", "importance": "functional_gradient", **SCORES}, "or remove scores"),
        ({"importance": "cross_entropy_difference", "scoring": "forward", **SCORES}, 'Use scoring = "amateur"'),
        ({"ratio_schedule": "calibrated", **SCORES}, 'use importance = "cross_entropy_difference", or another'),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_the_fix(values, fix):
    assert fix in refusal(**values)


def test_a_share_of_a_repeat_is_refused():
    assert "set it to 1 or more, or to 0 for the default" in refusal(max_repeats=0.5)
