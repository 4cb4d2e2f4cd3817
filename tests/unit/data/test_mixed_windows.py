"""How many documents share an example, against a count by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from titan_attent.data.text.format import ShardWriter, token_dtype, write_index
from titan_attent.data.text.mixing import NUM_SAMPLED, documents_per_example
from titan_attent.data.text.shards import TokenDataset

EOS = 3


def dataset(folder: Path, stream: np.ndarray, *, seq_len: int) -> TokenDataset:
    dtype = token_dtype(100)
    with ShardWriter(folder / "shard-00000.bin", dtype=dtype) as shard:
        shard.append(stream)
        entry = shard.finish()
    info = {"name": "none", "vocab_size": 100, "eos_id": EOS}
    write_index(folder, dtype=dtype, shards=[entry], num_documents=1, max_token_id=99, tokenizer=info)
    return TokenDataset(folder, seq_len=seq_len)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 50])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_documents_are_counted(seq_len: int, share: float, tmp_path: Path) -> None:
    """The sample has all examples, so the order does not matter."""
    rng = np.random.default_rng(seq_len)
    stream = rng.integers(10, 99, 40 * seq_len + 1)
    stream[rng.random(len(stream)) < share] = EOS
    documents = []
    for i in range(40):
        inputs = stream[i * seq_len : (i + 1) * seq_len]
        number, owners = 0, set()
        for token in inputs:
            owners.add(number)
            number += token == EOS
        documents.append(len(owners))
    assert documents_per_example(dataset(tmp_path, stream, seq_len=seq_len)) == pytest.approx(np.mean(documents))


def test_a_sample_stands_for_many(tmp_path: Path) -> None:
    """The first half of the data has short documents."""
    stream = np.full(20 * NUM_SAMPLED * 10 + 1, 50)
    stream[: len(stream) // 2 : 5] = EOS
    assert documents_per_example(dataset(tmp_path, stream, seq_len=10)) == pytest.approx(2.0, abs=0.3)


def test_an_image_is_one_document() -> None:
    assert documents_per_example(cast(Any, SimpleNamespace(__len__=lambda: 3))) == 1.0
