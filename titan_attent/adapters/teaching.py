"""What the adapters share: the loss buffer, the teacher and the sampler of a data-parallel group, and their state."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.teacher import Teacher

EXAMPLE_ID, WEIGHT = "example_id", "weight"
"""The columns that a taught batch has besides its data set's: int64 [B] and fp32 [B]."""


class Teaching:
    """Teacher, buffer and sampler of a training whose processes are all data-parallel ranks.

    Args:
        num_examples: N, the length of the data set.
        config: the teacher's rule. Rules that read scores from disk or score by a forward pass need more inputs than
            the adapters have: a ValueError of :class:`titan_attent.Teacher` says so.
        batch_size: G, examples of an optimizer step, over all processes and microbatches.
        total_steps: optimizer steps of the whole run.
        microbatches: gradient accumulation steps.
        device: the training device.
        seed: of the order of the examples.
    """

    def __init__(
        self,
        num_examples: int,
        config: TeacherConfig,
        *,
        batch_size: int,
        total_steps: int,
        microbatches: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        mesh = init_device_mesh(torch.device(device).type, (ranks,)) if ranks > 1 else None
        self.buffer = LossBuffer(num_examples, mesh=mesh, device=device)
        self.teacher = Teacher(self.buffer, config, batch_size=batch_size, total_steps=total_steps, data_seed=seed)
        rank = self.buffer.sharding.rank
        self.sampler = TeachingSampler(self.teacher, rank=rank, num_ranks=ranks, microbatches=microbatches)

    def batches(self, dataset: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """This rank's microbatches, without end: the collated examples, with their ids and weights.

        No microbatch is read ahead, so each selection knows the losses of all steps before it.
        """
        for ids, weights in self.sampler:
            yield collate([dataset[i] for i in ids.tolist()]) | {EXAMPLE_ID: ids, WEIGHT: weights}

    def losses(self, logits: Tensor, labels: Tensor, ids: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """(sums, counts) of each example as in :func:`per_example_cross_entropy`; the means go to the buffer.

        Args:
            logits: [B, L, V], or [B, C] for a label per example.
            labels: int64 [B, L] or [B].
            ids: int64 [B].
            step: the optimizer step that these belong to, from 1.
        """
        if logits.ndim == 2:
            logits, labels = logits[:, None], labels[:, None]
        sums, counts = per_example_cross_entropy(logits, labels)
        self.buffer.record(ids, (sums / counts).detach(), step=step)
        return sums, counts

    def state_dict(self) -> dict[str, Any]:
        """A collective. Its tensors over all examples are sharded (DTensors) if there are several processes."""
        return {"teacher": self.teacher.state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of the same data set and batch size; the number of processes may differ."""
        self.teacher.load_state_dict(state["teacher"])
        self.sampler.load_state_dict(state["sampler"])


def next_token_pairs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V], and labels [B, L] equal to the inputs -> those where each position predicts the next."""
    return logits[:, :-1], labels[:, 1:]
