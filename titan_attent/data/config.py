"""The TOML section ``[data]``: the folders of the data sets, and how they are read.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    path: str = ""
    """Folder of the data set, written by ``python -m titan_attent.data.text`` or ``titan_attent.data.images``."""

    validation_path: str = ""
    """Folder of the validation data set; read when ``validation.enable`` is set."""

    validation_sets: dict[str, Any] = field(default_factory=dict)
    """
    Several validation data sets instead of one, by name: ``NAME = { path = "FOLDER", weight = 1.0 }`` in the section
    ``[data.validation_sets]``. Each has a loss, a perplexity and bits per byte of its own; ``validation_metrics/loss``
    is their mean by the weights (docs/reference/validation.md).
    """

    sources: dict[str, Any] = field(default_factory=dict)
    """
    The mixture of the data's sources, in the section ``[data.sources]``, one word per source
    (docs/reference/mixtures.md).
    - ``NAME = { proportion = 0.5 }``: its share of the tokens of every step; ``[[STEP, SHARE], ...]`` for one that
      changes, linear between the steps.
    - ``NAME = { repeat = 2.0 }``: passes over it per epoch of the mixture.
    - ``NAME = { choose = 5_000_000 }``: its tokens per epoch of the mixture.
    Without the section all examples are trained in one shuffled order.
    """

    proportions_of: str = "trained"
    """
    What the proportions of ``[data.sources]`` are of, where a teacher selects.
    - "trained": of the tokens that are trained. The teacher selects within each source.
    - "candidates": of the tokens that the teacher selects from, among all sources: a source of which it leaves out more
      is trained less.
    """

    unit: str = "window"
    """
    What one example is, which the teacher selects, weights and scores.
    - "window": a window of ``training.seq_len`` tokens at a fixed place in the token stream, across documents.
    - "document": a span of at most ``training.seq_len`` tokens of one document. Several are packed into each window of
      a batch, and no example crosses documents. Needs a data set that knows its documents: every data set written
      since version 3 of the format does, and ``python -m titan_attent.data.text.boundaries DIR`` adds them to others.
    """

    validation_unit: str = ""
    """The same for the validation data; empty for ``unit``. Losses of different units do not compare."""

    packing: str = "best_fit"
    """
    How documents share windows, with ``unit = "document"``.
    - "best_fit": every document is in one window; about a hundredth of the tokens are padding.
    - "concatenate": for comparison: documents are joined in their shuffled order and cut at the ends of windows. The
      teacher then selects by scores on disk or at random only, since no window has the loss of a cut document.
    """

    max_examples_per_window: int = 0
    """
    The largest number of documents in a window, with ``unit = "document"``; 0 for a number that fills 99% of the tokens
    of most data. The batch has a slot for each, so a large number costs memory and exchange.
    """

    group_size: int = 1
    """
    Number m of neighbouring examples that are trained in one batch, such as the rows of ``python -m titan_attent.tasks
    recall --seeds m``, which have one input and m random seeds. Each row of a batch then holds one example. Needs
    ``unit = "document"``, documents of at most ``training.seq_len`` tokens, and a global batch that is a multiple of m.
    With ``exact_match`` validation takes a majority vote over each group (docs/reference/tasks.md). 1 for no groups.
    """

    num_workers: int = 2
    """Reader threads per rank, which read batches ahead of the step; 0 reads in the training loop itself."""

    seed: int = 0
    """Seed of the order of the examples. Equal seeds give equal orders, on any number of ranks."""

    document_mask: bool = False
    """
    Packed documents do not see each other: attention stays within an example, and positions restart at each one. Needs
    a flavor with flex or varlen attention. False: the flavor's own mask, in which a token sees the other documents of
    its row: no input of a packed row is an eos id, at which torchtitan's masks separate documents.
    """

    exact_match: bool = False
    """
    Log ``validation_metrics/exact_match``, the share of validation examples all of whose counted labels are the most
    likely token, also per data source, and ``token_accuracy``, the share of these labels. For data with a mask, such as
    those of ``python -m titan_attent.tasks``. Needs ``validation.enable`` and documents as the unit of validation.
    """

    verify_checksums: bool = False
    """
    Re-hash every shard before training; the ranks share the shards (about 1 GB/s per rank). Missing files
    and files of the wrong size are found without it.
    """
