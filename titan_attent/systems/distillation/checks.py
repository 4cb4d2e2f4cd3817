"""Refuses sources and targets that are not of the student's tokens."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_attent.data.run_record import read_run_record
from titan_attent.scores.targets import facts_of_data
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.distillation.sources import checkpoint_of, metadata_hash, targets_of


def check_tokenizer(config: DistillationConfig, dataset: Any) -> None:
    """Refuse a source whose run recorded another tokenizer than that of ``dataset``; ValueError.

    Checkpoints do not name a tokenizer. So that of the run beside them is compared, where titan_attent trained the
    source; the size of the vocabulary is compared with every checkpoint (frozen_model.py).
    """
    check_tokenizer_of_run(Path(config.source).parent, dataset, where=f"[distillation] source = {config.source}")


def check_tokenizer_of_run(run: Path, dataset: Any, *, where: str) -> None:
    """Refuse the source in the folder ``run`` if it recorded another tokenizer than that of ``dataset``; ValueError.

    Args:
        where: the key that names the source, and its value, for the message.
    """
    recorded = str(read_run_record(run).measured.get("tokenizer", ""))
    own = dataset.shards.tokenizer_info
    expected = [f"{own['vocab_size']} ids", str(own.get("sha256", ""))[:8]]
    stored = recorded.split(", ")[-2:]
    if recorded and all(stored) and all(expected) and stored != expected:
        raise ValueError(
            f"{where}: its run {run} was trained with another tokenizer, {recorded}, "
            f"than that of data.path, {own['name']}, {', '.join(expected)}: its ids mean other text. Write the data "
            "with the source's tokenizer, or take a source trained with this one"
        )


def check_targets(config: DistillationConfig, dataset: Any, *, checkpoints: Iterable[int], num_ids: int) -> None:
    """Refuse targets on disk of other data, another tokenizer, checkpoint or temperature, or of more ids; ValueError.

    Args:
        num_ids: of the student.
    """
    for step in checkpoints:
        stored = targets_of(config, step)
        stored.check(facts_of_data(dataset))
        if stored.facts.num_ids > num_ids:
            raise ValueError(
                f"{stored.path}: was written from {stored.facts.model}, which has {stored.facts.num_ids:,} token ids, "
                f"and the run's model has {num_ids:,}: it could not learn all of them. Take two flavors with the same "
                "vocabulary, such as those that follow the data"
            )
        if stored.facts.temperature != config.temperature:
            raise ValueError(
                f"{stored.path}: was written with temperature {stored.facts.temperature:g} ({stored.facts.kind}), and "
                f"[distillation] temperature is {config.temperature:g}: set it to that, or write the targets anew"
            )
        checkpoint = checkpoint_of(config, step)
        is_there = bool(config.source) and (checkpoint / ".metadata").is_file()
        if is_there and metadata_hash(checkpoint) != stored.facts.checkpoint_sha256:
            raise ValueError(
                f"{stored.path}: was written from another checkpoint, {stored.facts.checkpoint}, than the one in "
                f"{checkpoint}: write the targets of that one, or correct source"
            )
