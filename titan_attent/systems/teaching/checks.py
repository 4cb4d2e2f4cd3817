"""The teacher's checks before the run: of parallelisms, data and scores that it cannot work with.

Each check raises a ValueError that says what is wrong, where, and how to fix it. The checks in config_checks.py need
the section alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from titan_attent.data.examples import Examples
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.scores.find import find_scorers
from titan_attent.scores.provenance import TRUSTED, check_scores, check_trusted
from titan_attent.scores.stored import StoredScores
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, WORST_CASE, TeacherConfig
from titan_attent.systems.teaching.config_checks import SPAN, scorers_read
from titan_attent.systems.teaching.importance import reads

MIN_TRUSTED, MAX_TRUSTED = 32, 2**16
"""Smallest number of trusted held-out examples to calibrate by, and the largest number that is read."""

WITHOUT_FORWARD = ("ZBVZeroBubble", "DualPipeV")
"""Pipeline schedules that torch cannot run without a backward pass."""


class ScoredRun(Protocol):
    """The part of :class:`~titan_attent.systems.system.DataFacts` that is read here."""

    @property
    def dataset(self) -> Examples: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def open_scores(self) -> Callable[[str], StoredScores]: ...

    @property
    def loss(self) -> str: ...


def check_run(config: TeacherConfig, settings: RunSettings) -> None:
    """Refuse settings of the run that the teacher cannot work with."""
    batch, cp, tp = settings.local_batch_size, settings.degrees.context, settings.degrees.tensor
    if cp > 1 and config.weighting in ("loss", WORST_CASE):
        raise ValueError(
            f'[teacher] weighting = "{config.weighting}" with context_parallel_degree = {cp}: within the step a rank '
            'has the loss of only its shard of each example. Use weighting = "inverse_probability", or '
            "context_parallel_degree = 1"
        )
    if config.weighting == WORST_CASE:
        check_worst_case(settings)
    if settings.cuts_examples:
        check_cut_examples(config)
    if settings.vocab_parallel and config.loss_chunks > 1:
        raise ValueError(
            f"[teacher] loss_chunks = {config.loss_chunks} with tensor_parallel_degree = {tp}, which already shards "
            "the logits along the vocabulary. Set loss_chunks to 1, or parallelism.disable_loss_parallel to true"
        )
    if settings.degrees.pipeline == 1 or not config.scores_forward:
        return
    if (schedule := settings.pipeline_schedule) in WITHOUT_FORWARD:
        raise ValueError(
            f'[teacher] scoring = "{config.scoring}" with pipeline_parallel_schedule = "{schedule}": scoring has no '
            "backward pass, and torch cannot run this schedule without one. Set teacher.scoring = "
            '"train", or use "Interleaved1F1B"'
        )
    if config.scoring_batch_size not in (0, batch):
        raise ValueError(
            f"[teacher] scoring_batch_size = {config.scoring_batch_size} differs from training.local_batch_size = "
            f"{batch}: pipeline stages exchange tensors of one shape. Make the two sizes equal"
        )


def check_worst_case(settings: RunSettings) -> None:
    """Refuse what a q-norm over the inputs of a step cannot be computed with."""
    weighting, m = f'[teacher] weighting = "{WORST_CASE}"', settings.group_size
    if settings.local_batch_size % m:
        raise ValueError(
            f"{weighting} with training.local_batch_size = {settings.local_batch_size} and data.group_size = {m}: the "
            f"weight of an input is computed from all its rows at once. Make local_batch_size a multiple of {m}"
        )
    if settings.degrees.pipeline > 1:
        raise ValueError(
            f"{weighting} with pipeline_parallel_degree = {settings.degrees.pipeline}: the last stage alone knows the "
            "losses that the gradients of all stages are scaled by. Set it to 1"
        )
    if settings.steps_in_backward:
        raise ValueError(
            f"{weighting} with optimizer.early_step_in_backward = true: the gradient is scaled by the losses of the "
            "whole batch, after the last backward. Set it to false"
        )
    if settings.cuts_examples:
        raise ValueError(
            f'{weighting} with data.packing = "concatenate": no window has the loss of a document that it cuts. Set '
            'data.packing = "best_fit"'
        )


def check_cut_examples(config: TeacherConfig) -> None:
    """Refuse rules that read the learner's losses of examples, where windows cut examples."""
    is_random = config.strategy == "random" and config.ratio_schedule not in DECIDED_BY_SCORES
    if config.strategy == "uniform" or is_random or not config.follows_learner:
        return
    raise ValueError(
        f'[teacher] strategy = "{config.strategy}" with importance = "{config.importance}" and scoring = '
        f'"{config.scoring}" reads the learner\'s losses of examples, and with data.packing = "concatenate" no window '
        'has the loss of a document that it cuts. Select by scores on disk (strategy = "difference"), or set '
        'data.packing = "best_fit"'
    )


