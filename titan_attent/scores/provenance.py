"""Checks which model wrote which scores: compares what the files say with how a run reads them.

    amateur            the amateur's losses on the data of the run
    expert             the expert's losses on the same data
    .../trusted        in either folder: the same model's losses on trusted held-out text

If the two are exchanged, amateur - expert has the opposite sign, and the run trains what looks least like trusted text.
If one model wrote both, the difference is 0 everywhere, and the run trains the first examples by number. If the two
hold different losses, the difference has no meaning. Files of earlier versions say less: an unknown fact is not
refused, and is logged once where it can do harm.

Cost: reads nothing beyond what is open already.
"""

import logging
import os

from titan_attent.scores.reference import AMATEUR, EXPERT, OF_IMAGES, ReferenceLosses

TRUSTED = "trusted"
"""In a folder of losses: the folder of the same model's losses on trusted held-out examples."""

logger = logging.getLogger(__name__)


def check_scores(losses: dict[str, ReferenceLosses], *, learners_loss: str, compared: bool) -> None:
    """Refuse losses that are not what the run reads them as; ValueError with the key.

    Args:
        losses: role -> the losses that the run reads under it, on its data: "amateur", "expert", or both.
        learners_loss: what the learner's own loss is called (``Scoring.loss``); empty where nobody said so.
        compared: whether the learner's own losses are compared with them.
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
                f"The losses in {_without_role(amateur, expert)} do not say whether an amateur or an expert made them. "
                f"Exchanged, the run would train what looks least like trusted text: the amateur is taken to be "
                f"{_who(amateur)}, the expert {_who(expert)}. Score with `--role amateur` or `--role expert` "
                "to have it checked"
            )


def check_trusted(data: ReferenceLosses, trusted: ReferenceLosses) -> None:
    """Refuse losses of trusted text by another model than the one that scored the data, and those of the data."""
    for name in ("model", "checkpoint_sha256", "loss", "role"):
        there, here = (getattr(x if name in ("loss", "role") else x.scoring, name) for x in (trusted, data))
        if there != here and here and there:
            raise ValueError(
                f"{trusted.path}: its {name} is {there!r}, and that of {data.path} is {here!r}: trusted text must be "
                "scored by the model that scored the data. Put the two folders of one model together again, or make "
                "both with torchrun -m titan_attent.score pair"
            )
    if trusted.scoring.data_fingerprint == data.scoring.data_fingerprint:
        raise ValueError(
            f"{trusted.path}: holds losses of the data itself, where those of trusted held-out text belong: nothing "
            "can be calibrated by them. Score trusted text there; torchrun -m titan_attent.score pair does"
        )


def check_loss(scores: ReferenceLosses, loss: str, whose: str) -> None:
    """Refuse the difference of two losses that are not measured alike."""
    here = scores.loss
    if here and loss and here != loss:
        raise ValueError(
            f"[teacher] scores: the losses in {scores.path} are {here}, and {whose} is {loss}: their difference means "
            "nothing. Score again with the run's own values, or train with those that were scored"
        )
    if not (here and loss) and scores.scoring.model.startswith(OF_IMAGES):
        _warn(
            f"{scores.path} does not say which loss it holds (label smoothing, mask ratio and normalised patches "
            f"change every one), and it is subtracted from {whose}, {loss or 'unknown'}: an earlier version of this "
            "package wrote it. Score again, unless you know that they are equal"
        )


def _check_role(scores: ReferenceLosses, role: str) -> None:
    if scores.role and scores.role != role:
        raise ValueError(
            f"[teacher] scores: {scores.path} holds the losses of the {scores.role} ({_who(scores)}), where those of "
            f"the {role} belong. Are the two folders exchanged? Put the losses of the {role} there"
        )


def _check_two_models(amateur: ReferenceLosses, expert: ReferenceLosses) -> None:
    same = ""
    if amateur.path.resolve() == expert.path.resolve():
        same = "are one folder"
    elif amateur.sha256 == expert.sha256:
        same = "hold the same losses"
    elif amateur.scoring.checkpoint_sha256 == expert.scoring.checkpoint_sha256:
        same = f"were made by one model ({_who(amateur)})"
    if same:
        raise ValueError(
            f"[teacher] scores: {amateur.path} and {expert.path} {same}: a model's difference to itself says nothing "
            "about any example. Put the losses of two models there; torchrun -m titan_attent.score pair writes both"
        )


def _without_role(*losses: ReferenceLosses) -> str:
    return " and ".join(str(scores.path) for scores in losses if not scores.role)


def _who(scores: ReferenceLosses) -> str:
    return f"{scores.scoring.model}, {scores.scoring.checkpoint}"


def _warn(text: str) -> None:
    """Once a run: this is called before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)
