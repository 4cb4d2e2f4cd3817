"""The corpora of the single-pass experiment: a run sees 40% of each once; some contain real dirt.

    python -m benchmarks.single_pass.corpora --output outputs/evidence/corpora --texts outputs/texts --wiki FILE

    clean            code
    junk             code, 40% of its rows junk: half shuffled, half random tokens
    copies           code, 50% copies of 500 of the unchanged rows
    mixture          code, 30% junk and 30% copies
    near_duplicates  72% manual pages, 28% licence files, which repeat each other with small changes; no two rows equal
    target           a third each of code, manual pages, German manual pages; the target is manual pages
    minority         90% code, 10% Russian manual pages; the target is both
    web              30% prose, 40% pages with menus and headers, 15% tables, 10% base64, 5% scripts

    validation-KIND  1,024 rows of the target kind, from other documents (minority: half code, half Russian)
    trusted-KIND     4,096 rows of the same kind, from yet other documents (minority: in the shares of the corpus)

Documents, not rows, are divided among training, trusted and validation text. ``KINDS_FILE`` beside the tokens holds the
kind of each row, an index into the manifest's ``kinds``. ``CORPUS-dedup`` is a corpus without the rows that share 50
consecutive tokens with an earlier one (Lee et al. 2022); it exists where these are more than 1%. The manifest has three
counts: these rows, rows that are equal as a whole, and near-duplicates by MinHash (datasketch; Jaccard similarity of
5-grams above 0.7).

Deterministic for equal texts; the manifest holds all fingerprints. Cost: 4 minutes, 100 MB.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from benchmarks.corpora import texts
from benchmarks.corpora.stdlib_code import CLEAN, COPY, KINDS_FILE, MANIFEST_FILE, RANDOM, SHUFFLED, soil, write_rows
from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.tiktoken_tokenizer import train_tokenizer

SEQ_LEN = 96
NUM_ROWS = 32_000
NUM_VALIDATION = 1024
NUM_TRUSTED = 4096
NUM_COPIED = 500
VOCAB_SIZE = 1024
WINDOW = 50
"""Consecutive tokens that make two rows duplicates when they share them."""
SIMILARITY = 0.7
DIRT = {CLEAN: "code", SHUFFLED: "shuffled", RANDOM: "random", COPY: "copy"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The composition of a corpus: shares of kinds of text, then the shares of rows replaced by junk and copies."""

    shares: dict[str, float]
    target: dict[str, float]
    """Shares of the trusted rows; the validation rows are an equal number of each."""
    name: str
    """The KIND in the names of its validation and trusted rows."""
    junk: float = 0.0
    copies: float = 0.0


_CODE = {"code": 1.0}
_MANUAL = {"manual": 1.0}
_MINORITY = {"code": 0.9, "russian": 0.1}

CORPORA = {
    "clean": Corpus(shares=_CODE, target=_CODE, name="code"),
    "junk": Corpus(shares=_CODE, target=_CODE, name="code", junk=0.4),
    "copies": Corpus(shares=_CODE, target=_CODE, name="code", copies=0.5),
    "mixture": Corpus(shares=_CODE, target=_CODE, name="code", junk=0.3, copies=0.3),
    "near_duplicates": Corpus(shares={"manual": 0.72, "licence": 0.28}, target=_MANUAL, name="manual"),
    "target": Corpus(shares={"code": 1 / 3, "manual": 1 / 3, "german": 1 / 3}, target=_MANUAL, name="manual"),
    "minority": Corpus(shares=_MINORITY, target=_MINORITY, name="minority"),
    "web": Corpus(
        shares={"prose": 0.3, "page": 0.4, "table": 0.15, "base64": 0.1, "script": 0.05},
        target={"prose": 1.0},
        name="prose",
    ),
}
KINDS = (
    "code",
    "shuffled",
    "random",
    "copy",
    "manual",
    "licence",
    "german",
    "russian",
    "page",
    "table",
    "base64",
    "script",
    "prose",
)