def check_data(config: TeacherConfig, facts: ScoredRun) -> None:
    """Refuse a data set or a pool of the wrong size, and scores of other data."""
    dataset = facts.dataset
    if isinstance(dataset, DocumentDataset):
        _check_documents(config)
    else:
        check_sizes(config, num_examples=len(dataset), batch_size=facts.batch_size)
    paths = folders_of_scores(config, facts)
    scores = {name: facts.open_scores(path) for name, path in paths.items()}
    for losses in scores.values():
        losses.check(dataset.scored)
    check_scores(scores, learners_loss=facts.loss, compared="loss" in reads(config.importance))
    if needs_trusted(config):
        for name, losses in scores.items():
            check_trusted(losses, facts.open_scores(str(Path(paths[name]) / TRUSTED)))
        trusted_differences(config, facts)


def _check_documents(config: TeacherConfig) -> None:
    """Refuse what the teacher cannot do where documents are the unit."""
    if config.pool_size:
        raise ValueError(
            f'[teacher] pool_size = {config.pool_size} with data.unit = "document": windows are packed from a pass '
            "over all documents. Set pool_size = 0"
        )


def folders_of_scores(config: TeacherConfig, facts: ScoredRun) -> dict[str, str]:
    """The folders of scores that a run reads: "expert", "amateur" -> folder. A uniform run reads none.

    Raises:
        ValueError: ``config.scores`` holds no scores, or not those of a scorer that the rule needs.
    """
    usable = scorers_read(config) if config.scores else set()
    if not usable:
        return {}
    folders = find_scorers(config.scores, open_scores=facts.open_scores)
    needed = {"expert", "amateur"} & reads(config.importance) | ({"amateur"} if config.scoring == "amateur" else set())
    if missing := sorted(needed - folders.keys()):
        key = "importance" if missing[0] in reads(config.importance) else "scoring"
        raise ValueError(
            f"[teacher] scores = {config.scores}: holds only the losses of the {' and the '.join(folders)}, and "
            f'{key} = "{getattr(config, key)}" needs those of the {" and the ".join(missing)}. Name the folder that '
            "torchrun -m titan_attent.score pair wrote, which holds both"
        )
    if not usable & folders.keys():
        raise ValueError(
            f"[teacher] scores = {config.scores}: holds the losses of the {' and the '.join(folders)}, which "
            f'importance = "{config.importance}" does not read. Name the folder of the '
            f"{' or the '.join(sorted(usable))}, or remove scores"
        )
    return {role: str(folders[role]) for role in sorted(usable & folders.keys())}


def needs_trusted(config: TeacherConfig) -> bool:
    """Whether a run compares its data with trusted text."""
    return config.ratio_schedule == "calibrated" and config.strategy != "uniform"


