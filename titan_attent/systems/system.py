"""The seam: how a system takes part in the steps of a run.

The example teacher is a system; so is whatever else changes how a step learns. The trainer (titan/trainer.py) knows no
system by name. It makes those that the TOML turns on, in the order of system_list.py, and calls them:

    before the run           check_values           refusals, of a system that is off, too
                             check, check_data      refusals; no process group yet, nothing is built
                             identity               what a checkpoint and the run that resumes it must share
    once the ranks can talk  __init__(run, config)
                             wrap_schedule          of a pipeline
    an initial checkpoint    weights_to_load        which weights a run takes from checkpoint.initial_load_path
    before the first step    set_initial_weights    of a run that starts anew
                             before_first_step
    a batch is read          read_columns           columns beside the tokens; in reader threads
    a microbatch             wrap_loss              what is differentiated, and what is seen of each example
                             around_backward
                             after_microbatch
    a step                   after_step
    no training step         paused                 saving, validating, a forward pass for scores
    a logged step            metrics
    a checkpoint             state_dict, load_state_dict
    the end                  close
    the report               panels, tag_units

A method that is not overridden does nothing. Where no system changes the loss, the step is torchtitan's own code.

Cost: none of its own. What runs between the first forward and the optimizer's step (``wrap_loss``, ``around_backward``,
``after_microbatch``) must neither wait for the device nor have a shape that depends on values. Shapes: B examples of a
microbatch, L tokens of an example.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.foundations.ledger import Ledger, LedgerAccount
from titan_attent.scores.reference import ReferenceLosses
from titan_attent.systems.settings import RunSettings

Columns = dict[str, Tensor]
"""What is known of the examples of a microbatch, each [B, ...]: ``example_id``, and what data and systems add. Under a
pipeline their dtypes are integers, bool, or floats of 16, 32 or 64 bits."""


@dataclass(frozen=True)
class Batch:
    """A microbatch as the systems see it.

    Attributes:
        inputs: what the model reads: token ids int64 [B, L], or images; with context parallelism this rank's part.
        labels: int64 [B, L].
        columns: by name.
    """

    inputs: Tensor
    labels: Tensor
    columns: Columns

    @property
    def examples(self) -> Tensor:
        """The example ids, int64 [B]."""
        return self.columns["example_id"]


ExampleStats = dict[str, Tensor]
"""What a loss saw of the examples of a microbatch, each [B], detached."""


class StepLoss(NamedTuple):
    """The loss of a microbatch.

    Attributes:
        to_differentiate: fp32 scalar, a sum over the valid tokens; the trainer divides it by the number of valid tokens
        of the global batch.
        logged: fp32 scalar, detached: the unweighted sum of nats, so that runs compare.
        seen: by name; empty for torchtitan's own loss.
    """

    to_differentiate: Tensor
    logged: Tensor
    seen: ExampleStats


LossFunction = Callable[[Tensor, Batch], StepLoss]
"""Of logits as the parallelism leaves them, and the microbatch that they are of."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of a run once its data were opened, before its first process group.

    Attributes:
        dataset: the training examples.
        batch_size: examples of a global batch.
        open_reference: a folder -> the reference losses in it, opened once a run; ValueError if there are none.
        settings: of the run.
        check_frozen: a checkpoint, ``family=``, ``flavor=``; ValueError if :attr:`Run.build_frozen` could not take it.
        loss: what the learner's loss is called, with what changes its value (scores/reference.py).
    """

    dataset: Examples
    batch_size: int
    open_reference: Callable[[str], ReferenceLosses]
    settings: RunSettings
    check_frozen: Callable[..., Any]
    loss: str = ""


@dataclass(frozen=True, kw_only=True)
class Run(DataFacts):
    """What a system may use of the run that it takes part in.

    Attributes:
        device: of the model.
        mesh: the one-dimensional mesh of a name of torchtitan's ("batch", "cp", "tp", "pp", ...), or None where that
            dimension has one rank only.
        rank, num_ranks, microbatches: place in the ``batch`` mesh; gradient accumulation steps.
        replica_sources: (mesh, rank) of each mesh dimension whose ranks train the same examples, that is, of those
            other than ``batch``. The losses of that local rank count; under a pipeline, the rank of the last stage.
        ledger, reader: where the time of the training thread goes; the reader threads.
        step: the number of the training step under way, or done last.
        served: (pass, global batch in it) whose examples the loader handed out last.
        forward: batches and a loss -> each batch and what the loss saw of it, from a forward pass in
            eval mode without gradients. None was seen on pipeline stages before the last. A collective.
        model_parts: this rank's, as they are trained: parallelised, and compiled where the run compiles.
        build_example_loss: what measures a loss of every example, by the names of losses/build.py.
        build_frozen: a checkpoint, ``family=`` and ``flavor=`` (the learner's by default) -> a second model, frozen and
            sharded as the learner is: inputs -> logits, called in :meth:`System.wrap_loss`. None on pipeline stages
            before the last. A checkpoint of another model ends the run. A collective.
        predict: inputs and labels, int64 [B, L] -> (logits, labels) of a forward pass in train mode, to be
            differentiated inside the context. Not under a pipeline. A collective.
    """

    device: torch.device
    mesh: Callable[[str], DeviceMesh | None]
    rank: int
    num_ranks: int
    microbatches: int
    replica_sources: Sequence[tuple[DeviceMesh, int]]
    ledger: Ledger
    reader: Reader
    step: Callable[[], int]
    served: Callable[[], Any]
    forward: Callable[[Iterable[ReadBatch], LossFunction], Iterator[tuple[Batch, ExampleStats | None]]]
    model_parts: Sequence[nn.Module]
    build_example_loss: Callable[..., Any]
    build_frozen: Callable[..., Callable[[Tensor], Tensor] | None]
    predict: Callable[[Tensor, Tensor], AbstractContextManager[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Panel:
    """A panel of the report's picture: scalars of a system against the steps.

    Attributes:
        title: above it.
        tags: drawn as a line each, at most three; none for a ``family``.
        labels: tag -> its name in the legend, where the tag's last part will not do.
        right: the tag among them that gets an axis of its own at the right.
        family: prefix of tags of which there are as many as the data have sources: a line each, of the most and of
            the least; with several runs bars of their means.
        shares: the axis goes from 0 to 1.
        from_zero: the axis starts at 0.
        counts: the axis has whole numbers only.
        when_not_zero: the panel is left out while all values are 0.
        map: a ``family`` is drawn as a map, a row a member and a column per step; of several runs the last one's.
    """

    title: str
    tags: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    right: str | None = None
    family: str | None = None
    shares: bool = False
    from_zero: bool = False
    counts: bool = False
    when_not_zero: bool = False
    map: bool = False


class System:
    """A part of a run that takes part in its steps; to be derived from, and named in system_list.py.

    Class attributes:
        name: its section in the TOML, its key in the checkpoint, and the beginning of its scalars' tags.
        former_name: of a system of this package: what ``name`` was in earlier versions, whose checkpoints and logs are
            read under it.
        columns: names of the columns that the loader or :meth:`read_columns` adds for it.
        needs: what the learner's family must be able to do, as "tokens"; a run of another family is refused.
        off: the key and value of its section that turn it off, for that refusal.
        keeps_state: whether it has a state in the checkpoint. A checkpoint without it is refused.
        comes_last: whether it is called after all that do not say so, those from outside included.
        accounts: of the ledger, that it charges.
        panels: of the report.
        tag_units: tag -> "share" (shown as a percentage), or a word that follows the number. Tags that end in
            ``_seconds``, ``_percent`` or ``_share`` need none.

    Args:
        run: what it may use.
        config: its section.

    Attributes:
        sampler: decides which examples are trained, instead of the plan of the data; at most one system has one.
    """

    name: ClassVar[str]
    former_name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    off: ClassVar[str] = ""
    keeps_state: ClassVar[bool] = False
    comes_last: ClassVar[bool] = False
    accounts: ClassVar[tuple[LedgerAccount, ...]] = ()
    panels: ClassVar[tuple[Panel, ...]] = ()
    tag_units: ClassVar[Mapping[str, str]] = {}

    sampler: TeachingSampler | None = None

    # -- before the run: the same on every rank -------------------------------------------------------------------

    @classmethod
    def is_on(cls, config: Any) -> bool:
        """Whether its section turns it on."""
        raise NotImplementedError

    @classmethod
    def check_values(cls, config: Any) -> None:
        """Raise a ValueError for values of its section that it could not work with, whether it is on or not."""

    @classmethod
    def check(cls, config: Any, settings: RunSettings) -> None:
        """Raise a ValueError (what, where, the fix) for values, or parallelisms, that it cannot work with."""

    @classmethod
    def check_data(cls, config: Any, facts: DataFacts) -> None:
        """The same for data that it cannot work with. Opens small files only."""

    @classmethod
    def identity(cls, config: Any, settings: RunSettings) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must share: a name for people -> a JSON value."""
        return {}

    # -- in the run, on all ranks ---------------------------------------------------------------------------------

    def __init__(self, run: Run, config: Any):
        self.run, self.config = run, config

    def folders_read(self) -> Sequence[str]:
        """Folders of losses on disk that it reads; the report counts what making them took."""
        return ()

    def weights_to_load(self, path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's ``weights`` that the run takes from the initial checkpoint ``path``; the others stay as
        they were initialised. Not called on a resume. ValueError if the checkpoint does not fit."""
        return weights

    def set_initial_weights(self) -> None:
        """Called once in a run that starts at step 0, after its weights were initialised or loaded: the place to
        change them. Not called on a resume."""

    def before_first_step(self) -> None:
        """Called once, after a checkpoint was loaded and before the first step."""

    def read_columns(self, example_ids: Tensor) -> Columns:
        """Its columns of some examples, int64 [B]; called in reader threads, ahead of the step."""
        return {}

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        """The loss of this system, around or instead of ``loss``, which the systems before it have made. Called
        once."""
        return loss

    def wrap_schedule(self, schedule: Any) -> Any:
        """What runs a step's microbatches under a pipeline, instead of torch's ``schedule``. Called once."""
        return schedule

    def around_backward(self) -> AbstractContextManager[Any]:
        """Entered for the backward of each microbatch; for its forward, too, where one call runs both: torchtitan's
        own step, and pipelines."""
        return nullcontext()

    def after_microbatch(self, batch: Batch, seen: ExampleStats | None) -> None:
        """After the backward of a microbatch. None was seen on pipeline stages before the last."""

    def after_step(self) -> None:
        """After every training step; the one place where a system may talk to other ranks."""

    def paused(self) -> AbstractContextManager[Any]:
        """Entered, on all ranks, for what is not a training step: saving a checkpoint, validating, and
        :attr:`Run.forward`."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """Host numbers to log, their tags beginning with ``<name>/``; no collective and no device sync."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to go on, on any number of ranks. A collective, if it must be one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a state, before :meth:`before_first_step`."""

    def close(self) -> None:
        """The run ends."""
