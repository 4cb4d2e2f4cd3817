"""The corpora of the convergence benchmark: real code text, and three ways in which a data set is dirty.

    python benchmarks/corpora.py --output outputs/corpora [--seed 0]

    clean       6,144 rows of 96 tokens of the Python standard library's sources
    junk        40% of these rows replaced by junk: half by their own tokens shuffled, half by uniform random tokens
    copies      50% replaced by copies of 64 of the rows that stay, as many of each
    mixture     30% replaced by junk, 30% by copies of 64 of the rows that stay
    validation  512 clean rows of other files, the same for all four
    trusted     4,096 clean rows of yet other files, for a reference model

Each is a token data set of the package. A row is an example at ``seq_len`` 96: windows step by ``seq_len``, so the
label of a row's last position is the first token of the next row, whatever its kind. After the last row stands one eos.
``row_kinds.npy`` beside the tokens (uint8 [N]) tells what a row is, an index into ``KINDS``: for audits, not for runs.

A file belongs to one of training, trusted and validation text, counts with its first 32,768 characters, and is used
once if its content stands in several places. The byte-level BPE of 1,024 tokens is learned from the training text.

Deterministic: equal seeds, Python sources and sizes give equal bytes. Another Python has other sources, hence another
text: ``manifest.json`` holds its version and the fingerprints. Cost: 4 seconds, 5 MB.
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

from titan_attent.data.format import ShardWriter, token_dtype, write_atomically, write_index
from titan_attent.data.tokenizer import Tokenizer, train_tokenizer

CORPORA = ("clean", "junk", "copies", "mixture")
SHARES = {"clean": (0.0, 0.0), "junk": (0.4, 0.0), "copies": (0.0, 0.5), "mixture": (0.3, 0.3)}
"""Shares of junk rows and of copies."""

KINDS = ("clean", "shuffled", "random", "copy")
CLEAN, SHUFFLED, RANDOM, COPY = range(4)
KINDS_FILE = "row_kinds.npy"
MANIFEST_FILE = "manifest.json"

FILE_SHARES = {"validation": 0.1, "trusted": 0.3, "train": 0.6}
"""Of the text; each part has about twice what it needs, whatever the tokenizer makes of it."""

CHARACTERS_PER_FILE = 32_768
LEFT_OUT = {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
"""Folders of tables, of tests (bad code on purpose among them) and of what is not the standard library."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much to build; the defaults are the benchmark's."""

    num_rows: int = 6144
    seq_len: int = 96
    num_copied: int = 64
    num_validation: int = 512
    num_trusted: int = 4096
    vocab_size: int = 1024


def build_corpora(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> dict[str, Any]:
    """Write the six data sets below ``folder``, or find them there; returns the manifest.

    Raises:
        ValueError: ``folder`` holds corpora of another seed, Python or size, or there is too little source text.
    """
    sizes = sizes or Sizes()
    wanted = {"seed": seed, "python": platform.python_version(), "sizes": asdict(sizes)}
    path = folder / MANIFEST_FILE
    if path.is_file():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in wanted if manifest[key] != wanted[key]]:
            was, now = ({key: values[key] for key in differing} for values in (manifest, wanted))
            raise ValueError(
                f"{folder} holds corpora of {was}, where {now} is asked for: name another folder, or remove this one "
                "and what was measured on it"
            )
        return manifest

    files = split_files(list_sources(), seed=seed)
    texts = {part: list(contents.values()) for part, contents in files.items()}
    tokenizer = train_tokenizer(texts["train"], vocab_size=sizes.vocab_size)
    rows = {
        part: make_rows(texts[part], tokenizer=tokenizer, num_rows=num_rows, seq_len=sizes.seq_len, part=part)
        for part, num_rows in (
            ("train", sizes.num_rows),
            ("validation", sizes.num_validation),
            ("trusted", sizes.num_trusted),
        )
    }
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
    manifest = wanted | {
        "fingerprints": fingerprints,
        "files": {part: sorted(contents) for part, contents in files.items()},
    }
    write_atomically(path, (json.dumps(manifest, indent=1) + "\n").encode())  # last: only with it the corpora are there
    return manifest