def build(folder: Path, *, texts_folder: Path, wiki: Path | None, seed: int = 0) -> dict[str, Any]:
    """Write the corpora below ``folder`` unless they exist; returns the manifest.

    Raises:
        ValueError: a kind has too little text.
        RuntimeError: the texts cannot be downloaded.
    """
    path = folder / MANIFEST_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    texts.fetch(texts_folder)
    documents: dict[str, list[str]] = {}
    for i, kind in enumerate(sorted({kind for corpus in CORPORA.values() for kind in corpus.shares})):
        unordered = texts.read(texts_folder, kind, wiki=wiki)
        order = np.random.default_rng([seed, i]).permutation(len(unordered))
        documents[kind] = [unordered[j] for j in order]
    sample = [text[:8192] for kind in sorted(documents) for text in documents[kind][:150]]
    tokenizer = train_tokenizer(sample, vocab_size=VOCAB_SIZE)
    # A tenth of the documents of target kinds is for validation, and two tenths are trusted text.
    rows: dict[tuple[str, str], np.ndarray] = {}
    targets = {kind for corpus in CORPORA.values() for kind in corpus.target}
    for kind, own in documents.items():
        tenth = len(own) // 10 if kind in targets else 0
        for part, part_of in (
            ("validation", own[:tenth]),
            ("trusted", own[tenth : 3 * tenth]),
            ("train", own[3 * tenth :]),
        ):
            rows[kind, part] = make_rows(part_of, tokenizer=tokenizer) if part_of else np.zeros((0, SEQ_LEN), np.uint32)
    manifest: dict[str, Any] = {"seed": seed, "kinds": KINDS, "fingerprints": {}, "duplicates": {}}
    for i, (name, corpus) in enumerate(CORPORA.items()):
        print(f"corpus {name}", flush=True)
        rng = np.random.default_rng([seed, 100 + i])
        made, kinds = deal(rows, corpus.shares, "train", NUM_ROWS, rng)
        if corpus.junk or corpus.copies:
            made, dirt = soil(
                made, junk=corpus.junk, copies=corpus.copies, num_copied=NUM_COPIED, num_tokens=VOCAB_SIZE - 1, rng=rng
            )
            kinds = np.array([KINDS.index(DIRT[j]) for j in range(4)], np.uint8)[dirt]
        manifest["fingerprints"][name] = write_rows(folder / name, made, tokenizer=tokenizer)
        np.save(folder / name / KINDS_FILE, kinds)
        keep = without_shared_windows(made)
        manifest["duplicates"][name] = {
            "rows": len(made),
            "equal": len(made) - len(np.unique(made, axis=0)),
            "window": int((~keep).sum()),
            "minhash": minhash_duplicates(made),
        }
        if (~keep).mean() > 0.01:
            manifest["fingerprints"][f"{name}-dedup"] = write_rows(
                folder / f"{name}-dedup", made[keep], tokenizer=tokenizer
            )
            np.save(folder / f"{name}-dedup" / KINDS_FILE, kinds[keep])
    for corpus in {corpus.name: corpus for corpus in CORPORA.values()}.values():
        rng = np.random.default_rng([seed, 200, sorted(corpus.target).index(min(corpus.target))])
        equal = {kind: 1 / len(corpus.target) for kind in corpus.target}
        for part, shares, number in (
            ("validation", equal, NUM_VALIDATION),
            ("trusted", corpus.target, NUM_TRUSTED),
        ):
            made, kinds = deal(rows, shares, part, number, rng, in_order=part == "trusted")
            where = folder / f"{part}-{corpus.name}"
            manifest["fingerprints"][where.name] = write_rows(where, made, tokenizer=tokenizer)
            np.save(where / KINDS_FILE, kinds)
    write_atomically(path, (json.dumps(manifest, indent=1) + "\n").encode())  # last: it marks the corpora as complete
    return manifest


def make_rows(documents: Sequence[str], *, tokenizer: Tokenizer) -> np.ndarray:
    """All different rows of the texts, one text after the other with eos between: uint32 [n, SEQ_LEN]."""
    encoded = [np.append(tokenizer.encode_to_array(text), np.uint32(tokenizer.eos_id)) for text in documents]
    stream = np.concatenate(encoded)
    rows = stream[: len(stream) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


def deal(
    rows: dict[tuple[str, str], np.ndarray],
    shares: dict[str, float],
    part: str,
    number: int,
    rng: np.random.Generator,
    *,
    in_order: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """``number`` rows in these shares, and their kinds, uint8.

    They are in random order, or with ``in_order`` sorted by kind and document, as text is on a disk.
    """
    taken, kinds = [], []
    for kind, share in shares.items():
        available, count = rows[kind, part], round(share * number)
        if kind == list(shares)[-1]:
            count = number - sum(map(len, taken))
        if len(available) < count:
            raise ValueError(f"there are {len(available):,} rows of {kind} for {part}, but {count:,} are needed")
        indices = rng.permutation(len(available))[:count]
        taken.append(available[np.sort(indices) if in_order else indices])
        kinds.append(np.full(count, KINDS.index(kind), np.uint8))
    order = np.arange(number) if in_order else rng.permutation(number)
    return np.concatenate(taken)[order], np.concatenate(kinds)[order]


def without_shared_windows(rows: np.ndarray) -> np.ndarray:
    """bool [N]: False for rows that share ``WINDOW`` consecutive tokens with an earlier kept row."""
    seen: set[bytes] = set()
    keep = np.ones(len(rows), bool)
    for i, row in enumerate(rows.astype("<u2")):
        data = row.tobytes()
        windows = {data[2 * j : 2 * (j + WINDOW)] for j in range(rows.shape[1] - WINDOW + 1)}
        keep[i] = seen.isdisjoint(windows)
        if keep[i]:
            seen |= windows
    return keep


def minhash_duplicates(rows: np.ndarray) -> int:
    """The number of near-duplicates of an earlier row by MinHash, which estimates the Jaccard similarity."""
    index = MinHashLSH(threshold=SIMILARITY, num_perm=64)
    num_duplicates = 0
    for i, row in enumerate(rows.astype("<u2")):
        data = row.tobytes()
        sketch = MinHash(num_perm=64, seed=1)
        sketch.update_batch([data[2 * j : 2 * j + 10] for j in range(len(row) - 4)])
        if index.query(sketch):
            num_duplicates += 1
        else:
            index.insert(i, sketch)
    return num_duplicates


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the corpora of the single-pass experiment.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts; they are downloaded if missing")
    parser.add_argument("--wiki", type=Path, help="a file of WikiText-2, for prose")
    args = parser.parse_args(argv)
    try:
        manifest = build(args.output, texts_folder=args.texts, wiki=args.wiki)
    except (ValueError, RuntimeError) as error:
        print(f"evidence_corpora: {error}", file=sys.stderr)
        return 2
    for name, counts in manifest["duplicates"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
