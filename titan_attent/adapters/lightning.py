"""A Lightning callback that selects the batches of a ``LightningModule``.

    teaching = TeachingCallback(TeacherConfig(strategy="soft"), dataset, batch_size=32, max_steps=1000)
    trainer = lightning.Trainer(callbacks=[teaching], max_steps=1000, use_distributed_sampler=False)
    trainer.fit(module, teaching.dataloader())

The module returns the losses of the examples from its ``training_step``:

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input"])
        return self.teaching.loss(logits, batch["labels"], batch)

Every process is a data-parallel rank (DDP, FSDP). The teacher's state is in Lightning's own checkpoints, gathered from
the processes (20 bytes per example); a run may resume on another number of processes with the same ``batch_size``.
Tried with lightning 2.6.
"""

from collections.abc import Callable, Iterator
from typing import Any

import lightning
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from titan_attent.adapters.teaching import EXAMPLE_ID, WEIGHT, Teaching
from titan_attent.systems.teaching.config import TeacherConfig

_ACCUMULATED = "accumulate_grad_batches"


class TeachingCallback(lightning.Callback):
    """Teacher, loss and loader of a run.

    Args:
        config: the rule; ``strategy = "uniform"`` trains every example equally often, in a random order.
        dataset: has a length and an index; its items are collated to a dict.
        batch_size: examples of an optimizer step, over all processes and accumulated batches.
        max_steps: as given to the Trainer.
        collate_fn: as of ``torch.utils.data.DataLoader``.
        seed: of the order of the examples.
    """

    def __init__(
        self,
        config: TeacherConfig,
        dataset: Any,
        *,
        batch_size: int,
        max_steps: int,
        collate_fn: Callable[[list[Any]], dict[str, Any]] = default_collate,
        seed: int = 0,
    ):
        self.config, self.dataset, self.collate_fn, self.seed = config, dataset, collate_fn, seed
        self.batch_size, self.max_steps = batch_size, max_steps
        self.teaching: Teaching | None = None
        self._step = 1

    def dataloader(self) -> "_Batches":
        """The loader for ``Trainer.fit``; it reads in the training process."""
        return _Batches(self)

    def loss(self, logits: Tensor, labels: Tensor, batch: dict[str, Any]) -> Tensor:
        """The weighted mean over the tokens of this batch, for ``training_step`` to return.

        Args:
            logits: [B, L, V], or [B, C] for a label per example.
            labels: int64 [B, L] or [B]; -100 where a token does not count.
            batch: as the loader gave it.
        """
        assert self.teaching is not None, "the loss is for training_step"
        sums, counts = self.teaching.losses(logits, labels, batch[EXAMPLE_ID], step=self._step)
        return (batch[WEIGHT] * sums).sum() / counts.sum()

    # -- Lightning's hooks ----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.max_steps != self.max_steps:
            raise ValueError(f"max_steps is {self.max_steps} for the teacher and {trainer.max_steps} for the Trainer")
        self.teaching = Teaching(
            len(self.dataset),
            self.config,
            batch_size=self.batch_size,
            total_steps=self.max_steps,
            microbatches=trainer.accumulate_grad_batches,
            device=trainer.strategy.root_device,
            seed=self.seed,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self._step:  # the optimizer has stepped
            assert self.teaching is not None
            self.teaching.teacher.step_done()
            pl_module.log_dict(self.teaching.teacher.decision_metrics())

    def state_dict(self) -> dict[str, Any]:
        """Of the whole run, on every process."""
        if self.teaching is None:
            return {}
        accumulated = {_ACCUMULATED: self.teaching.sampler.microbatches}
        return tree_map(_whole, self.teaching.state_dict()) | accumulated

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if another number of batches is accumulated: Lightning goes on counting them where it stopped."""
        if self.teaching is None or not state_dict:
            return
        state = dict(state_dict)
        saved, now = state.pop(_ACCUMULATED), self.teaching.sampler.microbatches
        if saved != now:
            raise ValueError(
                f"the checkpoint accumulates {saved} batches, this Trainer {now}: resume with "
                f"accumulate_grad_batches={saved}, and the same batch_size"
            )
        self.teaching.load_state_dict(tree_map(_divided_like, self.teaching.state_dict(), state))


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _divided_like(mine: Any, saved: Any) -> Any:
    return distribute_tensor(saved, mine.device_mesh, mine.placements) if isinstance(mine, DTensor) else saved


class _Batches:
    """Has a length, so that Lightning does not read a batch ahead of the teacher's decisions."""

    def __init__(self, callback: TeachingCallback):
        self.callback = callback

    def __len__(self) -> int:
        assert self.callback.teaching is not None, "the loader is for Trainer.fit"
        return self.callback.max_steps * self.callback.teaching.sampler.microbatches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.callback.teaching is not None, "the loader is for Trainer.fit"
        return self.callback.teaching.batches(self.callback.dataset, self.callback.collate_fn)
