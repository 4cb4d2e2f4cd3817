"""Whose losses are whose: what the files of scores say of themselves, held against what a run reads them as.

    amateur_path      an amateur's losses of the data of the run
    reference_path    an expert's (a reference model's) losses of the same
    .../trusted       in either folder: the same model's losses of trusted held-out text

Exchanged, amateur - expert has the other sign, and the run trains what looks least like trusted text; of one model
twice it is 0 everywhere, and the run trains the first examples by number; of two losses it is of no meaning. Files of
before say less: what is not known is not refused, and said once where it can do harm.

Cost: nothing is read but what is open already.
"""

import logging
import os

from titan_attent.scores.reference import AMATEUR, EXPERT, OF_IMAGES, ReferenceLosses

TRUSTED = "trusted"
"""In a folder of losses: the folder of the same model's losses on trusted held-out examples."""
KEYS = {"amateur": "amateur_path", "reference": "reference_path"}
WANTED = {"amateur": AMATEUR, "reference": EXPERT}

logger = logging.getLogger(__name__)


def check_scores(losses: dict[str, ReferenceLosses], *, learners_loss: str, compared: bool) -> None:
    """Refuse losses that are not what the run reads them as; ValueError with the key.

    Args:
        losses: "amateur" and "reference", those that the run reads, of its data.
        learners_loss: what the learner's own loss is called (``Scoring.loss``); empty where nobody said so.
        compared: whether the learner's own losses are compared with them.
    """
    if len(losses) == 2:
        _check_two_models(losses["amateur"], losses["reference"])
    for name, scores in losses.items():
        _check_role(scores, name)
        if compared:
            check_loss(scores, KEYS[name], learners_loss, "the learner's")
    if len(losses) == 2:
        amateur, expert = losses["amateur"], losses["reference"]
        check_loss(amateur, KEYS["amateur"], expert.loss, "that of reference_path")
        if not compared and not (amateur.role and expert.role):
            _warn(
                f"The losses in {_without_role(amateur, expert)} do not say whether an amateur or an expert made them. "
                f"Exchanged, the run would train what looks least like trusted text: amateur_path is read as of "
                f"{_who(amateur)}, reference_path as of {_who(expert)}. Score with `--role amateur` or `--role expert` "
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
                "both with torchrun -m titan_attent.scorers"
            )
    if trusted.scoring.data_fingerprint == data.scoring.data_fingerprint:
        raise ValueError(
            f"{trusted.path}: holds losses of the data itself, where those of trusted held-out text belong: nothing "
            "can be calibrated by them. Score trusted text there; torchrun -m titan_attent.scorers does"
        )


def check_loss(scores: ReferenceLosses, key: str, loss: str, whose: str) -> None:
    """Refuse the difference of two losses that are not measured alike."""
    here = scores.loss
    if here and loss and here != loss:
        raise ValueError(
            f"[teacher] {key} = {scores.path}: its losses are {here}, and {whose} is {loss}: their difference means "
            "nothing. Score again with the run's own values, or train with those that were scored"
        )
    if not (here and loss) and scores.scoring.model.startswith(OF_IMAGES):
        _warn(
            f"{scores.path} does not say which loss it holds (label smoothing, mask ratio and normalised patches "
            f"change every one), and it is subtracted from {whose}, {loss or 'unknown'}: an earlier version of this "
            "package wrote it. Score again, unless you know that they are equal"
        )


def _check_role(scores: ReferenceLosses, name: str) -> None:
    role, wanted = scores.role, WANTED[name]
    if role and role != wanted:
        other = KEYS["reference" if name == "amateur" else "amateur"]
        raise ValueError(
            f"[teacher] {KEYS[name]} = {scores.path}: holds the losses of the {role} ({_who(scores)}), where those of "
            f"the {wanted} belong. Are {KEYS[name]} and {other} exchanged? Name the folder of the {wanted} here"
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
            f"[teacher] amateur_path = {amateur.path} and reference_path = {expert.path} {same}: a model's difference "
            "to itself tells nothing of any example. Name the folders of two models; torchrun -m titan_attent.scorers "
            "makes both"
        )


def _without_role(*losses: ReferenceLosses) -> str:
    return " and ".join(str(scores.path) for scores in losses if not scores.role)


def _who(scores: ReferenceLosses) -> str:
    return f"{scores.scoring.model}, {scores.scoring.checkpoint}"


def _warn(text: str) -> None:
    """Once a run: this is called before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)
