"""The corpora of the convergence benchmark: real code, clean and dirty in three ways.

    python -m benchmarks.corpora.stdlib_code --output outputs/corpora [--seed 0]

    clean       6,144 rows of 96 tokens of the Python standard library's sources
    junk        40% of these rows replaced by junk: half by their own tokens shuffled, half by uniform random tokens
    copies      50% replaced by copies of 64 of the unchanged rows, equally many of each
    mixture     30% replaced by junk, 30% by copies of 64 of the unchanged rows
    validation  512 other rows of the same files, the same for all four
    trusted     4,096 further rows, for a reference model

Each is a token data set of the package. A row is an example at ``seq_len`` 96: windows step by ``seq_len``, so the
label of a row's last position is the first token of the next row, whatever its kind. One eos follows the last row.
``row_kinds.npy`` beside the tokens (uint8 [N]) has the kind of each row, an index into ``KINDS``, for audits only.

Rows are assigned at random, so held-out text is of the same kind as the training text, as for a web crawl. Only the
first 32,768 characters of a file are used; duplicate files and rows are used once. The byte-level BPE of 1,024 tokens
is trained on all files.

Deterministic: equal seeds, Python sources and sizes give equal bytes. Another Python version has other sources, and so
another text: ``manifest.json`` holds the version and the fingerprints. Cost: 4 seconds, 5 MB.
"""

import argparse
import json
import platform
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.holdout import write_tokens
from titan_attent.data.text.tiktoken_tokenizer import train_tokenizer

CORPORA = ("clean", "junk", "copies", "mixture")
SHARES = {"clean": (0.0, 0.0), "junk": (0.4, 0.0), "copies": (0.0, 0.5), "mixture": (0.3, 0.3)}
"""Corpus -> (share of junk rows, share of copies)."""

KINDS = ("clean", "shuffled", "random", "copy")
CLEAN, SHUFFLED, RANDOM, COPY = range(4)
KINDS_FILE = "row_kinds.npy"
MANIFEST_FILE = "manifest.json"