def trusted_differences(config: TeacherConfig, facts: ScoredRun) -> list[float]:
    """amateur's - expert's loss of the trusted held-out examples, the first ``MAX_TRUSTED`` of them.

    Raises:
        ValueError: the two hold losses of different examples, or of fewer than ``MIN_TRUSTED``.
    """
    folders = folders_of_scores(config, facts)
    amateur, expert = (facts.open_scores(str(Path(folders[role]) / TRUSTED)) for role in ("amateur", "expert"))
    amateur_data, expert_data = ((each.scoring.data_fingerprint, each.scoring.seq_len) for each in (amateur, expert))
    if amateur_data != expert_data:
        raise ValueError(
            f"{amateur.path} and {expert.path} hold losses of different examples: score the same trusted held-out data "
            "with both models, as torchrun -m titan_attent.score pair does"
        )
    num = min(amateur.scoring.num_examples, MAX_TRUSTED)
    if num < MIN_TRUSTED:
        raise ValueError(
            f"{amateur.path}: {num} trusted held-out examples are too few to calibrate by: score at least {MIN_TRUSTED}"
        )
    return (amateur.read(0, num) - expert.read(0, num)).tolist()


def check_sizes(config: TeacherConfig, *, num_examples: int, batch_size: int) -> None:
    """Refuse a data set smaller than a batch, and a pool smaller than a batch or larger than the data set."""
    if batch_size > num_examples:
        raise ValueError(
            f"the data set has {num_examples} examples, fewer than one global batch of {batch_size}: "
            "write more data, or lower training.global_batch_size or training.seq_len"
        )
    if config.pool_size and not batch_size <= config.pool_size <= num_examples:
        raise ValueError(
            f"[teacher] pool_size = {config.pool_size} must be between one global batch ({batch_size}) and the data "
            f"set ({num_examples} examples), or 0 for the whole data set"
        )


def check_inputs(
    config: TeacherConfig,
    *,
    score: object,
    expert: object,
    amateur: object,
    trusted: object,
    chance_loss: object,
    window: object,
) -> None:
    """Refuse a teacher without an input that its configuration reads; None is a missing input."""
    if config.weighs_worst_case:
        raise ValueError(
            f'weighting = "{WORST_CASE}" with a Teacher, which gives weights before a step knows its losses: set '
            'weighting = "none", and scale the gradient with WorstCase of titan_attent.losses.worst_case'
        )
    if config.strategy == "uniform":
        return
    if config.level == SPAN:
        raise ValueError(
            f'level = "{SPAN}" with a Teacher, which selects examples: set level = "example", or mask the labels of '
            "each batch with SpanMasker of titan_attent.systems.teaching.spans"
        )
    needed = reads(config.importance)
    if config.scores_forward and score is None:
        raise ValueError(f'scoring = "{config.scoring}" needs a forward pass: give the teacher `score`')
    if "expert" in needed and expert is None:
        raise ValueError(f'importance = "{config.importance}" needs an expert\'s losses: give them as `expert`')
    if ("amateur" in needed or config.scoring == "amateur") and amateur is None:
        key = "importance" if "amateur" in needed else "scoring"
        raise ValueError(f'{key} = "{getattr(config, key)}" needs an amateur\'s losses: give them as `amateur`')
    if config.ratio_schedule == "calibrated" and not trusted:
        raise ValueError(
            'ratio_schedule = "calibrated" compares with trusted text: give the cross-entropy differences of trusted '
            "examples as `trusted`"
        )
    if "chance_loss" in needed and chance_loss is None:
        raise ValueError(f'importance = "{config.importance}" compares with a uniform guess: give `chance_loss`')
    if config.weighting == "loss" and window is None:
        raise ValueError('weighting = "loss" needs recent losses: give the buffer a LossWindow')
    for name, losses in (("expert", expert), ("amateur", amateur), ("trusted", trusted)):
        values = None if losses is None else torch.as_tensor(losses)
        if values is not None and (num_bad := int((~torch.isfinite(values)).sum())):
            raise ValueError(
                f"{num_bad} of the {len(values)} numbers in `{name}` are not finite, and examples with NaN would be "
                "selected first: score these examples again, or leave them out of the data"
            )
