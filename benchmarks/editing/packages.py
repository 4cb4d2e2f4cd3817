"""The sources of Python's standard library by package: a target to forget, one aligned with it, and others.

    rest          all other packages
    target        tkinter
    aligned       idlelib, an editor that is written with tkinter
    irrelevant    email

Files are cut into pieces of about 2,000 characters. Of each package a sixth of the pieces, at most 60, is held out for
validation; as many others are the control set that chooses coefficients.
"""

import json
import random
from pathlib import Path

from benchmarks.corpora.stdlib_code import list_sources
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.tiktoken_tokenizer import RANKS_FILE
from titan_attent.data.text.writer import write_dataset

PACKAGES = {"target": "tkinter/", "aligned": "idlelib/", "irrelevant": "email/"}
NAMES = (*PACKAGES, "rest")
PARTS = ("train", "control", "validation")
PIECE = 2000
"""Characters of a piece."""
HELD_OUT = 60
"""Pieces of a package for validation, at most."""
REST = 1_500_000
"""Characters of the rest."""


def pieces_of(seed: int) -> dict[str, dict[str, list[str]]]:
    """Name -> part -> its pieces."""
    rng = random.Random(seed)
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    for path, text in list_sources().items():
        name = next((name for name, start in PACKAGES.items() if path.startswith(start)), "rest")
        lines, piece = text.splitlines(keepends=True), ""
        for line in lines:
            piece += line
            if len(piece) >= PIECE:
                found[name].append(piece)
                piece = ""
        found[name] += [piece] if piece.strip() else []
    divided = {}
    for name, pieces in found.items():
        rng.shuffle(pieces)
        pieces = pieces[: REST // PIECE] if name == "rest" else pieces
        size = min(len(pieces) // 6, HELD_OUT)
        divided[name] = {
            "validation": pieces[:size],
            "control": pieces[size : 2 * size],
            "train": pieces[2 * size :],
        }
    return divided


def write_packages(folder: Path, seed: int) -> None:
    """Write NAME/PART below ``folder``, and ``everything``, the train parts of all, unless they exist."""
    divided = pieces_of(seed)
    everything = [piece for parts in divided.values() for piece in parts["train"]]
    random.Random(seed).shuffle(everything)
    write(folder / "everything", everything, tokenizer="train:1024")
    ranks = str(folder / "everything" / RANKS_FILE)
    for name, parts in divided.items():
        for part, pieces in parts.items():
            write(folder / name / part, pieces, tokenizer=ranks)
    held_out = [piece for parts in divided.values() for piece in parts["validation"]]
    write(folder / "validation", held_out, tokenizer=ranks)


def write(folder: Path, pieces: list[str], *, tokenizer: str) -> None:
    if (folder / INDEX_FILE).is_file():
        return
    source = folder.with_suffix(".jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    write_dataset([source], output=folder, tokenizer=tokenizer, num_threads=1)
    source.unlink()
