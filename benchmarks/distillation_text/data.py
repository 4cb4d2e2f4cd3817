"""The data of the text experiment: Python's standard library, and C++ headers as the other domain.

    DIR/corpora/          as in the convergence benchmark; runs train on ``clean``
    DIR/validation/       its validation rows as the data source "python", and as many rows of C++ headers as "cpp"

The headers are those of the installed torch, so nothing is downloaded; their tokens are those of the Python tokenizer.
"""

from pathlib import Path

import numpy as np
import torch

from benchmarks.corpora.stdlib_code import Sizes, build_corpora, make_rows
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.format import ShardWriter, token_dtype, write_index
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tiktoken_tokenizer import RANKS_FILE
from titan_attent.data.text.tokenizer import load_tokenizer

PYTHON, CPP = "python", "cpp"
CHARACTERS_PER_FILE = 8_192
HEADERS = "ATen/*.h"


def prepare(output: Path) -> None:
    """Write the data sets, unless they exist."""
    build_corpora(output / "corpora")
    folder = output / "validation"
    if (folder / INDEX_FILE).is_file():
        return
    sizes = Sizes()
    tokenizer = load_tokenizer(str(output / "corpora" / "clean" / RANKS_FILE))
    own = TokenDataset(output / "corpora" / "validation", seq_len=sizes.seq_len)
    rows = {PYTHON: own.batch(torch.arange(len(own)))[0].numpy()}
    include = Path(torch.__file__).parent / "include"
    texts = [
        path.read_text(encoding="utf-8", errors="replace")[:CHARACTERS_PER_FILE]
        for path in sorted(include.glob(HEADERS))
    ]
    rows[CPP] = make_rows(texts, tokenizer=tokenizer, num_rows=len(own), seq_len=sizes.seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    shards = []
    for number, (name, own_rows) in enumerate(rows.items()):
        path = folder / f"shard-{number:05d}.bin"
        with ShardWriter(path, dtype=token_dtype(tokenizer.vocab_size), source=name) as shard:
            shard.append(np.append(own_rows.ravel(), tokenizer.eos_id))
            shards.append(shard.finish())
    write_index(
        folder,
        dtype=token_dtype(tokenizer.vocab_size),
        shards=shards,
        num_documents=len(shards),
        max_token_id=tokenizer.eos_id,
        tokenizer=tokenizer.info(),
    )
