"""What a run with the recommended rule would keep of a data set, by scores on disk: the teacher's own decision.

The scores of a pair decide by ``strategy = "difference"``, those of an amateur alone by the rule of
docs/guide/choosing.md for data without trusted text. An expert's alone decide nothing before a run: they are compared
with the learner's losses. The functions are those of a run, so the selection is the same, too
(tests/integration/test_look.py).

Cost: that of systems/teaching/preview.py.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.examples import Examples
from titan_attent.scores.find import find_scorers
from titan_attent.scores.provenance import TRUSTED
from titan_attent.scores.stored import AMATEUR, EXPERT, StoredScores
from titan_attent.systems.teaching import checks
from titan_attent.systems.teaching.advice import warn_of_mixed_windows
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.preview import preview
from titan_attent.systems.teaching.rule import with_rule

WITH_PAIR = {"strategy": "difference"}
WITH_AMATEUR = {
    "strategy": "hard",
    "importance": "attainment",
    "scoring": "amateur",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
}
"""The rule for one pass without trusted text (docs/guide/choosing.md)."""


@dataclass(frozen=True)
class RunSize:
    """The size of the run that is planned.

    Attributes:
        batch: examples of a global batch; windows where documents are the unit.
        steps: training steps; 0 if they are not known, and then nothing repeats.
        max_repeats: teacher.max_repeats.
    """

    batch: int = 1
    steps: int = 0
    max_repeats: float = 0.0


@dataclass(frozen=True)
class _Facts:
    """What the teacher's checks read of a run."""

    dataset: Examples
    batch_size: int
    open_scores: Callable[[str], StoredScores]
    loss: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The scores of a data set, and what is kept by them.

    Attributes:
        name: what the scores are.
        rule: the rule that decides, as lines of ``[teacher]``; empty if none does.
        scores: fp32 [N], by which examples are ranked. If a rule decides, the highest are kept first.
        kept: bool [N]; None if no rule decides.
        trusted: the scores of held-out trusted examples, sorted; empty without them.
        visits: how often a run trains an example that is kept; None if its steps are not known.
        forecast: what would be selected, in words; why nothing is, if no rule decides.
        warnings: what a run would warn of.
    """

    name: str
    scores: np.ndarray
    rule: tuple[str, ...] = ()
    kept: np.ndarray | None = None
    trusted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    visits: float | None = None
    forecast: str = ""
    warnings: tuple[str, ...] = ()


def scored_length(folder: str) -> int:
    """The tokens of an example, or the side of an image, that the scores in ``folder`` are for; 0 for documents.

    ValueError as :func:`find_scorers` and :class:`StoredScores`.
    """
    return StoredScores(next(iter(find_scorers(folder).values()))).scoring.seq_len


def decide(dataset: Examples, folder: str, size: RunSize) -> Decision:
    """Decide as a run would that reads the scores in ``folder``.

    Raises:
        ValueError: these are not scores of the data, or a run would refuse them for another reason.
    """
    opened: dict[str, StoredScores] = {}

    def open_scores(path: str) -> StoredScores:
        return opened.setdefault(path, StoredScores(path))

    folders = find_scorers(folder, open_scores=open_scores)
    if EXPERT in folders and AMATEUR not in folders:
        scores = open_scores(str(folders[EXPERT]))
        scores.check(dataset.scored)
        losses = scores.read_for(dataset, 0, len(dataset)).numpy()
        why = (
            "an expert's losses alone select nothing before a run, which compares them with the learner's. Write the "
            "scores of a pair (torchrun -m titan_attent.score pair) to see what would be kept"
        )
        return Decision(name="the expert's loss, in nats", scores=losses, forecast=why)
    has_both = EXPERT in folders
    if has_both and not (Path(folders[AMATEUR]) / TRUSTED).is_dir():
        raise ValueError(
            f"{folder}: there are no losses of trusted text ({folders[AMATEUR] / TRUSTED}), by which the share to "
            "keep is decided, and a run would refuse these scores. Write both with torchrun -m titan_attent.score pair"
        )
    rule: dict[str, Any] = WITH_PAIR if has_both else WITH_AMATEUR
    given = rule | {"scores": folder} | ({"max_repeats": size.max_repeats} if size.max_repeats else {})
    config = with_rule(TeacherConfig(**given))
    facts = _Facts(dataset, size.batch, open_scores, loss=open_scores(str(folders[AMATEUR])).loss)
    with _warnings() as warnings:
        checks.check_data(config, facts)
        warn_of_mixed_windows(config, dataset)
        first = preview(config, facts, total_steps=max(1, size.steps), knows_steps=size.steps > 0)
    name = "amateur's - expert's loss, in nats per token; high: like trusted text"
    return Decision(
        name=name if has_both else "the amateur's loss, weighed by what it could learn",
        rule=tuple(f"{key} = {_toml(value)}" for key, value in given.items()),
        scores=first.scores,
        kept=first.kept,
        trusted=first.trusted,
        visits=first.visits if size.steps else None,
        forecast=first.forecast.text,
        warnings=tuple(warnings),
    )


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that the package logs, in place of logging them."""
    lines: list[str] = []
    logger = logging.getLogger("titan_attent")

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    handler, propagated = Collector(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
