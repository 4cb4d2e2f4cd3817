"""A Trainer of Hugging Face's transformers whose batches are selected by a teacher.

    trainer = TeachingTrainer(TeacherConfig(strategy="soft"), model=model, args=args, train_dataset=dataset)
    trainer.train()

``Trainer``'s own arguments, callbacks, evaluation and checkpoints stay as they are. Every process is a data-parallel
rank (DDP, FSDP, DeepSpeed ZeRO). The teacher's state is the folder ``teacher`` of each checkpoint; a run may resume on
another number of processes if the product of processes, ``per_device_train_batch_size`` and
``gradient_accumulation_steps`` stays. Tried with transformers 5.24 and accelerate 1.15.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from titan_attent.adapters.teaching import EXAMPLE_ID, WEIGHT, Teaching, next_token_pairs
from titan_attent.systems.teaching.config import TeacherConfig

FOLDER = "teacher"
"""Of the teacher's state, in a checkpoint."""


class TeachingTrainer(Trainer):
    """A ``Trainer`` with a teacher.

    Args:
        teacher: the rule; ``strategy = "uniform"`` trains every example equally often, in a random order.
        shift_labels: whether the labels of 3-dimensional logits are the inputs themselves, as for causal language
            models; False where the data set has shifted them, and for token classification and masked models.
        others: as for ``Trainer``. The training data set has a length and an index; ``args.max_steps`` is needed.

    ValueError where something is missing, or the processes are not all data-parallel ranks.
    """

    def __init__(self, teacher: TeacherConfig, *args: Any, shift_labels: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shift_labels = shift_labels
        dataset = self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError("the teacher selects examples by number: train_dataset needs a length and an index")
        if self.args.max_steps < 1:
            raise ValueError("the teacher plans the whole run: set TrainingArguments(max_steps=...)")
        if self.args.n_gpu > 1:
            raise ValueError("one process drives several GPUs (DataParallel): start one process per GPU with torchrun")
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size()) > 1:
            raise ValueError(
                "the adapter needs all processes to be data-parallel: leave tensor, context and sequence "
                "parallelism out"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "the teacher computes the loss of each example itself: leave label_smoothing_factor and "
                "compute_loss_func out"
            )
        self.args.ignore_data_skip = True  # the teacher knows where a run stopped
        ranks, microbatches = self.args.world_size, self.args.gradient_accumulation_steps
        self.teaching = Teaching(
            len(dataset),
            teacher,
            batch_size=self.args.per_device_train_batch_size * ranks * microbatches,
            total_steps=self.args.max_steps,
            microbatches=microbatches,
            device=self.args.device,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        self.add_callback(_StepDone(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:  # without a checkpoint it stays True, which the Trainer refuses
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if resume_from_checkpoint not in (None, False, True):
            folder = Path(str(resume_from_checkpoint)) / FOLDER
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing: this checkpoint was written without a teacher")
            state = self.teaching.state_dict()
            dcp.load(state, checkpoint_id=folder)
            self.teaching.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """This process's batches; accelerate must not divide them again."""
        return _Batches(self)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted mean over the tokens of the step; Trainer's own loss where all weights are 1."""
        if EXAMPLE_ID not in inputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        ids, weights, labels = inputs.pop(EXAMPLE_ID), inputs.pop(WEIGHT), inputs.pop("labels")
        outputs = model(**inputs)
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self.shift_labels and logits.ndim == 3:
            logits, labels = next_token_pairs(logits, labels)
        sums, counts = self.teaching.losses(logits, labels, ids, step=self.state.global_step + 1)
        loss = (weights * sums).sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # the gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | (self.teaching.teacher.decision_metrics() if "loss" in logs else {}), *args, **kwargs)


class _Batches:
    def __init__(self, trainer: TeachingTrainer):
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        collate: Any = trainer.data_collator
        dataset = trainer.train_dataset
        if hasattr(dataset, "column_names"):  # of the library `datasets`
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="training")
        return trainer.teaching.batches(dataset, collate)


class _StepDone(TrainerCallback):
    """Exchanges the losses after each step, and writes the teacher's state into each checkpoint."""

    def __init__(self, trainer: TeachingTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.teaching.teacher.step_done()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
        dcp.save(self.trainer.teaching.state_dict(), checkpoint_id=folder)
