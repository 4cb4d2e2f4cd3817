"""The settings of a run that a system may read besides its own section, independent of the trainer.

The package that wraps a trainer builds them (titan/settings.py for torchtitan).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

SUFFIX = "_attent"
"""Suffix of the names of models that this package trains: a name is the model family followed by it."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The number of ranks per mesh dimension; 1 for an unused dimension.

    Attributes:
        replicate: degree of replicated data parallelism.
        shard: degree of sharded data parallelism.
        context, tensor, pipeline, expert: degrees of the other parallelisms.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def is_ddp(self) -> bool:
        """Whether the run uses DDP: copies of the whole model, not sharded, average gradients in one backward pass."""
        return self.replicate > 1 and self.shard * self.context == 1


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run.

    Attributes:
        family: model family of the learner, such as "llama3".
        steps: number of training steps of the whole run.
        seq_len: tokens per example.
        local_batch_size: examples per microbatch and rank.
        data_seed: seed of the data order.
        dump_folder: folder to which the run writes its logs.
        log_every: number of steps from one logged step to the next.
        degrees: number of ranks per mesh dimension.
        pipeline_schedule: name of the pipeline schedule; used only if ``degrees.pipeline`` is above 1.
        compiles_model, compiles_loss: whether torch.compile is applied to the model and to the loss.
        compile_backend: backend of torch.compile.
        activation_checkpointing: mode of activation checkpointing; "none" for none.
        vocab_parallel: whether logits stay sharded along the vocabulary under tensor parallelism.
        steps_in_backward: whether the optimizer steps during the backward pass.
        reduce_dtype: dtype in which FSDP2 reduces gradients.
        mixes_examples: whether a training example is a mixture of two (mixup, CutMix).
        cuts_examples: whether an example may be cut at the end of a window (``data.packing = "concatenate"``).
        group_size: examples with one input that are neighbours in every batch (``data.group_size``).
        batches_read_ahead: microbatches in memory that the reader threads have read ahead of the step.
    """

    family: str
    steps: int
    seq_len: int
    local_batch_size: int
    data_seed: int = 0
    dump_folder: Path = Path(".")
    log_every: int = 1
    degrees: Degrees = Degrees()
    pipeline_schedule: str = ""
    compiles_model: bool = False
    compiles_loss: bool = False
    compile_backend: str = "inductor"
    activation_checkpointing: str = "none"
    vocab_parallel: bool = False
    steps_in_backward: bool = False
    reduce_dtype: torch.dtype = torch.float32
    mixes_examples: bool = False
    cuts_examples: bool = False
    group_size: int = 1
    batches_read_ahead: int = 0
