"""Token files of the real writers, adopted, against these packages' own readers: every token, boundary and mask.

    python -m benchmarks.speed.adopt_real --python PYTHON [--output docs/results/cpu/adopt_real.json]

PYTHON is an interpreter with mosaicml-streaming, litdata and datatrove, for instance of an environment made by

    python -m venv formats && formats/bin/pip install mosaicml-streaming==0.13.0 litdata==0.2.61 datatrove==0.9.0

adopt_writers.py runs in it, writes 400 documents in each format, and saves what the format's own reader gives.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import measure
from titan_attent.data.adopt.adopt import adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.text.bpe import format_ranks
from titan_attent.data.text.shards import TokenShards

VOCAB_SIZE = 1000
ROW = 64
FIELDS = ("mosaicml-streaming", "litdata", "datatrove", "numpy")


def adopted(folder: Path, name: str, tokenizer: Path) -> tuple[TokenShards, list[np.ndarray]]:
    """The adopted files of ``folder / name``, and their documents."""
    options = Options(
        decompress=str(folder / "plain") if name in ("mds_zstd", "mds_gz") else "",
        # The rows of MDS are samples: their ends are compared, too.
        boundaries="index" if name in ("mds_shape", "mds_bytes") else "",
        dtype="int64" if name == "mds_bytes" else "",
    )
    index = folder / "index" / name
    adopt([folder / name], tokenizer=str(tokenizer), options=options, output=str(index), root=str(folder))
    shards = TokenShards(index)
    documents = []
    for number in range(shards.num_shards):
        ends = shards.document_ends(number, 0, shards.num_documents_of(number)).tolist()
        documents += [shards.read_span(number, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return shards, documents


def compare(folder: Path, name: str, tokenizer: Path) -> dict[str, Any]:
    """Raise AssertionError at the first difference."""
    shards, documents = adopted(folder, name, tokenizer)
    expected = np.load(folder / f"{name}.npz")
    tokens = shards.read(0, shards.num_tokens)
    np.testing.assert_array_equal(tokens, expected["tokens"])
    np.testing.assert_array_equal(np.cumsum([len(one) for one in documents]), expected["ends"])
    np.testing.assert_array_equal(np.concatenate(documents), expected["tokens"])
    if "blocks" in expected:  # of files of which the reader drops the rest
        sizes = np.cumsum([shard.num_tokens for shard in shards.index.shards])[:-1]
        whole = [one[: len(one) // ROW * ROW].reshape(-1, ROW) for one in np.split(tokens, sizes)]
        np.testing.assert_array_equal(np.concatenate(whole), expected["blocks"])
    if "mask" in expected:
        masks = [shards.read_mask(i, 0, shard.num_tokens) for i, shard in enumerate(shards.index.shards)]
        np.testing.assert_array_equal(np.concatenate(masks), expected["mask"])
    compared = "tokens, boundaries" + ", blocks" * ("blocks" in expected) + ", mask" * ("mask" in expected)
    return {"files": name, "shards": shards.num_shards, "documents": len(documents), "equal": compared}


def main() -> None:
    parser = argparse.ArgumentParser(description="Adopted files of the real writers against their own readers.")
    parser.add_argument("--python", type=Path, required=True, help="interpreter with the packages")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    header = measure.header()
    code = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {FIELDS}), sep=', ')"
    header["packages"] = subprocess.check_output([args.python, "-c", code], text=True).strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        script = Path(__file__).with_name("adopt_writers.py")
        subprocess.run([args.python, script, folder], check=True, stdout=sys.stderr)
        tokenizer = folder / "ranks"
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {bytes(divmod(number, 256)): 256 + number for number in range(VOCAB_SIZE - 256)}
        tokenizer.write_bytes(format_ranks(ranks))
        rows = [compare(folder, path.stem, tokenizer) for path in sorted(folder.glob("*.npz"))]
    print(f"packages: {header['packages']}")
    measure.publish(args.output, header | {"rows": rows}, rows)


if __name__ == "__main__":
    main()
