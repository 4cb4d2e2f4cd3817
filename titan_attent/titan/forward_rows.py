"""How a run reads documents in the forward passes that score and validate (data/plan/forward_rows.py).

With ``[data] document_mask`` documents are packed into rows of ``seq_len`` tokens, as in training, and each still has
the loss that it has alone. Without it, a document has a row for itself, of the shortest of a few lengths that holds it.
A compiled model is compiled once per length.

Cost: that of data/plan/forward_rows.py; the lengths come from the data set's histogram, without a read.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.train import Trainer

from titan_attent.data.examples import Examples
from titan_attent.data.plan.forward_rows import ForwardRows, row_lengths
from titan_attent.data.plan.packed import default_limit
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.titan.loader import sum_over

COMPILED_LENGTHS, EAGER_LENGTHS = 3, 8
"""Lengths of rows in forward passes, where each is one more compilation and where none is. torch gives up after 8
compilations of one function: three lengths for scoring, three for validation, one for training, and one to spare."""


def build_forward_rows(
    job_config: JobConfig,
    dataset: Examples,
    model_args: Any,
    *,
    dims: ParallelDims,
    device: torch.device,
    together: Sequence[DocumentDataset] = (),
) -> ForwardRows | None:
    """Build the layout of ``dataset`` in forward passes, which score or validate; None for one example per row.

    Documents are packed where the model masks them. Elsewhere their rows are short, except under pipeline parallelism,
    whose stages exchange tensors of one shape, and under context parallelism, which splits rows.

    Args:
        model_args: the arguments of the model that reads the rows.
        dims: the parallelism of the run.
        device: the device of its collectives.
        together: all data sets that are read in turn, ``dataset`` among them; they get the same lengths of rows, so
            that a compiled model is compiled for no more lengths than for one of them.
    """
    if not isinstance(dataset, DocumentDataset):
        return None
    packed = job_config.data.document_mask
    if not packed and (dims.pp_enabled or dims.cp_enabled):
        return None
    lengths: tuple[int, ...] = (dataset.seq_len,)
    limit = 0
    if packed:
        limit = job_config.data.max_examples_per_window or default_limit(dataset)
    else:
        compiles = job_config.compile.enable or getattr(model_args, "attn_type", "sdpa") != "sdpa"
        lengths = row_lengths(
            *_length_counts(together or (dataset,)),
            seq_len=dataset.seq_len,
            num=COMPILED_LENGTHS if compiles else EAGER_LENGTHS,
            multiple_of=math.lcm(8, dims.tp),
        )
    mesh = dims.get_optional_mesh("batch")
    return ForwardRows(
        dataset,
        lengths=lengths,
        max_examples=limit,
        rank=0 if mesh is None else mesh.get_local_rank(),
        num_ranks=1 if mesh is None else mesh.size(),
        add_up=partial(sum_over, mesh, device),
    )


def _length_counts(datasets: Sequence[DocumentDataset]) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the examples of all data sets, and their numbers; int64 [n] each."""
    lengths, counts = zip(*(dataset.length_counts() for dataset in datasets), strict=True)
    return np.concatenate(lengths), np.concatenate(counts)


def forward_rows_of(trainer: Trainer, dataset: Examples) -> ForwardRows | None:
    """The layout of ``dataset`` in the forward passes of a trainer's model, by :func:`build_forward_rows`."""
    return build_forward_rows(
        trainer.job_config, dataset, trainer.model_args, dims=trainer.parallel_dims, device=trainer.device
    )


def static_shapes(forward_rows: ForwardRows | None) -> AbstractContextManager[Any]:
    """A context for forward passes over rows of several lengths: torch.compile compiles each length for itself.

    Otherwise torch takes the second length as a sign that lengths vary, and compiles the training step for any length,
    which is slower. In this context torch does not remember the lengths either.
    """
    if forward_rows is None or forward_rows.lengths == (forward_rows.examples.seq_len,):
        return nullcontext()
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)
