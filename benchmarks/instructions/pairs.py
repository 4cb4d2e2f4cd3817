"""Instruction pairs that packages carry: a prompt and its completion. Nothing is synthetic.

    messages     an English message of a program -> its German translation (message catalogues of Debian and Django)
    docstrings   the signature of a Python function -> the first line of its docstring (standard library, four packages)
    dictionary   a word with its part of speech -> its first definition (WordNet, as dict-wn holds it)

A pair is kept if prompt and completion fit on a line of ``LONGEST`` characters, and neither has occurred before. So no
held-out pair repeats a trained one.
"""

import ast
import gettext
import gzip
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

CATALOGUES = ("coreutils", "gettext", "git", "gnupg-l10n", "libc-l10n")
"""Debian packages with German message catalogues; Django has more."""
DICTIONARY = "dict-wn"
DEBS = ("git-man", "manpages", "manpages-de", "manpages-dev", *CATALOGUES, DICTIONARY)
"""Debian packages with the pairs, and with the text that a model is pretrained on."""
LONGEST = 90
LEAST = 4
"""Characters of a prompt and of a completion."""


class Pair(NamedTuple):
    prompt: str
    completion: str


def read(folder: Path, kind: str) -> list[Pair]:
    """The pairs of a kind in a fixed order; call ``texts.fetch(folder, DEBS)`` first."""
    return distinct(KINDS[kind](folder))


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs of a bearable length whose prompt and completion are both new."""
    prompts, completions, kept = set(), set(), []
    for pair in pairs:
        prompt, completion = pair.prompt.strip(), pair.completion.strip()
        fits = all(LEAST <= len(text) <= LONGEST for text in (prompt, completion))
        if fits and prompt not in prompts and completion not in completions:
            prompts.add(prompt)
            completions.add(completion)
            kept.append(pair)
    return kept


def shuffled(pairs: Sequence[Pair], share: float, *, seed: int) -> tuple[list[Pair], list[int]]:
    """Exchange the completions of a random share of the pairs among them; the order of the prompts stays.

    Returns the pairs, and the numbers of those that have another pair's completion, ascending.
    """
    chosen = random.Random(seed).sample(range(len(pairs)), round(share * len(pairs)))
    made = list(pairs)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        made[here] = Pair(pairs[here].prompt, pairs[there].completion)
    return made, sorted(chosen)


# -- the kinds --------------------------------------------------------------------------------------------------------


def messages(folder: Path) -> Iterator[Pair]:
    """The one-line messages of all catalogues, without those of a context or with a plural."""
    for package in CATALOGUES:
        for path in sorted((folder / "packages" / package).rglob("de/LC_MESSAGES/*.mo")):
            yield from catalogue(path.read_bytes())
    (wheel,) = (folder / "wheels").glob("Django-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("locale/de/LC_MESSAGES/django.mo"):
                yield from catalogue(archive.read(name))


def catalogue(data: bytes) -> Iterator[Pair]:
    """The translated one-line messages of a compiled catalogue."""
    # gettext has no public way to list a catalogue. Plurals have keys (message, number), contexts end with \x04.
    entries = gettext.GNUTranslations(BytesIO(data))._catalog  # type: ignore[attr-defined]
    for source, translation in entries.items():
        if not isinstance(source, str):
            continue
        source, translation = source.strip(), translation.strip()
        if source != translation and not re.search(r"[\n\x04]", source + translation):
            yield Pair(f"{source}\nde: ", translation)


def docstrings(folder: Path) -> Iterator[Pair]:
    """Functions of the running Python's library without its tests, then those of the packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "idle_test"} & set(path.parts):
            yield from functions(path.read_bytes())
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py") and "/tests/" not in name:
                    yield from functions(archive.read(name))


def functions(source: bytes) -> Iterator[Pair]:
    """The functions of a module that have a docstring, in the order of the file; none if it is no Python."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, *_ = (ast.get_docstring(node) or "").strip().splitlines() or [""]
            yield Pair(f'def {node.name}({ast.unparse(node.args)}):\n    """', first)


def dictionary(folder: Path) -> Iterator[Pair]:
    """The words of WordNet in the order of the file."""
    root = folder / "packages" / DICTIONARY / "usr" / "share" / "dictd"
    yield from definitions(gzip.decompress((root / "wn.dict.dz").read_bytes()).decode())


def definitions(text: str) -> Iterator[Pair]:
    """The first definition of each entry, without synonyms and examples. Entries begin in the first column."""
    first_sense = r"^(\S.*)\n    (n|v|adj|adv) 1: (.*(?:\n {6,}(?!\d+: ).*)*)"
    for word, part, definition in re.findall(first_sense, text, flags=re.MULTILINE):
        meaning, *_ = re.split(r"\[|; \"", re.sub(r"\s+", " ", definition))
        yield Pair(f"{word} ({part}): ", meaning.strip(" ;"))


KINDS = {"messages": messages, "docstrings": docstrings, "dictionary": dictionary}