CHARACTERS_PER_FILE = 32_768
LEFT_OUT = {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
"""Folders of tables, of tests (which have broken code on purpose) and of packages outside the standard library."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the corpora; the defaults are those of the benchmark."""

    num_rows: int = 6144
    seq_len: int = 96
    num_copied: int = 64
    num_validation: int = 512
    num_trusted: int = 4096
    vocab_size: int = 1024


def build_corpora(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> dict[str, Any]:
    """Write the six data sets below ``folder`` unless they exist; returns the manifest.

    Raises:
        ValueError: ``folder`` holds corpora of another seed, Python or size, or there is too little source text.
    """
    sizes = sizes or Sizes()
    requested = {"seed": seed, "python": platform.python_version(), "sizes": asdict(sizes)}
    path = folder / MANIFEST_FILE
    if path.is_file():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in requested if manifest[key] != requested[key]]:
            was, now = ({key: values[key] for key in differing} for values in (manifest, requested))
            raise ValueError(
                f"{folder} holds corpora with {was}, but this call needs {now}: name another folder, or remove "
                "this one and the results measured on it"
            )
        return manifest

    texts = list(list_sources().values())
    rng = np.random.default_rng([seed, len(CORPORA)])
    texts = [texts[i] for i in rng.permutation(len(texts))]
    tokenizer = train_tokenizer(texts, vocab_size=sizes.vocab_size)
    parts = {"train": sizes.num_rows, "validation": sizes.num_validation, "trusted": sizes.num_trusted}
    everything = make_rows(texts, tokenizer=tokenizer, num_rows=sum(parts.values()), seq_len=sizes.seq_len)
    bounds = np.cumsum(list(parts.values()))[:-1].tolist()
    rows = dict(zip(parts, np.split(rng.permutation(everything), bounds), strict=True))
    fingerprints = {}
    for part in ("validation", "trusted"):
        fingerprints[part] = write_rows(folder / part, rows[part], tokenizer=tokenizer)
    for i, name in enumerate(CORPORA):
        junk, copies = SHARES[name]
        dirty, kinds = soil(
            rows["train"],
            junk=junk,
            copies=copies,
            num_copied=sizes.num_copied,
            num_tokens=tokenizer.eos_id,
            rng=np.random.default_rng([seed, i]),
        )
        fingerprints[name] = write_rows(folder / name, dirty, tokenizer=tokenizer)
        np.save(folder / name / KINDS_FILE, kinds)
    manifest = requested | {"fingerprints": fingerprints}
    write_atomically(path, (json.dumps(manifest, indent=1) + "\n").encode())  # last: it marks the corpora as complete
    return manifest


def list_sources() -> dict[str, str]:
    """Path below the standard library -> text, cut to ``CHARACTERS_PER_FILE``; sorted, without duplicate contents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        folders = path.relative_to(root).parts[:-1]
        if LEFT_OUT.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        try:
            text = path.read_bytes().decode("utf-8")[:CHARACTERS_PER_FILE]
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding
        if text.strip():
            sources[path.relative_to(root).as_posix()] = text
    first = {text: name for name, text in reversed(sources.items())}
    return {name: text for name, text in sources.items() if first[text] == name}


def make_rows(texts: Sequence[str], *, tokenizer: Tokenizer, num_rows: int, seq_len: int) -> np.ndarray:
    """The first ``num_rows`` different rows of the texts, one text after the other with eos between.

    Returns:
        uint32 [num_rows, seq_len].
    """
    documents = [np.append(tokenizer.encode_to_array(text), np.uint32(tokenizer.eos_id)) for text in texts]
    stream = np.concatenate(documents)
    rows = stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
    _, first = np.unique(rows, axis=0, return_index=True)
    if len(first) < num_rows:
        raise ValueError(
            f"the files of {sysconfig.get_paths()['stdlib']} give {len(first):,} rows of {seq_len} tokens, but "
            f"{num_rows:,} are needed: use a Python with its whole standard library"
        )
    return rows[np.sort(first)[:num_rows]]


def soil(
    rows: np.ndarray, *, junk: float, copies: float, num_copied: int, num_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replace shares of the rows, chosen at random, by junk and by copies.

    Args:
        rows: integers [N, L], not changed.
        num_copied: unchanged rows that are copied; their numbers of copies differ by at most one.
        num_tokens: random tokens are below this.

    Returns:
        The new rows [N, L], and their kinds, uint8 [N].
    """
    num_rows = len(rows)
    num_junk, num_copies = round(junk * num_rows), round(copies * num_rows)
    num_shuffled = num_junk // 2
    order = rng.permutation(num_rows)
    shuffled, random, copied, stay = np.split(
        order, np.cumsum([num_shuffled, num_junk - num_shuffled, num_copies]).tolist()
    )
    dirty, kinds = rows.copy(), np.full(num_rows, CLEAN, np.uint8)
    dirty[shuffled], kinds[shuffled] = rng.permuted(rows[shuffled], axis=1), SHUFFLED
    dirty[random], kinds[random] = rng.integers(num_tokens, size=(len(random), rows.shape[1])), RANDOM
    if num_copies:
        dirty[copied], kinds[copied] = rows[np.resize(stay[:num_copied], num_copies)], COPY
    return dirty, kinds


def write_rows(folder: Path, rows: np.ndarray, *, tokenizer: Tokenizer) -> str:
    """Write the rows and one eos as a data set whose example i is row i; returns its fingerprint."""
    return write_tokens(folder, [np.append(rows.ravel(), tokenizer.eos_id)], tokenizer=tokenizer).fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the corpora of the convergence benchmark.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the order and the dirt (default: 0)")
    args = parser.parse_args(argv)
    try:
        manifest = build_corpora(args.output, seed=args.seed)
    except ValueError as error:
        print(f"corpora: {error}", file=sys.stderr)
        return 2
    for name, fingerprint in manifest["fingerprints"].items():
        kinds = args.output / name / KINDS_FILE
        counts = np.bincount(np.load(kinds)).tolist() if kinds.is_file() else []
        shares = ", ".join(f"{count:,} {kind}" for kind, count in zip(KINDS, counts, strict=False) if count)
        print(f"{args.output / name}  {fingerprint[:12]}  {shares}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
