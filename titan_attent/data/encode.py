"""Documents to token ids, in parallel and in order: the tokenizers release the interpreter's lock.

Cost: memory for three chunks of documents a thread (or the longest documents).
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from titan_attent.data.documents import Document
from titan_attent.data.tokenizer import Tokenizer

CHUNK_CHARACTERS = 2**18
"""What a thread encodes at a time: some 20 ms of work, against microseconds to hand it over."""

Encoded = tuple[Document, np.ndarray | None]


def encode_documents(documents: Iterable[Document], *, tokenizer: Tokenizer, num_threads: int) -> Generator[Encoded]:
    """Every document with its ids and eos, uint32 [T] (None if it is not text), in order."""
    eos = np.array([tokenizer.eos_id], dtype=np.uint32)

    def encode(chunk: list[Document]) -> list[Encoded]:
        return [
            (document, None if document.text is None else np.append(tokenizer.encode_to_array(document.text), eos))
            for document in chunk
        ]

    pool = ThreadPoolExecutor(num_threads)
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in _chunks(documents):
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 2 * num_threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    num_characters = 0
    for document in documents:
        chunk.append(document)
        num_characters += len(document.text or "")
        if num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk
