"""Documents at 10^10 of them and 512 ranks: bytes, reads and collectives of one rank, which are counted, not timed.

The documents are synthetic: a formula gives their ends, and no file exists. Only one block is packed; of the others,
the packings are counted.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_attent import TeachingSampler
from titan_attent.data.plan import packed
from titan_attent.data.plan.packed import BlockOrder, PackedPass, Packer
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.data.text import document_examples
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.spans import RUN, count_examples

RANKS, RANK, BATCH, SEQ_LEN = 512, 77, 512, 8192
SHARD_RUNS = 400
SHARD_DOCUMENTS = SHARD_RUNS * RUN
LENGTHS = 2 + np.arange(RUN) * 197 % RUN * 8
"""Tokens of the documents of every run: 256 different lengths, 1,022 on average."""
RUN_ENDS = np.cumsum(LENGTHS)


class SyntheticShards:
    """Shards of 102,400 documents; counts the reads of ends, their bytes, and the reads of tokens."""

    path, has_mask, dtype, documents_fingerprint = "synthetic", False, np.dtype("<u2"), "f" * 64

    def __init__(self, num_shards: int):
        self.num_shards, self.num_documents = num_shards, num_shards * SHARD_DOCUMENTS
        self.tokenizer_info = {"vocab_size": 50_000, "eos_id": 49_999}
        self.index = SimpleNamespace(num_documents=self.num_documents)
        shard_tokens = SHARD_DOCUMENTS // RUN * int(RUN_ENDS[-1])
        self.first_tokens = shard_tokens * np.arange(num_shards, dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        self.end_reads = self.end_bytes = self.token_reads = self.tokens = 0

    def num_documents_of(self, shard: int) -> int:
        return SHARD_DOCUMENTS

    def length_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        return np.sort(LENGTHS), np.full(RUN, self.num_documents // RUN)

    def document_ends(self, shard: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= shard < self.num_shards and 0 <= start <= stop <= SHARD_DOCUMENTS
        self.end_reads += 1
        self.end_bytes += 4 * (stop - start)
        numbers = np.arange(start, stop)
        return numbers // RUN * RUN_ENDS[-1] + RUN_ENDS[numbers % RUN]

    def read_spans(self, shards: Any, starts: Any, lengths: np.ndarray, tokens: np.ndarray, slots: Any) -> np.ndarray:
        self.token_reads += len(lengths)
        self.tokens += int(lengths.sum())
        tokens.fill(1)
        return np.full(len(lengths), 49_999)


class SyntheticSums:
    """An all-reduce that returns this rank's values; counts the calls and the bytes of the tensor."""

    def __init__(self) -> None:
        self.calls = self.num_bytes = 0

    def __call__(self, counts: Tensor) -> Tensor:
        self.calls += 1
        self.num_bytes += counts.nbytes
        return counts