def list_sources() -> dict[str, str]:
    """Path below the standard library -> text, cut to ``CHARACTERS_PER_FILE``; sorted, every content once."""
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


def split_files(sources: dict[str, str], *, seed: int) -> dict[str, dict[str, str]]:
    """Deal the files, in an order shuffled by ``seed``, to the parts of ``FILE_SHARES`` by length; no file to two."""
    names = list(sources)
    order = np.random.default_rng([seed, len(CORPORA)]).permutation(len(names))
    total = sum(map(len, sources.values()))
    parts: dict[str, dict[str, str]] = {part: {} for part in FILE_SHARES}
    bounds = (np.cumsum(list(FILE_SHARES.values())) * total).tolist()
    dealt = 0
    for name in (names[i] for i in order):
        part = next((p for p, bound in zip(parts, bounds, strict=True) if dealt < bound), "train")
        parts[part][name] = sources[name]
        dealt += len(sources[name])
    return parts


def make_rows(texts: Sequence[str], *, tokenizer: Tokenizer, num_rows: int, seq_len: int, part: str) -> np.ndarray:
    """The first ``num_rows`` rows of the texts, one after the other with eos between: uint32 [num_rows, seq_len]."""
    documents = [np.append(tokenizer.encode_to_array(text), np.uint32(tokenizer.eos_id)) for text in texts]
    stream = np.concatenate(documents)
    if len(stream) < num_rows * seq_len:
        raise ValueError(
            f"the {part} files of {sysconfig.get_paths()['stdlib']} give {len(stream):,} tokens, {num_rows:,} rows of "
            f"{seq_len} need {num_rows * seq_len:,}: use a Python with its whole standard library"
        )
    return stream[: num_rows * seq_len].reshape(num_rows, seq_len)


def soil(
    rows: np.ndarray, *, junk: float, copies: float, num_copied: int, num_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replace shares of the rows, at random places, by junk and by copies.

    Args:
        rows: integers [N, L], not changed.
        num_copied: rows that are copied, among those that stay; each as often as another, but for one.
        num_tokens: random tokens are below it.

    Returns:
        The new rows [N, L], and their kinds, uint8 [N].
    """
    num_rows = len(rows)
    num_junk, num_copies = round(junk * num_rows), round(copies * num_rows)
    num_shuffled = num_junk // 2
    places = rng.permutation(num_rows)
    shuffled, random, copied, stay = np.split(
        places, np.cumsum([num_shuffled, num_junk - num_shuffled, num_copies]).tolist()
    )
    dirty, kinds = rows.copy(), np.full(num_rows, CLEAN, np.uint8)
    dirty[shuffled], kinds[shuffled] = rng.permuted(rows[shuffled], axis=1), SHUFFLED
    dirty[random], kinds[random] = rng.integers(num_tokens, size=(len(random), rows.shape[1])), RANDOM
    if num_copies:
        dirty[copied], kinds[copied] = rows[np.resize(stay[:num_copied], num_copies)], COPY
    return dirty, kinds


def write_rows(folder: Path, rows: np.ndarray, *, tokenizer: Tokenizer) -> str:
    """Write the rows and one eos as a data set whose example i is row i; returns its fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.append(rows.ravel(), tokenizer.eos_id)
    tokenizer.save(folder)
    with ShardWriter(folder / "shard-00000.bin", dtype=dtype) as writer:
        writer.append(tokens)
        shard = writer.finish()
    index = write_index(
        folder,
        dtype=dtype,
        shards=[shard],
        num_documents=int((tokens == tokenizer.eos_id).sum()),
        max_token_id=writer.max_token_id,
        tokenizer=tokenizer.info(),
    )
    return index.fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the corpora of the convergence benchmark.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the dirt (default: 0)")
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
