"""The quickstart's text: documents of code and of dirt, from the running Python, as .jsonl files.

    python scripts/quickstart_data.py data/quickstart/text [--whole]

    code        packages of the standard library: the target
    tables      its character tables (encodings/): long and regular, useless for a model of code
    encoded     its compiled modules in base64, as they occur in text from the web
    trusted     single modules of the standard library, a to m
    validation  those from u to z

All text is real, in documents of about 1,000 characters; its proportions are chosen so that about half of the training
tokens are dirt. With --whole files are not split into documents.
"""

import base64
import json
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

CODE = ("asyncio", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging", "multiprocessing")
CODE += ("sqlite3", "unittest", "urllib", "wsgiref", "xml")
MAX_CHARACTERS = 65_536
"""Characters of a file, or bytes of a compiled module, that are used."""
MAX_TABLE_CHARACTERS = 4096
DOCUMENT_CHARACTERS = 1000
"""About this long are documents: whole paragraphs, as far as they are shorter."""
NUM_ENCODED = 8
"""Number of compiled modules."""


def texts(paths: Iterable[Path]) -> list[str]:
    documents = []
    for path in sorted(paths):
        if "test" not in path.parts and "tests" not in path.parts:
            text = path.read_bytes().decode("utf-8", errors="ignore")[:MAX_CHARACTERS]
            if text.strip():
                documents.append(text)
    return documents


def split(text: str) -> list[str]:
    """Documents: paragraphs, joined until they have ``DOCUMENT_CHARACTERS``; longer ones are cut."""
    documents, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        while len(current) >= 2 * DOCUMENT_CHARACTERS:
            documents.append(current[:DOCUMENT_CHARACTERS])
            current = current[DOCUMENT_CHARACTERS:]
        if len(current) >= DOCUMENT_CHARACTERS:
            documents.append(current)
            current = ""
    return [*documents, current] if current.strip() else documents


def main(folder: Path, *, whole: bool = False) -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = list(stdlib.glob("*.py"))
    compiled = [*sorted(stdlib.glob("lib-dynload/*.so")), *sorted(stdlib.glob("__pycache__/*.pyc"))][:NUM_ENCODED]
    documents = {
        "code": texts(path for package in CODE for path in (stdlib / package).rglob("*.py")),
        "tables": [text[:MAX_TABLE_CHARACTERS] for text in texts((stdlib / "encodings").glob("*.py"))],
        "encoded": [base64.encodebytes(path.read_bytes()[:MAX_CHARACTERS]).decode("ascii") for path in compiled],
        "trusted": texts(path for path in modules if path.name < "n"),
        "validation": texts(path for path in modules if path.name >= "u"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in documents.items():
        parts = files if whole else [document for file in files for document in split(file)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in parts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), whole="--whole" in sys.argv[2:])
