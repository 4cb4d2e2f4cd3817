"""The interface between the trainer and the systems that take part in the steps of a run.

A system changes how a step learns; the example teacher is one. The trainer (titan/trainer.py) names no system. It
creates the systems that the TOML turns on, in the order of system_list.py, and calls their methods:

    before the run           check_values           config errors, also for systems that are off
                             check, check_data      config and data errors; no process group or model exists yet
                             plan                   what it will do, for --check
                             identity               settings that a checkpoint and the run resuming it must share
    process group is up      __init__(run, config)
                             wrap_schedule          with pipeline parallelism only
    initial checkpoint       weights_to_load        the weights to load from checkpoint.initial_load_path
    before the first step    set_initial_weights    not on a resume
                             before_first_step
    each batch read          read_columns           extra columns of the batch; in reader threads
                             read_columns_of_step   the same, where they depend on the step
                             mark_labels            labels whose loss is masked; in reader threads
    each microbatch          wrap_loss              the loss to differentiate, and statistics of each example
                             around_backward
                             after_microbatch
    each step                after_step
    outside training steps   paused                 saving, validating, a forward pass for scores
    each logged step         metrics
    each checkpoint          state_dict, load_state_dict
    end of the run           close
    the report               panels, tag_units

A method that is not overridden does nothing. If no system changes the loss, the step is torchtitan's own code.

Cost: none by itself. ``wrap_loss``, ``around_backward`` and ``after_microbatch`` run between the first forward and the
optimizer step. They must not wait for the device, and their shapes must not depend on tensor values.

Shapes: B examples per microbatch, L tokens per example.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.forward_rows import ForwardRows
from titan_attent.data.plan.mixture import Mixture
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.foundations.ledger import Ledger, LedgerAccount
from titan_attent.scores.stored import StoredScores
from titan_attent.systems.settings import RunSettings

Columns = dict[str, Tensor]
"""Name -> values of the examples of a microbatch, [B, ...]: ``example_id``, and columns that data and systems add.
Under pipeline parallelism their dtypes are integers, bool, or floats of 16, 32 or 64 bits."""


@dataclass(frozen=True)
class Batch:
    """A microbatch as passed to the systems.

    Attributes:
        inputs: the model's input: token ids int64 [B, L], or images; under context parallelism this rank's shard.
        labels: int64 [B, L].
        columns: further values of each example, by name.
    """

    inputs: Tensor
    labels: Tensor
    columns: Columns

    @property
    def examples(self) -> Tensor:
        """The example ids, int64 [B]."""
        return self.columns["example_id"]


ExampleStats = dict[str, Tensor]
"""Name -> one statistic of each example of a microbatch, computed by the loss: [B], detached. A loss that weights
examples adds "weight", so that what other systems add to the loss of an example can have the same weight."""


class StepLoss(NamedTuple):
    """The loss of a microbatch.

    Attributes:
        to_differentiate: fp32 scalar, a sum over the valid tokens. The trainer divides it by the number of valid tokens
            of the global batch.
        logged: fp32 scalar, detached: the unweighted sum in nats, so that runs are comparable.
        stats: statistics of the examples by name; empty for torchtitan's own loss.
    """

    to_differentiate: Tensor
    logged: Tensor
    stats: ExampleStats


LossFunction = Callable[[Tensor, Batch], StepLoss]
"""The loss from logits (sharded as the parallelism leaves them) and their microbatch."""


class Frozen(Protocol):
    """A frozen second model, sharded like the learner.

    Attributes:
        model: the model itself.
    """

    model: nn.Module

    def __call__(self, inputs: Tensor, example_index: Tensor | None = None) -> Tensor:
        """The logits of ``inputs``, int64 [B, L], in eval mode, without a graph. ``example_index``: the column of that
        name, if there is one. A collective of the ranks that hold the model."""

    def load(self, checkpoint: str) -> None:
        """Replace the weights, in place, by those of another checkpoint of the same model. Each rank reads its own."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Facts about a run that are available once its data are opened, before its first process group.

    Attributes:
        dataset: the training examples.
        batch_size: examples per global batch.
        open_scores: folder -> the reference losses in it, opened once per run; ValueError if it holds none.
        settings: the settings of the run.
        check_frozen: takes a checkpoint, ``family=``, ``flavor=``; ValueError if :attr:`Run.build_frozen` would refuse
            them, and with ``num_ids=`` if the model has another number of token ids.
        proportions: source -> its mean share of the tokens of the run, where a mixture lets a teacher select within
            each source; None otherwise.
        loss: the name of the learner's loss, with the settings that change its value (scores/stored.py).
        num_ids: token ids of the learner's model; 0 if its examples are no tokens.
    """

    dataset: Examples
    batch_size: int
    open_scores: Callable[[str], StoredScores]
    settings: RunSettings
    check_frozen: Callable[..., Any]
    proportions: Mapping[str, float] | None = None
    loss: str = ""
    num_ids: int = 0


class PlannedFrozen(NamedTuple):
    """A frozen second model that a run will hold; the arguments of :attr:`Run.build_frozen`."""

    checkpoint: str
    family: str
    flavor: str


class Planned(NamedTuple):
    """What a system adds to a run, for the plan that ``titan_attent.train --check`` prints.

    Attributes:
        lines: what it will do, one sentence each.
        bytes_per_rank: memory that it holds on each rank beside the model's; a checkpoint saves it.
        files: files that it writes, relative to the dump folder.
        memory: (part, bytes, how it was computed) of memory on each rank that no checkpoint saves.
        frozen: the frozen second model that it runs; the plan adds its memory.
    """

    lines: tuple[str, ...] = ()
    bytes_per_rank: int = 0
    files: tuple[str, ...] = ()
    memory: tuple[tuple[str, int, str], ...] = ()
    frozen: PlannedFrozen | None = None


@dataclass(frozen=True, kw_only=True)
class Run(DataFacts):
    """The parts of a run that its systems may use.

    Attributes:
        device: device of the model.
        mesh: torchtitan's name of a mesh dimension ("batch", "cp", "tp", "pp", ...) -> its one-dimensional mesh; None
            if that dimension has a single rank.
        rank, num_ranks: this rank's index in the ``batch`` mesh, and the size of that mesh.
        microbatches: gradient accumulation steps.
        replica_sources: (mesh, local rank) of each mesh dimension other than ``batch``. The ranks of such a mesh train
            the same examples; the statistics of that local rank count. In a pipeline it is the rank of the last stage.
        packer: packs several examples into each row of a batch, whose ids are [B, M] then; None where a row is one
            example.
        mixture: decides which of the selected examples a batch trains, for the system's sampler; None without
            ``[data.sources]``.
        forward_rows: lays out documents in the rows of forward passes; None where a row is one example.
        ledger: accounts for the time of the training thread.
        reader: the reader threads.
        step: the number of the current training step, or of the last one between steps.
        served: (pass, global batch within it) of the batch that the loader returned last.
        num_labels: number of labels with a loss in the global batch of the current step, on all ranks; a host sync if
            the run is not data-parallel. 0 before the first step.
        forward: batches and a loss -> each batch and its statistics, from a forward pass in eval mode without
            gradients. The statistics are None on pipeline stages before the last. A collective.
        model_parts: this rank's model parts as they are trained: parallelised, and compiled if the run compiles.
        build_example_loss: builds a loss that measures every example, by the names of losses/build.py.
        build_frozen: a checkpoint, ``family=`` and ``flavor=`` (the learner's by default) -> a frozen second model that
            is sharded like the learner (:class:`Frozen`). It is called in :meth:`System.wrap_loss`. None on pipeline
            stages before the last. A checkpoint of another model ends the run. A collective.
        load_frozen: that model, or None, and another checkpoint of it -> its weights are replaced in place. One that
            cannot be read, or holds NaN or infinity, ends the run. A collective.
        log_text: takes a tag and a function that returns Markdown, and writes it to TensorBoard. It calls the function
            only on ranks that log. None, on every rank, if the run has no TensorBoard.
        predict: inputs and labels, int64 [B, L] -> context of (logits, labels) from a forward pass in train mode. The
            backward must run inside the context. Not available with pipeline parallelism. A collective.
    """

    device: torch.device
    mesh: Callable[[str], DeviceMesh | None]
    rank: int
    num_ranks: int
    microbatches: int
    replica_sources: Sequence[tuple[DeviceMesh, int]]
    packer: Packer | None
    mixture: Mixture | None
    forward_rows: ForwardRows | None
    ledger: Ledger
    reader: Reader
    step: Callable[[], int]
    served: Callable[[], Any]
    num_labels: Callable[[], int]
    forward: Callable[[Iterable[ReadBatch], LossFunction], Iterator[tuple[Batch, ExampleStats | None]]]
    model_parts: Sequence[nn.Module]
    build_example_loss: Callable[..., Any]
    build_frozen: Callable[..., Frozen | None]
    load_frozen: Callable[[Frozen | None, str], None]
    log_text: Callable[[str, Callable[[], str]], None] | None
    predict: Callable[[Tensor, Tensor], AbstractContextManager[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Panel:
    """A panel of the report's picture: scalars of a system, plotted against the steps.

    Attributes:
        title: title above the panel.
        tags: scalars to plot, one line per tag, at most three; empty with a ``family``.
        labels: (tag, its name in the legend), where the last part of the tag is not clear enough.
        right: the tag among ``tags`` that gets its own axis on the right.
        family: common prefix of any number of tags, such as one per data source. The largest and the smallest get one
            line per tag; with several runs their means are drawn as bars.
        shares: whether the axis goes from 0 to 1.
        from_zero: whether the axis starts at 0.
        counts: whether the axis has whole numbers only.
        when_not_zero: whether the panel is left out while all values are 0.
        map: whether a ``family`` is drawn as a map, one row per tag and one column per step; of several runs, the last.
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
    """Base class of all systems. A subclass of this package is listed in system_list.py.

    Class attributes:
        name: name of the TOML section, key in the checkpoint, and prefix of the scalars' tags.
        former_name: the ``name`` in earlier versions, whose checkpoints and logs are read under it. For systems of this
            package only.
        former_keys: key of the section in earlier versions -> the message that names its successor.
        columns: names of the batch columns that the loader or :meth:`read_columns` adds for the system.
        token_columns: those of ``columns`` that have a row per token, [B, L, ...]. With context parallelism, they are
            cut like the labels; the others are whole on every rank.
        needs: capabilities that the learner's family must have, such as "tokens"; a run without them is refused.
        off: the key and value that turn the system off, for the message of that refusal.
        keeps_state: whether the system has state in the checkpoint. A checkpoint without it is then refused.
        comes_last: whether the system is called after all systems where this is False, external ones included.
        accounts: accounts of the ledger that the system charges.
        panels: panels in the report.
        tag_units: tag -> "share" (shown as a percentage), or a unit to print after the number. Tags that end in
            ``_seconds``, ``_percent`` or ``_share`` need none.

    Args:
        run: the parts of the run that the system may use.
        config: the system's TOML section.

    Attributes:
        sampler: selects the examples to train on, instead of the data's own plan. At most one system may have one.
    """

    name: ClassVar[str]
    former_name: ClassVar[str] = ""
    former_keys: ClassVar[Mapping[str, str]] = {}
    columns: ClassVar[tuple[str, ...]] = ()
    token_columns: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    off: ClassVar[str] = ""
    keeps_state: ClassVar[bool] = False
    comes_last: ClassVar[bool] = False
    accounts: ClassVar[tuple[LedgerAccount, ...]] = ()
    panels: ClassVar[tuple[Panel, ...]] = ()
    tag_units: ClassVar[Mapping[str, str]] = {}

    sampler: TeachingSampler | None = None

    # -- before the run; same result on every rank ----------------------------------------------------------------

    @classmethod
    def is_on(cls, config: Any) -> bool:
        """Whether the section turns the system on."""
        raise NotImplementedError

    @classmethod
    def check_values(cls, config: Any) -> None:
        """Raise a ValueError for invalid values in the section, whether the system is on or off."""

    @classmethod
    def check_given(cls, config: Any, given: Collection[str]) -> None:
        """Raise a ValueError for a key of its section that a TOML file or the command line names and nothing reads.

        Args:
            given: the names of the keys that they name, a default's value included.
        """

    @classmethod
    def check(cls, config: Any, settings: RunSettings) -> None:
        """Raise a ValueError (what is wrong, where, how to fix it) for values or parallelisms that are unsupported."""

    @classmethod
    def check_data(cls, config: Any, facts: DataFacts) -> None:
        """Raise a ValueError for data that the system cannot work with. Opens small files only."""

    @classmethod
    def identity(cls, config: Any, settings: RunSettings) -> dict[str, Any]:
        """The settings that a checkpoint and the run resuming it must share: readable name -> JSON value."""
        return {}

    @classmethod
    def plan(cls, config: Any, facts: DataFacts, *, num_ranks: int) -> Planned:
        """What the system will do in the run, for ``--check``; called after all checks, in one process.

        Args:
            num_ranks: size of the ``batch`` mesh.
        """
        return Planned()

    # -- during the run, on all ranks -----------------------------------------------------------------------------

    def __init__(self, run: Run, config: Any):
        self.run, self.config = run, config

    def folders_read(self) -> Sequence[str]:
        """Folders of stored losses that the system reads. The report counts the cost of computing them."""
        return ()

    def weights_to_load(self, path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Select those of the model's ``weights`` to load from the initial checkpoint ``path``.

        The other weights keep their initialisation. Not called on a resume. ValueError if the checkpoint does not fit.
        """
        return weights

    def set_initial_weights(self) -> None:
        """Change the initial weights. Called once, after they were initialised or loaded; not called on a resume."""

    def before_first_step(self) -> None:
        """Called once, before the first step; on a resume, after the checkpoint was loaded."""

    def read_columns(self, example_ids: Tensor) -> Columns:
        """The system's columns for examples int64 [B]. Called in reader threads, ahead of the step."""
        return {}

    def read_columns_of_step(self, example_ids: Tensor, step: int, *, skipped: Tensor | None = None) -> Columns:
        """:meth:`read_columns` for columns that depend on the step that will train the examples.

        Args:
            example_ids: int64 [B], or [B, M] of packed rows.
            step: the number of that step.
            skipped: int64 [B], where packed rows cut examples: tokens of each row's first example that are in the row
                before; None where every example is whole.
        """
        return {}

    def mark_labels(self, example_ids: Tensor, inputs: Columns, labels: Tensor) -> Tensor:
        """Return the labels to train on: int64 [B, L], with ``IGNORE_INDEX`` where the loss is masked.

        Called in reader threads, ahead of the step, on batches for training alone. ``labels`` may be changed in place.

        Args:
            example_ids: int64 [B], or [B, M] of packed rows.
            inputs: the tensors that the data set has read, by name: for text "input", int64 [B, L].
            labels: int64 [B, L].
        """
        return labels

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        """Return a loss that wraps or replaces ``loss``, the loss of the systems before this one. Called once."""
        return loss

    def wrap_schedule(self, schedule: Any) -> Any:
        """Return the pipeline schedule to use instead of torch's ``schedule``. Called once."""
        return schedule

    def around_backward(self) -> AbstractContextManager[Any]:
        """Return a context that is entered for the backward of each microbatch.

        It includes the forward where one call runs both: in torchtitan's own step and in pipelines.
        """
        return nullcontext()

    def after_microbatch(self, batch: Batch, stats: ExampleStats | None) -> None:
        """Called after the backward of a microbatch, in the last one of a step before the gradients are clipped.

        ``stats`` is None on pipeline stages before the last.
        """

    def after_step(self) -> None:
        """Called after every training step, on all ranks: the place for collectives that the loss does not need."""

    def paused(self) -> AbstractContextManager[Any]:
        """Return a context that is entered on all ranks outside training steps.

        That is, while a checkpoint is saved, for validation and for :attr:`Run.forward`.
        """
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """The scalars to log, with tags that begin with ``<name>/``. No collective and no device sync."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs, on any number of ranks. May be a collective."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load such a state. Called before :meth:`before_first_step`."""

    def close(self) -> None:
        """Release resources at the end of the run."""
