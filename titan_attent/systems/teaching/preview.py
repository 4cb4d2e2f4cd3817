"""The first selection of a run, made before the run: only scores on disk are read, and nothing is trained.

The functions are the teacher's own, in one process, so the selection is that of a run on any number of ranks.

Cost: a read of the scores and one draw (draws.py); 40 bytes per example beside the scores.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.data.plan.packed import Packer
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.scores.stored import AMATEUR, EXPERT
from titan_attent.systems.teaching import checks
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, TeacherConfig
from titan_attent.systems.teaching.forecast import Forecast, forecast
from titan_attent.systems.teaching.rule import with_rule
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.teacher import Teacher


class Preview(NamedTuple):
    """The first selection.

    Attributes:
        scores: fp32 [N], the importances.
        kept: bool [N].
        trusted: fp32, sorted: the scores of held-out trusted examples; empty if the rule reads none.
        metrics: the ``teacher/*`` scalars that the run logs with this selection.
        visits: how often the run trains an example that is kept.
        forecast: what the run logs before its first step.
    """

    scores: np.ndarray
    kept: np.ndarray
    trusted: np.ndarray
    metrics: dict[str, float]
    visits: float
    forecast: Forecast


def is_decided_before(config: TeacherConfig) -> bool:
    """Whether scores on disk alone decide the selection of the whole run, so that :func:`preview` can show it."""
    config = with_rule(config)
    return not (config.strategy == "uniform" or config.follows_learner or config.pool_size) and (
        config.ratio_schedule in DECIDED_BY_SCORES
    )


def preview(
    config: TeacherConfig,
    run: checks.ScoredRun,
    *,
    total_steps: int,
    knows_steps: bool = True,
    within: Mapping[str, float] | None = None,
) -> Preview:
    """Make the first selection of a run.

    Args:
        config: a section for which :func:`is_decided_before` holds, and that ``checks.check_data`` has accepted.
        knows_steps: whether the forecast says how often an example is trained.
        within: as in :class:`Teacher`.
    """
    config, dataset, num = with_rule(config), run.dataset, len(run.dataset)
    folders = checks.folders_of_scores(config, run)
    losses = {role: run.open_scores(path).read_for(dataset, 0, num) for role, path in folders.items()}
    trusted = checks.trusted_differences(config, run) if checks.needs_trusted(config) else None
    packer = None
    if isinstance(dataset, DocumentDataset):
        packer = Packer(dataset, batch_size=run.batch_size)  # what is selected does not depend on the packing
    teacher = Teacher(
        LossBuffer(num),
        config,
        batch_size=run.batch_size,
        total_steps=total_steps,
        tokens_per_example=dataset.tokens_per_example,
        expert=losses.get(EXPERT),
        amateur=losses.get(AMATEUR),
        trusted=trusted,
        chance_loss=dataset.chance_loss,
        sources=dataset.sources,
        packer=packer,
        within=within,
    )
    seen: list[np.ndarray] = []

    def watch(candidates: Candidates, scores: Scores, weights: Tensor) -> None:
        seen.extend((scores.values.numpy().copy(), (weights > 0).numpy()))

    draws = teacher.draws
    draws.watch = watch
    # The seed of a run's first selection (rounds.py): round 1, pass 0. It decides among equal scores.
    draws.draw(Pool.whole(num), step=0, seed=(config.seed, 1, 0), ratio=None)
    scores, kept = seen
    metrics = teacher.decision_metrics() | {"teacher/ratio": draws.num_counted_selected / draws.num_counted}
    visits = metrics["teacher/repeats"]
    said = visits if knows_steps else None
    return Preview(
        scores,
        kept,
        torch.tensor(sorted(trusted or ()), dtype=torch.float32).numpy(),
        metrics,
        visits,
        forecast(
            config,
            metrics,
            visits=said,
            step=0,
            num_examples=teacher.amounts.data,
            takes_all=draws.takes_all,
            noun=teacher.amounts.noun,
        ),
    )
