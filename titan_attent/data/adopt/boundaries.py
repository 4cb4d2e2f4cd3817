"""Which ids separate documents, and on which side they stand.

    eos      ... a b eos | c d eos | ...      nanoGPT, OLMo, rows of llm-foundry
    bos      bos a b | bos c d | ...          llm.c, modded-nanogpt
    eos-bos  ... a eos | bos c ...            an eos without a bos behind it is inside a document

Tokens before the first separator, or behind the last one, are a document, too: the rest of one that was cut.
Cost: one comparison per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_attent.data.adopt.options import Options
from titan_attent.data.formats.token_file import BOS, EOS, EOS_BOS, INDEX, NONE, TokenFile, bad
from titan_attent.data.text.any_tokenizer import special_id


@dataclass(frozen=True)
class Rule:
    """How the documents of a file are found: one of ``BOUNDARIES``, and the ids, -1 if they are not read."""

    kind: str
    eos_id: int = -1
    bos_id: int = -1

    def ends(self, tokens: np.ndarray, previous: int) -> np.ndarray:
        """int64 [n], rising: where documents end among ``tokens`` [T], from 0 (before the first) to T.

        Args:
            previous: the token before the first; -1 if there is none.
        """
        if self.kind == EOS:
            return np.flatnonzero(tokens == self.eos_id) + 1
        starts = np.flatnonzero(tokens == self.bos_id)
        if self.kind == BOS:
            return starts
        before = tokens[np.maximum(starts - 1, 0)] == self.eos_id
        if len(starts) and starts[0] == 0:
            before[0] = previous == self.eos_id
        return starts[before]

    def is_whole(self, first: int, last: int) -> bool:
        """Whether a file with these first and last tokens begins and ends with whole documents, as far as they tell."""
        return last == self.eos_id if self.kind == EOS else first == self.bos_id


def rule_of(file: TokenFile, options: Options, *, tokenizer: dict[str, Any]) -> Rule:
    """The rule for ``file``.

    Raises:
        ValueError: it has no index for ``--boundaries index``, no id is known, or an id does not fit.
    """
    kind = options.boundaries or (EOS_BOS if file.boundaries == EOS and options.bos else file.boundaries)
    if kind == NONE:
        return Rule(NONE)
    if kind == INDEX:
        if file.ends is None:
            raise bad(file.path, "its format has no index of documents", "use --boundaries eos or --boundaries bos")
        return Rule(INDEX)
    eos_id = bos_id = -1
    if kind in (EOS, EOS_BOS):
        eos_id = special_id(options.eos, option="--eos", tokenizer=tokenizer) if options.eos else tokenizer["eos_id"]
    if kind in (BOS, EOS_BOS):
        if options.bos:
            bos_id = special_id(options.bos, option="--bos", tokenizer=tokenizer)
        elif file.bos_id is None:
            raise bad(file.path, "its format does not say which id begins a document", "name it with --bos")
        elif file.bos_id >= tokenizer["vocab_size"]:
            raise bad(
                file.path,
                f"its format begins documents with the id {file.bos_id}, and the tokenizer has "
                f"{tokenizer['vocab_size']} ids",
                "give the tokenizer of the files, or name the id with --bos, or use --boundaries eos or none",
            )
        else:
            bos_id = file.bos_id
    if max(eos_id, bos_id) > np.iinfo(file.dtype).max:
        raise bad(
            file.path,
            f"its tokens are {file.dtype.name}, which cannot be the id {max(eos_id, bos_id)} that separates documents",
            "give the tokenizer of the files, or --eos or --bos",
        )
    return Rule(kind, eos_id, bos_id)
