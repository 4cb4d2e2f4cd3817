"""The scorers that are counted, not trained: two bigram models (scores/bigram.py), in the ranks' own processes.

Both count equally many examples, so that neither knows more than the other: as many as there are of trusted text, a
random sample of the data. Each rank counts its share, and the counts are added up.

Cost: the sample is read once and the data twice; one all-reduce of at most 64 MiB a model. A killed command counts
again, which takes a few seconds in 10^8 tokens, and goes on scoring where it stopped.
"""

import hashlib
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from titan_attent.data.io.reader import Reader
from titan_attent.data.plan.order import OrderCursor
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.scores.bigram import NUM_BUCKETS, SMOOTHING, BigramModel
from titan_attent.scores.reference import CROSS_ENTROPY, Scoring
from titan_attent.scores.writer import ReferenceWriter
from titan_attent.titan.scoring.write_losses import fail_on_mistake, open_on_rank_zero, write_losses

MAX_TOKENS = 2**30
"""That a model counts; its counts are int32."""
BATCH_SIZE = 64
"""Examples counted or scored at once; not the ranks' to choose, as a loss must not depend on their number."""


def num_counted(*, num_trusted: int, num_examples: int, seq_len: int) -> int:
    """Examples that each model counts."""
    return max(1, min(num_trusted, num_examples, MAX_TOKENS // seq_len))


class Bigrams:
    """Counts one model, and scores with it. Its methods are collectives, on all ranks, ``count`` the first.

    Args:
        dataset: what the model is made of.
        num: examples that it counts.
        seed: of the sample.
        mesh: of all ranks.
        role: of :class:`Scoring`.
    """

    def __init__(self, dataset: TokenDataset, *, num: int, seed: int, mesh: DeviceMesh, reader: Reader, role: str = ""):
        self.dataset, self.num, self.seed, self.mesh, self.reader = dataset, num, seed, mesh, reader
        self.role = role
        self.model = BigramModel(dataset.shards.index.tokenizer["vocab_size"])

    def count(self) -> None:
        """Make the model."""
        sharding = ExampleSharding(self.num, mesh=self.mesh)
        sample = OrderCursor(len(self.dataset), self.seed)
        sample.take(self.num)
        pool, places = sample.pool(), sharding.local_ids()
        batches = (places[i : i + BATCH_SIZE] for i in range(0, len(places), BATCH_SIZE))
        for input_dict, labels in self.reader.read(lambda at: self.dataset.read(pool.ids(at)), batches):
            self.model.add(input_dict["input"], labels)
        self.model.share(sharding)

    def score(self, dataset: TokenDataset, folder: Path) -> None:
        """Write the losses of all examples of ``dataset`` to ``folder``, or those that a killed command left out."""
        with fail_on_mistake():
            writer = ReferenceWriter(folder, scoring=self._scoring(dataset))
        with open_on_rank_zero(writer) as start:
            write_losses(
                writer,
                lambda input_dict, labels: self.model.losses(input_dict["input"], labels),
                start=start,
                dataset=dataset,
                reader=self.reader,
                sharding=ExampleSharding(len(dataset), mesh=self.mesh),
                batch_size=BATCH_SIZE,
            )

    def _scoring(self, dataset: TokenDataset) -> Scoring:
        made_of = f"{self.dataset.shards.fingerprint} {self.num} {self.seed} {SMOOTHING} {NUM_BUCKETS}"
        return Scoring(
            data_fingerprint=dataset.shards.fingerprint,
            seq_len=dataset.seq_len,
            num_examples=len(dataset),
            model="bigram",
            precision="float64",
            checkpoint=f"counts of {self.num} examples of {self.dataset.shards.path}",
            checkpoint_sha256=hashlib.sha256(made_of.encode()).hexdigest(),
            loss=CROSS_ENTROPY,
            role=self.role,
        )
