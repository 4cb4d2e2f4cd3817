"""Made-up languages that give words other meanings: aligned, irrelevant or contradictory to one of them.

A sentence is a word, "=", and its meaning, behind up to three words without one. The base gives all 64 words a meaning.
A language changes that of 32 words, and its text has these words alone:

    first            words 0 to 31
    aligned          the same new meanings for words 0 to 23, and new ones for words 32 to 39
    irrelevant       new meanings for words 32 to 63
    contradictory    words 0 to 31, each with another meaning than in the first and in the base
"""

import random
from pathlib import Path

import numpy as np

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.format import ShardWriter, token_dtype, write_index
from titan_attent.tasks.task import Rows
from titan_attent.tasks.vocabulary import tokenizer_of
from titan_attent.tasks.writer import documents_of

WORDS, MEANINGS, FILLERS = 64, 32, 8
NAMES = [f"{letter}{i}" for letter, size in (("w", WORDS), ("m", MEANINGS), ("f", FILLERS)) for i in range(size)] + [
    "="
]
"""The words of all languages."""
FIRST, RELATED = "first", ("aligned", "irrelevant", "contradictory")
SENTENCES = {"base": 20_000, FIRST: 8_000} | dict.fromkeys(RELATED, 8_000)
"""Language -> sentences of its training text; a twentieth as many are for validation."""
LONGEST = 8
"""Tokens of a sentence, at most."""


def meanings(seed: int) -> dict[str, dict[int, int]]:
    """Language -> word -> its meaning, for the words that its text has."""
    rng = random.Random(seed)
    base = {word: rng.randrange(MEANINGS) for word in range(WORDS)}

    def other(*taken: int) -> int:
        return rng.choice([meaning for meaning in range(MEANINGS) if meaning not in taken])

    first = {word: other(base[word]) for word in range(32)}
    aligned = {word: first[word] for word in range(24)} | {word: other(base[word]) for word in range(32, 40)}
    irrelevant = {word: other(base[word]) for word in range(32, 64)}
    contradictory = {word: other(base[word], first[word]) for word in range(32)}
    languages = {"base": base, FIRST: first, "aligned": aligned, "irrelevant": irrelevant}
    return languages | {"contradictory": contradictory}


def write_languages(folder: Path, seed: int) -> None:
    """Write LANGUAGE/train and LANGUAGE/validation below ``folder``, unless they exist."""
    numbers = {name: number for number, name in enumerate(NAMES)}
    tokenizer = tokenizer_of("languages", NAMES)
    for number, (language, own) in enumerate(meanings(seed).items()):
        for part, share in (("train", 1.0), ("validation", 0.05)):
            target = folder / language / part
            if (target / INDEX_FILE).is_file():
                continue
            rng = random.Random(f"{seed} {number} {part}")
            words: list[int] = []
            ends: list[int] = []
            for _ in range(round(share * SENTENCES[language])):
                word = rng.choice(sorted(own))
                fillers = [f"f{rng.randrange(FILLERS)}" for _ in range(rng.randint(0, 3))]
                words += [numbers[name] for name in (*fillers, f"w{word}", "=", f"m{own[word]}")]
                ends.append(len(words))
            counts = np.zeros(len(words), dtype=bool)
            counts[np.array(ends) - 1] = True
            target.mkdir(parents=True)
            tokenizer.save(target)
            rows = Rows(words=np.array(words), ends=np.array(ends), counts=counts)
            dtype = token_dtype(tokenizer.vocab_size)
            with ShardWriter(target / "shard-00000.bin", dtype=dtype, source=language, mask=True) as shard:
                shard.append_documents(*documents_of(rows, eos_id=tokenizer.eos_id))
                entry = shard.finish()
            write_index(
                target,
                dtype=dtype,
                shards=[entry],
                num_documents=len(ends),
                max_token_id=tokenizer.eos_id,
                tokenizer=tokenizer.info(),
            )
