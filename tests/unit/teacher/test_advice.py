"""What a user is told of a rule that can do harm, and that nothing is said of the others."""

import logging
from typing import Any

import pytest

from titan_attent import TeacherConfig
from titan_attent.teacher.advice import log_plan, risk_of
from titan_attent.teacher.schedule import Plan

AMATEUR, EXPERT = {"amateur_path": "a"}, {"reference_path": "e"}
DIFFERENCE = {"importance": "cross_entropy_difference", **AMATEUR, **EXPERT}


@pytest.mark.parametrize(
    "settings, level, said",
    [
        ({"importance": "loss"}, logging.WARNING, "noise keeps the highest loss for ever"),
        ({"importance": "loss", "strategy": "soft"}, logging.WARNING, 'use "cross_entropy_difference"'),
        ({"importance": "functional_gradient"}, logging.WARNING, "titan_attent.scorers makes what it needs"),
        (AMATEUR, logging.WARNING, "such as a second language"),
        (DIFFERENCE, logging.INFO, "watch teacher/inclusion"),
        ({}, None, ""),
        ({"strategy": "uniform", "importance": "loss"}, None, ""),
        ({"strategy": "random", "importance": "loss"}, None, ""),
        ({"importance": "loss", "shadow": True}, None, ""),
        ({"importance": "excess_loss", **EXPERT}, None, ""),
    ],
)
def test_what_a_rule_risks(
    settings: dict[str, Any], level: int | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = TeacherConfig(**settings)
    config.validate()
    risk = risk_of(config)
    assert (risk and risk[0]) == level
    caplog.set_level(logging.INFO)
    plan = Plan(config, steps_of_full_pass=10, total_steps=100)
    log_plan(config, plan, num_examples=320, batch_size=32, total_steps=100)
    told = [(record.levelno, said in record.getMessage()) for record in caplog.records]
    assert level is None or (level, True) in told
    assert level is not None or all(level == logging.INFO for level, _ in told)
