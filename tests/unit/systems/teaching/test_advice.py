"""The warnings about rules that can do harm, and that other rules cause none."""

import logging
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from titan_attent import TeacherConfig
from titan_attent.systems.teaching import advice
from titan_attent.systems.teaching.advice import MIXED_WINDOW_DOCUMENTS, log_plan, risk_of, warn_of_mixed_windows
from titan_attent.systems.teaching.config_checks import check_config
from titan_attent.systems.teaching.rule import with_rule
from titan_attent.systems.teaching.schedule import Plan
from titan_attent.systems.teaching.system import Teaching

HARD = {"strategy": "hard"}
AMATEUR, EXPERT = {"scores": "a"}, {"scores": "e"}
DIFFERENCE = {"importance": "cross_entropy_difference", "scores": "both"}


@pytest.mark.parametrize(
    "settings, level, said",
    [
        ({"importance": "loss", **HARD}, logging.WARNING, "noise always has the highest loss"),
        ({"importance": "loss", "strategy": "soft"}, logging.WARNING, 'use strategy = "difference"'),
        (
            {"importance": "functional_gradient", **HARD},
            logging.WARNING,
            "titan_attent.score pair writes the scores that",
        ),
        (AMATEUR | HARD, logging.WARNING, "such as a second language"),
        (HARD, logging.WARNING, 'if the data has copies.*Set teacher.scoring = "forward_once"'),
        (DIFFERENCE | HARD, logging.INFO, "Watch teacher/inclusion"),
        ({}, None, ""),
        (HARD | {"scoring": "forward_once"}, logging.WARNING, "all of the rare ones"),
        (HARD | {"importance": "loss", "warmup_passes": 0}, logging.WARNING, "before the learner knows the easy ones"),
        ({"strategy": "random", "importance": "loss"}, None, ""),
        ({"importance": "loss", "dry_run": True, **HARD}, None, ""),
        ({"importance": "excess_loss", **EXPERT, **HARD}, None, ""),
    ],
)
def test_what_a_rule_risks(
    settings: dict[str, Any], level: int | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = TeacherConfig(**settings)
    check_config(config)
    scorers = {"a": {"amateur"}, "e": {"expert"}, "both": {"amateur", "expert"}}.get(config.scores, set())
    risk = risk_of(config, has_amateur="amateur" in scorers)
    assert (risk and risk[0]) == level
    caplog.set_level(logging.INFO)
    plan = Plan(config, steps_of_full_pass=10, total_steps=100, scorers=scorers)
    log_plan(config, plan, num_examples=320, batch_size=32, total_steps=100)
    logged = [(record.levelno, bool(re.search(said, record.getMessage()))) for record in caplog.records]
    assert level is None or (level, True) in logged
    assert level is not None or all(level == logging.INFO for level, _ in logged)


def test_the_log_names_the_rule_that_was_set(caplog: pytest.LogCaptureFixture) -> None:
    config = with_rule(TeacherConfig(strategy="difference", scores="both"))
    caplog.set_level(logging.INFO)
    plan = Plan(config, steps_of_full_pass=10, total_steps=100, scorers={"amateur", "expert"})
    log_plan(config, plan, num_examples=320, batch_size=32, total_steps=100)
    logged = [record.getMessage() for record in caplog.records]
    assert logged[0] == 'Teacher: strategy = "difference" on 320 examples'
    assert not any('"hard"' in line for line in logged)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, None),
        ({"strategy": "uniform", "seed": 3, "trace": True}, None),
        (DIFFERENCE, "set but not read: teacher.importance, teacher.scores. To select examples, set"),
        ({"pool_size": 64}, "set but not read: teacher.pool_size."),
        ({"importance": "loss"} | HARD, None),
    ],
)
def test_a_rule_without_a_strategy_is_logged(
    settings: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    Teaching.check_values(TeacherConfig(**settings))
    logged = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert logged == [] if said is None else said in logged[0]


@pytest.mark.parametrize(
    "settings, documents, said",
    [
        (HARD, 4.0, ["1,024 tokens holds 4.0 documents", "training.seq_len to about 256,"]),
        ({"strategy": "threshold"}, MIXED_WINDOW_DOCUMENTS, ["holds 1.5 documents"]),
        (DIFFERENCE | HARD, 500.0, ["training.seq_len to about 64,"]),
        (HARD, MIXED_WINDOW_DOCUMENTS - 0.01, None),
        ({}, 4.0, None),
        ({"strategy": "random"}, 4.0, None),
    ],
)
def test_windows_that_mix_documents_are_logged(
    settings: dict[str, Any],
    documents: float,
    said: list[str] | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(advice, "documents_per_example", lambda dataset: documents)
    warn_of_mixed_windows(TeacherConfig(**settings), cast(Any, SimpleNamespace(seq_len=1024)))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (said is not None)
    for part in said or []:
        assert part in warned[0]
