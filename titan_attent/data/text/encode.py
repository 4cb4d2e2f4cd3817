"""Encodes documents to token ids on threads, in order; the tokenizers release the interpreter lock.

Cost: memory for ``PENDING_CHUNKS`` chunks of documents per thread. The queue is bounded by the number of characters. A
longer document is queued alone, while one more is read.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.documents import Document

CHUNK_CHARACTERS = 2**18
"""Characters per chunk, the unit of work of a thread: about 20 ms to encode, microseconds to queue."""

PENDING_CHUNKS = 2
"""Chunks per thread in the queue; twice as many characters if documents are longer than a chunk."""

Encoded = tuple[Document, np.ndarray | None, np.ndarray | None]
"""A document, its ids with eos (uint32 [T]; None if it is unusable), and whether each counts as a label (bool [T]; None
if all do)."""


def encode_documents(documents: Iterable[Document], *, tokenizer: Tokenizer, num_threads: int) -> Generator[Encoded]:
    """Yield every document with its ids, in order. The segments of a document are encoded one by one (records.py)."""
    eos = np.array([tokenizer.eos_id], dtype=np.uint32)

    def encode_one(document: Document) -> Encoded:
        if document.text is None:
            return document, None, None
        if not document.segments:
            return document, np.append(tokenizer.encode_to_array(document.text), eos), None
        chunks = [
            tokenizer.encode_markup(segment.text) if segment.markup else tokenizer.encode_to_array(segment.text)
            for segment in document.segments
        ]
        # The eos counts like the last segment.
        counts = [segment.counts for segment in (*document.segments, document.segments[-1])]
        return document, np.concatenate([*chunks, eos]), np.repeat(counts, [*map(len, chunks), 1])

    def encode(chunk: list[Document]) -> list[Encoded]:
        return [encode_one(document) for document in chunk]

    pool = ThreadPoolExecutor(num_threads)
    pending: deque[tuple[Future[list[Encoded]], int]] = deque()
    queued, max_queued = 0, 2 * PENDING_CHUNKS * num_threads * CHUNK_CHARACTERS
    try:
        for chunk, size in _chunks(documents):
            while pending and (queued + size > max_queued or len(pending) >= PENDING_CHUNKS * num_threads + 1):
                future, done = pending.popleft()
                yield from future.result()
                queued -= done
            pending.append((pool.submit(encode, chunk), size))
            queued += size
        while pending:
            yield from pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    """Yield chunks and their numbers of characters."""
    chunk: list[Document] = []
    num_characters = 0
    for document in documents:
        size = len(document.text or "")
        if chunk and num_characters + size > 2 * CHUNK_CHARACTERS:  # a long document goes alone
            yield chunk, num_characters
            chunk, num_characters = [], 0
        chunk.append(document)
        num_characters += size
        if num_characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_CHARACTERS:
            yield chunk, num_characters
            chunk, num_characters = [], 0
    if chunk:
        yield chunk, num_characters
