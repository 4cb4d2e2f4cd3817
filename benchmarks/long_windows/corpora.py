"""Corpora whose documents are shorter than a window: 200 to 2,000 tokens each, wanted and unwanted ones shuffled.

    stdlib      code of Python's library; unwanted are its character tables, and compiled modules in base64
    manual      English manual pages; unwanted are code and German manual pages (single_pass has it as "target")
    junk        code of Python packages; unwanted are 40% of its documents: the words of half of them are shuffled, the
                others have random characters (single_pass has it as "junk")
    other_kind  Python modules mixed with character tables, whole; the trusted text is C headers, which are of another
                kind than the data

All text is real: from the running Python (scripts/quickstart_data.py, C headers) and from benchmarks/corpora/texts.py.
Trusted and validation text are wanted text, from other documents than the training text.
"""

import json
import random
import re
import string
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.corpora import texts

ROOT = Path(__file__).resolve().parents[2]
LEAST, MOST = 600, 6000
"""Characters of a document: 200 to 2,000 tokens of the writer's 1,024."""
SHORTEST = 200
"""Characters; what is left of a text behind its last cut is dropped if it is shorter."""
CHARACTERS = {"train": 4_200_000, "trusted": 1_000_000, "validation": 300_000}
"""Characters of the corpora from packages."""
JUNK = 0.4

Corpus = dict[str, list[str]]
"""The documents "train", "clean" (the wanted ones among them), "trusted" and "validation"."""


def corpus(name: str, folder: Path, seed: int) -> Corpus:
    """The documents of a corpus; ``folder`` keeps the texts they are made from. RuntimeError if those are not there."""
    rng = random.Random(seed)
    if name == "other_kind":
        of = standard_library(folder)
        headers = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
        train = of["code"] + of["tables"]
        rng.shuffle(train)
        trusted = [path.read_text(encoding="utf-8", errors="ignore") for path in headers]
        return {"train": train, "clean": of["code"], "trusted": trusted, "validation": of["trusted"] + of["validation"]}
    if name == "stdlib":
        of = standard_library(folder)
        wanted, trusted, validation = (cut(of[part], rng) for part in ("code", "trusted", "validation"))
        return shuffled(wanted, cut(of["tables"] + of["encoded"], rng), trusted, validation, rng)
    texts.fetch(folder)
    kind = "manual" if name == "manual" else "code"
    parts = divided(texts.read(folder, kind), rng)
    budget = CHARACTERS["train"]
    trusted = texts.at_most(cut(parts["trusted"], rng), CHARACTERS["trusted"])
    validation = texts.at_most(cut(parts["validation"], rng), CHARACTERS["validation"])
    if name == "manual":
        wanted = texts.at_most(cut(parts["train"], rng), budget // 3)
        others = [texts.at_most(cut(mixed(texts.read(folder, of), rng), rng), budget // 3) for of in ("code", "german")]
        return shuffled(wanted, others[0] + others[1], trusted, validation, rng)
    documents = texts.at_most(cut(parts["train"], rng), budget)
    count = round(JUNK * len(documents))
    junk = [(shuffled_words if i % 2 else random_characters)(text, rng) for i, text in enumerate(documents[:count])]
    return shuffled(documents[count:], junk, trusted, validation, rng)


def standard_library(folder: Path) -> Corpus:
    """The quickstart's files, whole."""
    if not (folder / "validation.jsonl").is_file():
        subprocess.run([sys.executable, "scripts/quickstart_data.py", folder, "--whole"], cwd=ROOT, check=True)
    names = ("code", "tables", "encoded", "trusted", "validation")
    return {name: [json.loads(line)["text"] for line in open(folder / f"{name}.jsonl")] for name in names}


def divided(documents: Sequence[str], rng: random.Random) -> Corpus:
    """Whole texts in random order: 70% for training, 20% trusted, 10% for validation."""
    order = mixed(documents, rng)
    tenth = len(order) // 10
    return {"validation": order[:tenth], "trusted": order[tenth : 3 * tenth], "train": order[3 * tenth :]}


def mixed(documents: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(documents, len(documents))


def cut(whole: Sequence[str], rng: random.Random) -> list[str]:
    """Cut texts at random lengths of ``LEAST`` to ``MOST`` characters, whose logarithms are uniform."""
    parts = []
    for text in whole:
        while len(text) > SHORTEST:
            size = round(LEAST * (MOST / LEAST) ** rng.random())
            parts.append(text[:size])
            text = text[size:]
    return parts


def shuffled(
    wanted: Sequence[str], unwanted: Sequence[str], trusted: list[str], validation: list[str], rng: random.Random
) -> Corpus:
    marked = [(text, True) for text in wanted] + [(text, False) for text in unwanted]
    rng.shuffle(marked)
    train, clean = [text for text, _ in marked], [text for text, good in marked if good]
    return {"train": train, "clean": clean, "trusted": trusted, "validation": validation}


def shuffled_words(text: str, rng: random.Random) -> str:
    words = re.split(r"(\s+)", text)
    rng.shuffle(words)
    return "".join(words)


def random_characters(text: str, rng: random.Random) -> str:
    """About as many tokens as ``text``: three of its characters are a token, but hardly more than one of these."""
    return "".join(rng.choices(string.printable[:95], k=len(text) // 3))
