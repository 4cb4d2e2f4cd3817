"""Scorers that count instead of training: two bigram models (scores/bigram.py), in the ranks' own processes.

Both count equally many examples, so that neither has seen more data: the expert all trusted text, the amateur a random
sample of the data. Each rank counts its share, and the counts are summed.

Cost: the sample is read once and the data twice; one all-reduce of at most 64 MiB per model, and a file of at most
64 MiB + 8 bytes per id (scores/table.py). A killed command counts again, which takes a few seconds for 10^8 tokens, and
resumes scoring where it stopped.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.data.io.reader import ReadBatch, Reader
from titan_attent.data.plan.order import OrderCursor, Pool
from titan_attent.data.text.document_examples import WholeDocuments
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.scores.bigram import NUM_BUCKETS, SMOOTHING, BigramModel
from titan_attent.scores.stored import CROSS_ENTROPY, Scoring
from titan_attent.scores.table import write_table
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.scoring.write_losses import fail_on_mistake, open_on_rank_zero, write_losses
from titan_attent.titan.user_errors import on_first_rank

MAX_TOKENS = 2**30
"""Largest number of tokens that a model counts; its counts are int32."""
BATCH_SIZE = 64
"""Examples counted or scored at once. It is fixed, because a loss must not depend on the number of ranks."""


ScoredExamples = TokenDataset | WholeDocuments
"""Windows of tokens, or whole documents."""


IS_COUNTED = "is_counted"


@dataclass(frozen=True)
class _MarkedRows:
    """Rows of a data set with a bool column ``IS_COUNTED`` [B]: whether they are in ``counted``; None: none are."""

    dataset: ScoredExamples
    counted: Pool | None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, ids: Tensor) -> ReadBatch:
        input_dict, labels = self.dataset.read(ids)
        is_counted = torch.zeros(len(ids), dtype=torch.bool) if self.counted is None else self.counted.contains(ids)
        return input_dict | {IS_COUNTED: is_counted}, labels


def num_counted(*, num_trusted: int, num_examples: int, tokens_per_example: int) -> int:
    """Number of examples that each model counts."""
    return max(1, min(num_trusted, num_examples, MAX_TOKENS // tokens_per_example))


class Bigrams:
    """Counts one model, and scores with it. Its methods are collectives, on all ranks; call ``count`` first.

    Args:
        dataset: the data to count.
        num: number of examples to count.
        seed: seed of the sample.
        mesh: mesh of all ranks.
        role: role of the scorer, see :class:`Scoring`.
    """

    def __init__(
        self,
        dataset: ScoredExamples,
        *,
        num: int,
        seed: int,
        mesh: DeviceMesh,
        reader: Reader,
        role: str = "",
    ):
        self.dataset, self.num, self.seed, self.mesh, self.reader = dataset, num, seed, mesh, reader
        self.role = role
        self.model = BigramModel(dataset.shards.index.tokenizer["vocab_size"])

    def count(self) -> None:
        """Count the sample."""
        sharding = ExampleSharding(self.num, mesh=self.mesh)
        pool, slots = self._sample(), sharding.local_ids()
        batches = (slots[i : i + BATCH_SIZE] for i in range(0, len(slots), BATCH_SIZE))
        for input_dict, labels in self.reader.read(lambda batch: self.dataset.read(pool.ids(batch)), batches):
            self.model.add(input_dict["input"], labels)
        self.model.share(sharding)

    def _sample(self) -> Pool:
        """The examples that are counted."""
        cursor = OrderCursor(len(self.dataset), self.seed)
        cursor.take(self.num)
        return cursor.pool()

    def count_into(self, folder: Path) -> None:
        """Count the sample, and write the table to ``folder``."""
        self.count()
        on_first_rank(lambda: write_table(folder, self.model, checkpoint_sha256=self.identity))

    def score(self, dataset: ScoredExamples, folder: Path) -> None:
        """Write the losses of the examples of ``dataset`` to ``folder``; resumes where a killed command stopped."""
        with fail_on_mistake():
            writer = ScoresWriter(folder, scoring=self._scoring(dataset))
        rows = _MarkedRows(dataset, self._sample() if dataset.scored == self.dataset.scored else None)
        with open_on_rank_zero(writer) as start:
            write_losses(
                writer,
                # A document that is its eos alone has no label, and no example: its score is read by nobody.
                lambda input_dict, labels: self.model.losses(
                    input_dict["input"], labels, is_counted=input_dict[IS_COUNTED]
                ).nan_to_num(0.0),
                start=start,
                dataset=rows,
                reader=self.reader,
                sharding=ExampleSharding(len(dataset), mesh=self.mesh),
                batch_size=BATCH_SIZE,
            )

    @property
    def identity(self) -> str:
        """sha256 of everything that determines the counts, and how they score."""
        fields = f"{self.dataset.stored.fingerprint} {self.num} {self.seed} {SMOOTHING} {NUM_BUCKETS} left out"
        return hashlib.sha256(fields.encode()).hexdigest()

    def _scoring(self, dataset: ScoredExamples) -> Scoring:
        return Scoring(
            **dataset.scored._asdict(),
            model="bigram",
            precision="float64",
            checkpoint=f"counts of {self.num} examples of {self.dataset.shards.path}",
            checkpoint_sha256=self.identity,
            loss=CROSS_ENTROPY,
            role=self.role,
        )
