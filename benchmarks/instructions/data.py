"""The data sets of the instruction experiment.

    DIR/pairs/KIND.jsonl                                all pairs of a kind (pairs.py), equal for all seeds
    DIR/data/seed-N/base/                               the text of the pretrained model; its tokenizer is everybody's
    DIR/data/seed-N/KIND/{clean,shuffled}/              the pairs that a run is fine-tuned on
    DIR/data/seed-N/KIND/right/                         those of ``shuffled`` that have their own completions
    DIR/data/seed-N/KIND/{trusted,validation}/          other pairs, clean, for the scorers and for validation
    DIR/data/seed-N/KIND/shuffled.json                  numbers of the pairs of ``shuffled`` with a wrong completion

The base text is manual pages in English and German, and prompts and completions of pairs that are in no other set,
each a document of its own: the model has seen words of the task, but not the task. Seeds have different pairs. Cost:
45 MB of downloads, a minute for the pairs, then five seconds per seed.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.corpora import texts
from benchmarks.instructions import pairs
from benchmarks.instructions.pairs import Pair
from benchmarks.instructions.rules import KINDS, SEQ_LEN_OF_PAIR, SHUFFLED
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.tiktoken_tokenizer import RANKS_FILE
from titan_attent.data.text.tokenizer import load_tokenizer
from titan_attent.data.text.writer import write_dataset

SIZES = {"train": 800, "trusted": 400, "validation": 160}
"""Pairs of a kind."""
SPARE = 1.5
"""Pairs held back for these, as a multiple: some have too many tokens."""
CHARACTERS = {"manual": 200_000, "german": 200_000} | dict.fromkeys(KINDS, 100_000)
"""Characters of the base text, of each kind of text and of pair."""
INDEX_FILE = "index.json"


def prepare(output: Path, seed: int) -> None:
    """Write the data of a seed, unless it exists; RuntimeError if packages cannot be downloaded."""
    folder = output / "data" / f"seed-{seed}"
    if (folder / "done").is_file():
        return
    texts.fetch(output / "texts", pairs.DEBS)
    every = {kind: stored_pairs(output, kind) for kind in KINDS}
    write_seed(folder, every, {kind: texts.read(output / "texts", kind) for kind in ("manual", "german")}, seed)
    (folder / "done").touch()


def stored_pairs(output: Path, kind: str) -> list[Pair]:
    """All pairs of a kind. They are read from the packages once: the docstrings take a minute."""
    file = output / "pairs" / f"{kind}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        write_lines(partial, (pair._asdict() for pair in pairs.read(output / "texts", kind)))
        partial.rename(file)
    return [Pair(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def write_seed(folder: Path, every: dict[str, list[Pair]], pages: dict[str, list[str]], seed: int) -> None:
    """Write the data sets of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    inside: dict[str, list[Pair]] = {}
    base: list[str] = []
    for kind, text in pages.items():
        base += texts.at_most(rng.sample(text, len(text)), CHARACTERS[kind])
    for kind, found in every.items():
        order = rng.sample(found, len(found))
        held_back = round(SPARE * sum(SIZES.values()))
        inside[kind] = order[:held_back]
        base += texts.at_most([text.strip() for pair in order[held_back:] for text in pair], CHARACTERS[kind])
    rng.shuffle(base)
    write(folder / "base", ({"text": text} for text in base), tokenizer="train:1024")
    ranks = folder / "base" / RANKS_FILE
    tokenizer = load_tokenizer(str(ranks))
    for kind, held_back_pairs in inside.items():
        parts = divided(held_back_pairs, tokenizer)
        wrong, numbers = pairs.shuffled(parts["train"], SHUFFLED, seed=seed)
        right = [pair for number, pair in enumerate(wrong) if number not in set(numbers)]
        sets = {"clean": parts["train"], "shuffled": wrong, "right": right} | {
            part: parts[part] for part in ("trusted", "validation")
        }
        for name, own in sets.items():
            write(folder / kind / name, (pair._asdict() for pair in own), tokenizer=str(ranks))
        (folder / kind / "shuffled.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def divided(found: Sequence[Pair], tokenizer: Tokenizer) -> dict[str, list[Pair]]:
    """The first pairs that fit into a row of validation, for each part; ValueError if there are too few."""
    fitting = [pair for pair in found if sum(len(tokenizer.encode(text)) for text in pair) <= SEQ_LEN_OF_PAIR]
    if len(fitting) < sum(SIZES.values()):
        raise ValueError(f"{len(fitting)} pairs of {len(found)} fit into {SEQ_LEN_OF_PAIR} tokens: too few")
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = fitting[start : start + size]
        start += size
    return parts


def write(folder: Path, records: Iterable[dict[str, Any]], *, tokenizer: str) -> None:
    """Write records of a text, or of a prompt and its completion, as a data set; one that exists stays."""
    if (folder / INDEX_FILE).is_file():
        return
    source = folder.with_suffix(".jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    names = write_lines(source, records)
    keys = {"prompt_key": "prompt", "completion_key": "completion"} if "prompt" in names else {}
    write_dataset([source], output=folder, tokenizer=tokenizer, num_threads=1, **keys)
    source.unlink()


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> set[str]:
    """Write JSON lines; returns the keys of the records."""
    keys: set[str] = set()
    with file.open("w", encoding="utf-8") as lines:
        for record in records:
            keys |= record.keys()
            lines.write(json.dumps(record) + "\n")
    return keys
