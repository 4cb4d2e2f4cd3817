"""What a writer has read so far, as a chain of hashes: whether other inputs begin with the same.

A record that stopped a writer may be mended or removed: all that the finished shards hold lies in front of it. Every
record that is consumed, used or not, goes into the chain with the path and the source of its file.

Cost: one sha256 over the text; on a resume with changed inputs, what was consumed of the file at the cursor is read
again, or everything if a file in front of it has another size or time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from titan_attent.data.text.documents import START, Document, ReadPosition, read_documents
from titan_attent.data.text.inputs import InputFile


@dataclass
class Consumed:
    """The records so far, and those in front of the file that is being read."""

    num_records: int = 0
    chain: str = ""
    file: int = 0
    file_records: int = 0
    file_chain: str = ""
    files_chain: str = ""
    """Of paths, sizes and times of the files in front."""

    def add(self, document: Document, text: bytes, *, files: Sequence[InputFile]) -> None:
        """Count a document whose text is ``text`` in UTF-8."""
        cursor = document.cursor
        number = cursor.file if cursor.row else cursor.file - 1
        if self.file < number:
            for file in files[self.file : number]:
                self.files_chain = _hash(self.files_chain, repr(tuple(file)).encode())
            self.file, self.file_records, self.file_chain = number, self.num_records, self.chain
        where = f"{files[number].path}\n{document.source}\n{document.bad.reason if document.bad else ''}\n"
        self.chain = _hash(self.chain, where.encode("utf-8", "surrogateescape"), text)
        self.num_records += 1


def _hash(chain: str, *parts: bytes) -> str:
    digest = hashlib.sha256(chain.encode("ascii"))
    for part in parts:
        digest.update(b"%d\n" % len(part))
        digest.update(part)
    return digest.hexdigest()


def find_again(
    consumed: Consumed, *, files: Sequence[InputFile], text_key: str, max_bytes: int
) -> tuple[ReadPosition, Consumed] | None:
    """Behind the records of ``consumed`` in ``files``: the cursor, and what was read; None if they begin with
    others."""
    if consumed.num_records == 0:
        return START, Consumed()
    again = Consumed()
    for file in files[: consumed.file]:
        again.files_chain = _hash(again.files_chain, repr(tuple(file)).encode())
    if consumed.file < len(files) and again.files_chain == consumed.files_chain:
        again.file, again.file_chain, again.file_records = consumed.file, consumed.file_chain, consumed.file_records
        again.chain, again.num_records = consumed.file_chain, consumed.file_records
    else:
        again = Consumed()
    for document in read_documents(
        files, text_key=text_key, start=ReadPosition(again.file), skip=True, max_bytes=max_bytes
    ):
        again.add(document, in_utf8(document.text or "")[0], files=files)
        if again.num_records == consumed.num_records:
            return (document.cursor, again) if again.chain == consumed.chain else None
    return None


def in_utf8(text: str) -> tuple[bytes, bool]:
    """``text`` in UTF-8, and whether it could be: lone surrogates are kept as they are."""
    try:
        return text.encode("utf-8"), True
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass"), False
