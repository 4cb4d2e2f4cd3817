"""Decodes examples with the tokenizer of their own data set, to show them to people.

Cost: the tokenizer once, some tenths of a second per 100,000 ids; per example one positioned read of at most
``max_tokens`` tokens.
"""

from typing import Any

import numpy as np

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import Tokenizer, open_tokenizer

TextDataset = TokenDataset | DocumentDataset


class DecodedExamples:
    """Example id -> its text.

    Args:
        dataset: windows or spans of documents.

    Attributes:
        problem: why nothing can be decoded, such as a missing rank file; token ids are shown then. Else empty.
    """

    def __init__(self, dataset: TextDataset):
        self.dataset, self.problem = dataset, ""
        self._tokenizer: Tokenizer | None = None
        try:
            self._tokenizer = open_tokenizer(dataset.shards.tokenizer_info, dataset.shards.path)
        except (KeyError, ValueError) as error:
            self.problem = str(error)

    def text(self, i: int, *, max_tokens: int) -> str:
        """The first ``max_tokens`` tokens of the inputs of example i; IndexError outside [0, N).

        Control characters are not escaped (:func:`escaped`). A character that is cut off becomes U+FFFD.
        """
        if not 0 <= i < len(self.dataset):
            raise IndexError(f"{self.dataset.shards.path}: example id {i} is outside [0, {len(self.dataset)})")
        ids = self._inputs(i, max_tokens)
        if self._tokenizer is not None:
            try:
                return self._tokenizer.decode(ids)
            except ValueError:  # an id that the tokenizer does not have
                pass
        return "token ids " + " ".join(map(str, ids.tolist()))

    def _inputs(self, i: int, max_tokens: int) -> np.ndarray:
        if isinstance(self.dataset, TokenDataset):
            start = i * self.dataset.seq_len
            return self.dataset.shards.read(start, start + min(max_tokens, self.dataset.seq_len))
        spans: Any = self.dataset.table.locate(np.array([i]))
        (shard,), (start,), (length,), _ = (column.tolist() for column in spans)
        return self.dataset.shards.read_span(shard, start, start + min(max_tokens, length))


def escaped(text: str, *, keep: str = "") -> str:
    r"""``text`` with every character that is not printable as an escape such as \n, \x1b or \u202e, except ``keep``.

    Among these are control characters, line separators, marks of the writing direction and lone surrogates, so the
    result cannot move a terminal's cursor or reverse a line.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
