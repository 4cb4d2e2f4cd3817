"""The quickstart's text: documents of code and of dirt, from the Python that runs this, as .jsonl files.

    python scripts/quickstart_data.py data/quickstart/text

    code        packages of the standard library: what is wanted
    tables      its character tables (encodings/): long, regular, of no use to who wants code
    encoded     its compiled modules in base64, as they lie about in text from the web
    trusted     modules of the standard library beside the packages, a to m
    validation  those from u to z

Real text throughout; only its proportions are chosen: about half of the training tokens are dirt.
"""

import base64
import json
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

CODE = ("asyncio", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging", "multiprocessing")
CODE += ("sqlite3", "unittest", "urllib", "wsgiref", "xml")
MOST = 65_536
"""Characters of a document."""
MOST_OF_TABLE = 4096
ENCODED = 8
"""Compiled modules."""


def texts(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in sorted(paths):
        if "test" not in path.parts and "tests" not in path.parts:
            text = path.read_bytes().decode("utf-8", errors="ignore")[:MOST]
            if text.strip():
                found.append(text)
    return found


def main(folder: Path) -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = list(stdlib.glob("*.py"))
    compiled = [*sorted(stdlib.glob("lib-dynload/*.so")), *sorted(stdlib.glob("__pycache__/*.pyc"))][:ENCODED]
    documents = {
        "code": texts(path for package in CODE for path in (stdlib / package).rglob("*.py")),
        "tables": [text[:MOST_OF_TABLE] for text in texts((stdlib / "encodings").glob("*.py"))],
        "encoded": [base64.encodebytes(path.read_bytes()[:MOST]).decode("ascii") for path in compiled],
        "trusted": texts(path for path in modules if path.name < "n"),
        "validation": texts(path for path in modules if path.name >= "u"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