class Rank:
    """One rank of 512 with its data set and its first pass."""

    def __init__(self, num_shards: int):
        self.shards = SyntheticShards(num_shards)
        shards: Any = self.shards
        with mock.patch.object(document_examples, "TokenShards", SyntheticShards):
            self.dataset = DocumentDataset(shards, seq_len=SEQ_LEN)
        # Every run has as many examples as documents. The array is one number, not 312 MB of zeros and sums.
        counts = np.broadcast_to(np.int64(RUN), self.shards.num_documents // RUN)
        self.dataset._set_table(counts)
        self.sums = SyntheticSums()
        place: dict[str, Any] = {"rank": RANK, "num_ranks": RANKS, "add_up": self.sums}
        self.packer = Packer(self.dataset, batch_size=BATCH, **place)
        self.sampler = TeachingSampler(
            Shuffled(len(self.dataset), batch_size=BATCH, seed=0, packer=self.packer), rank=RANK, num_ranks=RANKS
        )
        self.shards.reset()
        self.num_packed = 0
        self.current = self._make_pass()

    def _make_pass(self) -> PackedPass:
        """All blocks have the same lengths, so they have as many windows as one of them."""
        blocks = BlockOrder(len(self.dataset), (0, 0, 0))
        _, lengths = self.packer.selected_examples(blocks, 0, packed.SelectedSlots(len(self.dataset)))
        sizes = {"capacity": SEQ_LEN, "max_examples": self.packer.max_examples}
        self.windows_per_block = packed.num_windows(lengths, **sizes)
        self.block_reads, self.block_bytes = self.shards.end_reads, self.shards.end_bytes

        def count(lengths: Any, **sizes: int) -> int:
            self.num_packed += 1
            return self.windows_per_block

        with (
            mock.patch.object(packed, "num_windows", count),
            mock.patch.object(Packer, "selected_examples", lambda *args: (None, None)),
        ):
            current = self.sampler.current_pass()
        assert isinstance(current, PackedPass)
        # The sums of the synthetic ranks: the counts of every rank.
        everywhere = np.full(current._blocks.num_blocks, self.windows_per_block)
        return PackedPass(self.packer, current.selected, current.order, windows_per_block=everywhere)

    def read(self, batch: int) -> tuple[int, int, int, int]:
        """Read this rank's rows of a batch: reads of ends and their bytes, reads of tokens and their number."""
        self.shards.reset()
        ids = self.sampler.local_ids(self.current, batch, 0)
        self.dataset.read(ids)
        assert ids.shape == (BATCH // RANKS, self.packer.max_examples)
        return self.shards.end_reads, self.shards.end_bytes, self.shards.token_reads, self.shards.tokens


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Rank]]:
    """10^7 and 10^10 documents."""
    yield {num: Rank(-(-num // SHARD_DOCUMENTS)) for num in (10**7, 10**10)}


def test_the_table_has_8_bytes_per_256_documents(ranks: dict[int, Rank]) -> None:
    for num, rank in ranks.items():
        assert len(rank.dataset) == rank.shards.num_documents >= num
        assert rank.dataset.table.num_bytes <= 8 * (rank.shards.num_documents // RUN + 3 * rank.shards.num_shards + 3)
    assert ranks[10**10].dataset.table.num_bytes < 320e6


def test_a_rank_reads_its_share_of_the_ends_once_per_run() -> None:
    """4 bytes per document, in one read per shard; then one all-reduce of 8 bytes per 256 documents."""
    shards: Any = SyntheticShards(-(-(10**10) // SHARD_DOCUMENTS))
    numbers = range(RANK, shards.num_shards, RANKS)
    counts = count_examples(shards, seq_len=SEQ_LEN, numbers=numbers)
    assert shards.end_reads == len(numbers) <= -(-shards.num_shards // RANKS) == 191
    assert shards.end_bytes == 4 * len(numbers) * SHARD_DOCUMENTS < 80e6
    assert counts.nbytes == 8 * shards.num_documents // RUN < 320e6
    first = RANK * SHARD_RUNS
    assert (counts[first : first + SHARD_RUNS] == RUN).all()


def test_a_block_takes_at_most_512_short_reads_for_any_number_of_documents(ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        # 256 runs of ids, each in at most two neighbouring runs of documents, and one end before each.
        assert 0 < rank.block_reads <= 512
        assert rank.block_bytes <= 4 * (512 * RUN + rank.block_reads)


def test_the_ranks_share_the_counting_of_windows(ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        num_blocks = rank.current._blocks.num_blocks
        assert num_blocks == -(-len(rank.dataset) // (RUN * packed.BLOCK_RUNS))
        assert rank.num_packed == len(range(RANK, num_blocks, RANKS))
        # One all-reduce per pass, of 8 bytes per block.
        assert (rank.sums.calls, rank.sums.num_bytes) == (1, 8 * num_blocks)
    large = ranks[10**10]
    assert large.num_packed in (298, 299) and large.sums.num_bytes < 1.3e6
    assert large.num_packed * large.windows_per_block < 2.6e6  # of 1.2 billion windows
    assert large.current._first_window.nbytes == large.sums.num_bytes + 8


def test_the_work_per_batch_does_not_grow_with_the_number_of_documents(ranks: dict[int, Rank]) -> None:
    """The first batch of a block reads the ends around its documents; the others read tokens alone."""
    for rank in ranks.values():
        end_reads, end_bytes, _, _ = rank.read(0)
        assert 0 < end_reads <= 512 and end_bytes <= 4 * (512 * RUN + end_reads)
        for batch in (1, 2, 3):
            end_reads, _, token_reads, tokens = rank.read(batch)
            assert end_reads == 0
            # One read per example, and at most one window of tokens and one last label per example.
            assert 0 < token_reads <= rank.packer.max_examples and tokens <= SEQ_LEN + token_reads


def test_a_checkpoint_is_four_integers(ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        state = rank.sampler.state_dict()
        assert len(state) == 4 and all(isinstance(value, int) for value in state.values())


def test_packing_keeps_a_few_blocks_in_memory(ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        batches_per_block = rank.windows_per_block // BATCH
        for block in range(5):
            rank.read(block * batches_per_block)
        assert len(rank.current._packed) <= 3
        # 16 bytes per document: of at most 512 runs in each of three blocks.
        kept = rank.dataset.table._kept
        assert len(kept) <= 3
        assert sum(column.nbytes for documents in kept for column in documents) <= 3 * 512 * (RUN * 16 + 24)


def test_the_state_of_a_pass_is_its_key(ranks: dict[int, Rank]) -> None:
    """Another rank, without this one's history, has the same windows."""
    rank = ranks[10**10]
    other = PackedPass(
        rank.packer,
        rank.current.selected,
        rank.current.order,
        windows_per_block=np.diff(rank.current._first_window),
    )
    assert torch.equal(other.ids(4, 5), rank.current.ids(4, 5))
