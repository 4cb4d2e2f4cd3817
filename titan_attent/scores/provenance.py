"""Checks which model wrote which scores: compares the files with the roles in which a run reads them.

    amateur            the amateur's losses on the data of the run
    expert             the expert's losses on the same data
    .../trusted        in either folder: the same model's losses on trusted held-out text

If the two are exchanged, amateur - expert has the opposite sign, and the run trains the text that looks least like
trusted text. If one model wrote both, the difference is 0 everywhere, and the selection is random. If the two
hold different losses, the difference has no meaning. Files of earlier versions hold fewer facts: an unknown fact is not
refused, and is logged once if it can do harm.

Cost: reads no more than the files that are open already.
"""

import logging
import os

from titan_attent.scores.stored import AMATEUR, EXPERT, OF_IMAGES, StoredScores

TRUSTED = "trusted"
"""Name of the subfolder of a folder of losses that holds the same model's losses on trusted held-out examples."""

logger = logging.getLogger(__name__)


def check_scores(losses: dict[str, StoredScores], *, learners_loss: str, compared: bool) -> None:
    """Raise a ValueError with the key if the role or the loss function of stored losses is not that of the run.

    Args:
        losses: role -> the losses on its data that the run reads in this role: "amateur", "expert", or both.
        learners_loss: the name of the learner's own loss (``Scoring.loss``); empty if unknown.
        compared: whether the run compares the stored losses with the learner's own.
    """
    if len(losses) == 2:
        _check_two_models(losses[AMATEUR], losses[EXPERT])
    for role, scores in losses.items():
        _check_role(scores, role)
        if compared:
            check_loss(scores, learners_loss, "the learner's")
    if len(losses) == 2:
        amateur, expert = losses[AMATEUR], losses[EXPERT]
        check_loss(amateur, expert.loss, "the expert's")
        if not compared and not (amateur.role and expert.role):
            _warn(
                f"{_without_role(amateur, expert)} does not say whether an amateur or an expert wrote the losses. The "
                f"run takes {_model_of(amateur)} for the amateur and {_model_of(expert)} for the expert. If they are "
                "exchanged, it selects the text that looks least like trusted text. Score with `--role amateur` or "
                "`--role expert` to have this checked"
            )


def check_trusted(data: StoredScores, trusted: StoredScores) -> None:
    """Refuse losses of trusted text that another model computed, or that are losses of the data itself."""
    for name in ("model", "checkpoint_sha256", "loss", "role"):
        of_trusted, of_data = (getattr(x if name in ("loss", "role") else x.scoring, name) for x in (trusted, data))
        if of_trusted != of_data and of_data and of_trusted:
            raise ValueError(
                f"{trusted.path}: its {name} is {of_trusted!r}, and that of {data.path} is {of_data!r}: trusted text "
                "must be scored by the model that scored the data. Put the two folders of one model together again, or "
                "write both with torchrun -m titan_attent.score pair"
            )
    if trusted.scoring.data_fingerprint == data.scoring.data_fingerprint:
        raise ValueError(
            f"{trusted.path}: holds losses of the data itself instead of trusted held-out text: nothing can be "
            "calibrated by them. Score trusted text into this folder, as torchrun -m titan_attent.score pair does"
        )


def check_loss(scores: StoredScores, loss: str, whose: str) -> None:
    """Refuse two losses whose difference has no meaning, because they are computed differently."""
    stored = scores.loss
    if stored and loss and stored != loss:
        raise ValueError(
            f"[teacher] scores: the losses in {scores.path} are {stored}, and {whose} is {loss}: their difference "
            "means nothing. Score again with the run's own settings, or train with the settings of the scores"
        )
    if not (stored and loss) and scores.scoring.model.startswith(OF_IMAGES):
        _warn(
            f"{scores.path} does not say which loss it holds, because an earlier version of this package wrote it. The "
            f"run compares it with {whose}, {loss or 'unknown'}; label smoothing, mask ratio and normalised patches "
            "must be equal. Score again, unless you know that they are"
        )


def _check_role(scores: StoredScores, role: str) -> None:
    if scores.role and scores.role != role:
        raise ValueError(
            f"[teacher] scores: {scores.path} holds the losses of the {scores.role} ({_model_of(scores)}) instead of "
            f"those of the {role}. Are the two folders exchanged? Put the losses of the {role} into this folder"
        )


def _check_two_models(amateur: StoredScores, expert: StoredScores) -> None:
    problem = ""
    if amateur.path.resolve() == expert.path.resolve():
        problem = "are one folder"
    elif amateur.sha256 == expert.sha256:
        problem = "hold the same losses"
    elif amateur.scoring.checkpoint_sha256 == expert.scoring.checkpoint_sha256:
        problem = f"were written by one model ({_model_of(amateur)})"
    if problem:
        raise ValueError(
            f"[teacher] scores: {amateur.path} and {expert.path} {problem}: a model's difference to itself says "
            "nothing about any example. Use the losses of two models; torchrun -m titan_attent.score pair writes both"
        )


def _without_role(*losses: StoredScores) -> str:
    return " and ".join(str(scores.path) for scores in losses if not scores.role)


def _model_of(scores: StoredScores) -> str:
    return f"{scores.scoring.model}, {scores.scoring.checkpoint}"


def _warn(text: str) -> None:
    """Log once per run; called before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)
