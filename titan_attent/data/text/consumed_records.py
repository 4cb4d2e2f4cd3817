"""The records that a writer has read so far, as a chain of hashes, to check that changed inputs begin with the same.

A user may fix or remove a record that stopped a writer: the content of the finished shards comes before it. Every
consumed record, used or not, goes into the chain, with the path and the source of its file.

Cost: one sha256 over the text. On a resume with changed inputs, the consumed records of the file at the cursor are read
again; all consumed records are, if an earlier file has another size or modification time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from titan_attent.data.text.documents import START, Document, ReadPosition, read_documents
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.records import Records


@dataclass
class ConsumedRecords:
    """Number and hash chain of the records so far, and of those before the current file."""

    num_records: int = 0
    chain: str = ""
    file: int = 0
    file_records: int = 0
    file_chain: str = ""
    files_chain: str = ""
    """Hash chain of the paths, sizes and modification times of the files before the current one."""

    def add(self, document: Document, text: bytes, *, files: Sequence[InputFile]) -> None:
        """Count a document whose text is ``text`` in UTF-8."""
        cursor = document.cursor
        number = cursor.file if cursor.row else cursor.file - 1
        if self.file < number:
            for file in files[self.file : number]:
                self.files_chain = _hash(self.files_chain, repr(tuple(file)).encode())
            self.file, self.file_records, self.file_chain = number, self.num_records, self.chain
        where = f"{files[number].path}\n{document.source}\n{document.bad.reason if document.bad else ''}\n"
        parts = [where.encode("utf-8", "surrogateescape"), text]
        if document.segments:
            parts.append(repr([(len(segment.text), segment.counts) for segment in document.segments]).encode())
        self.chain = _hash(self.chain, *parts)
        self.num_records += 1


def _hash(chain: str, *parts: bytes) -> str:
    digest = hashlib.sha256(chain.encode("ascii"))
    for part in parts:
        digest.update(b"%d\n" % len(part))
        digest.update(part)
    return digest.hexdigest()


def find_resume_point(
    consumed: ConsumedRecords, *, files: Sequence[InputFile], records: Records, max_bytes: int
) -> tuple[ReadPosition, ConsumedRecords] | None:
    """The position after the records of ``consumed`` in ``files``, and the records up to it.

    None if the files do not begin with the same records.
    """
    if consumed.num_records == 0:
        return START, ConsumedRecords()
    reread = ConsumedRecords()
    for file in files[: consumed.file]:
        reread.files_chain = _hash(reread.files_chain, repr(tuple(file)).encode())
    if consumed.file < len(files) and reread.files_chain == consumed.files_chain:
        reread.file, reread.file_chain, reread.file_records = consumed.file, consumed.file_chain, consumed.file_records
        reread.chain, reread.num_records = consumed.file_chain, consumed.file_records
    else:
        reread = ConsumedRecords()
    for document in read_documents(
        files, records=records, start=ReadPosition(reread.file), skip=True, max_bytes=max_bytes
    ):
        reread.add(document, encode_utf8(document.text or "")[0], files=files)
        if reread.num_records == consumed.num_records:
            return (document.cursor, reread) if reread.chain == consumed.chain else None
    return None


def encode_utf8(text: str) -> tuple[bytes, bool]:
    """``text`` in UTF-8, and whether it is valid: lone surrogates are encoded as they are."""
    try:
        return text.encode("utf-8"), True
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass"), False
