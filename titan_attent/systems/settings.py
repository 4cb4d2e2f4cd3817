"""What is set for a run, in terms of no trainer: all of its configuration that a system sees beside its own section.

The package that knows the trainer builds it (titan/settings.py for torchtitan).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

SUFFIX = "_attent"
"""Of the name of a model that this package trains; the rest is its family."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Ranks per dimension of the mesh; 1 where a dimension is not used.

    Attributes:
        replicate, shard: data parallelism that copies, and that shards.
        context, tensor, pipeline, expert: the other dimensions.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def is_ddp(self) -> bool:
        """Whether copies of the whole model average their gradients in one backward pass: nothing is sharded."""
        return self.replicate > 1 and self.shard * self.context == 1


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run.

    Attributes:
        family: of the learner, as "llama3".
        steps: training steps of the whole run.
        seq_len: tokens of a window.
        local_batch_size: examples of a microbatch on a rank.
        data_seed: of the order of the data.
        dump_folder: where a run writes its logs.
        log_every: steps from one logged step to the next.
        degrees: ranks per dimension of the mesh.
        pipeline_schedule: the name of the schedule; read where ``degrees.pipeline`` is above 1.
        compiles_model, compiles_loss: whether torch.compile is used for them.
        compile_backend: of torch.compile.
        activation_checkpointing: "none", or how activations are recomputed.
        vocab_parallel: whether logits stay cut along the vocabulary, as tensor parallelism leaves them.
        steps_in_backward: whether the optimizer steps while the backward pass runs.
        reduce_dtype: of the gradients that FSDP2 reduces.
        mixes_examples: whether a training example is a mixture of two (mixup, CutMix).
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
