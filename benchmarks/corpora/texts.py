"""The texts of the single-pass corpora: pinned Python packages, and Debian's manual pages, licences and documentation.

    python -m benchmarks.corpora.texts --output outputs/texts

Each kind of text is a list of documents, in a fixed order and without duplicates:

    code         sources of four Python packages, each file cut to 32,768 characters
    manual       English manual pages (groff sources without their comments)
    russian      the same in Russian
    german       the same in German
    licence      the copyright files of the Debian packages on this machine: real near-duplicates
    prose        the sources of Python's documentation (reStructuredText), and WikiText-2 where ``--wiki`` names it
    page         HTML pages of PostgreSQL's and Python's documentation, with tags removed naively: menus, headers and
                 footers remain
    table        lines of Unicode's tables and the time zone database
    base64       images and compressed files of the same packages
    script       JavaScript, CSS and SVG of the same packages

Packages come from the registries that pip and apt are configured for, in the versions named here (apt: the version of
the distribution). Nothing is installed. Needs Debian's or Ubuntu's apt-get and dpkg-deb. Cost: 80 MB, 1 minute.
"""

import argparse
import base64
import gzip
import html
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

WHEELS = ("django==5.1.4", "networkx==3.4.2", "sqlalchemy==2.0.36", "sympy==1.13.3")
DEBS = (
    "git-man",
    "manpages",
    "manpages-de",
    "manpages-dev",
    "manpages-ru",
    "postgresql-doc-15",
    "python3.11-doc",
    "tzdata",
    "unicode-data",
)
CHARACTERS_PER_FILE = 32_768
LICENCES = Path("/usr/share/doc")


def fetch(folder: Path, debs: Sequence[str] = DEBS) -> None:
    """Download and unpack missing packages; RuntimeError with a tool's output if it fails.

    Args:
        folder: the folder that gets ``wheels/`` and ``packages/``.
        debs: names of Debian packages.
    """
    wheels, packages = folder / "wheels", folder / "packages"
    wheels.mkdir(parents=True, exist_ok=True)
    packages.mkdir(exist_ok=True)
    if len(list(wheels.glob("*.whl"))) < len(WHEELS):
        _run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels.resolve()), *WHEELS], cwd=folder
        )
    for name in debs:
        if not (packages / name).is_dir():
            if not list(folder.glob(f"{name}_*.deb")):
                _run(["apt-get", "download", name], cwd=folder)
            (deb,) = folder.glob(f"{name}_*.deb")
            _run(["dpkg-deb", "-x", str(deb.resolve()), str((packages / name).resolve())], cwd=folder)


def _run(command: list[str], *, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is missing: these corpora need Debian's tools") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def read(folder: Path, kind: str, *, wiki: Path | None = None) -> list[str]:
    """The documents of a kind, without duplicates; call :func:`fetch` first."""
    texts = list(_prose(folder, wiki)) if kind == "prose" else list(_KINDS[kind](folder))
    return list(dict.fromkeys(text for text in texts if text.strip()))


def at_most(documents: Iterable[str], characters: int) -> list[str]:
    """The first documents, up to so many characters; ValueError if there are fewer."""
    taken = []
    for text in documents:
        if characters <= 0:
            return taken
        taken.append(text)
        characters -= len(text)
    raise ValueError(f"the texts have {characters:,} characters too few")


def _files(folder: Path, packages: Sequence[str], pattern: str) -> Iterator[Path]:
    for package in packages:
        root = folder / "packages" / package
        yield from sorted(path for path in root.rglob(pattern) if path.is_file() and not path.is_symlink())


def _code(folder: Path) -> Iterator[str]:
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py") and "/tests/" not in name and "/locale/" not in name:
                    yield archive.read(name).decode("utf-8", errors="ignore")[:CHARACTERS_PER_FILE]


def _manual_pages(*packages: str) -> Callable[[Path], Iterator[str]]:
    def pages(folder: Path) -> Iterator[str]:
        for path in _files(folder, packages, "*.gz"):
            if "/man/" in path.as_posix():
                text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
                lines = [line for line in text.splitlines(keepends=True) if not line.startswith(('.\\"', "'\\\""))]
                if len(lines) > 3:  # shorter ones only name another page
                    yield "".join(lines)

    return pages


def _licences(folder: Path) -> Iterator[str]:
    for path in sorted(LICENCES.glob("*/copyright")):
        yield path.read_bytes().decode("utf-8", errors="ignore")[:CHARACTERS_PER_FILE]


def _prose(folder: Path, wiki: Path | None) -> Iterator[str]:
    for path in _files(folder, ["python3.11-doc"], "*.rst.txt"):
        if "/whatsnew/changelog" not in path.as_posix():
            yield path.read_text(encoding="utf-8", errors="ignore")[: 2 * CHARACTERS_PER_FILE]
    if wiki is not None:
        text = wiki.read_text(encoding="utf-8")
        yield from re.split(r"\n(?= = [^=])", text)  # one article each


def _pages(folder: Path) -> Iterator[str]:
    for path in _files(folder, ["postgresql-doc-15", "python3.11-doc"], "*.html"):
        source = path.read_text(encoding="utf-8", errors="ignore")
        text = html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", source, flags=re.DOTALL))
        yield re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text))[:CHARACTERS_PER_FILE]


def _tables(folder: Path) -> Iterator[str]:
    names = ("UnicodeData.txt", "EastAsianWidth.txt", "LineBreak.txt", "tzdata.zi", "zone1970.tab", "NamesList.txt")
    for path in _files(folder, ["unicode-data", "tzdata"], "*"):
        if path.name.removesuffix(".gz") in names:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="ignore")
            yield from (text[i : i + CHARACTERS_PER_FILE] for i in range(0, len(text), CHARACTERS_PER_FILE))


def _base64(folder: Path) -> Iterator[str]:
    for path in _files(folder, ["python3.11-doc", "git-man"], "*"):
        if path.suffix in {".png", ".gz"}:
            yield base64.encodebytes(path.read_bytes()[:CHARACTERS_PER_FILE]).decode("ascii")


def _scripts(folder: Path) -> Iterator[str]:
    for path in _files(folder, DEBS, "*"):
        if path.suffix in {".js", ".css", ".svg"}:
            text = path.read_text(encoding="utf-8", errors="ignore")[: 16 * CHARACTERS_PER_FILE]
            yield from (text[i : i + CHARACTERS_PER_FILE] for i in range(0, len(text), CHARACTERS_PER_FILE))


_KINDS: dict[str, Callable[[Path], Iterable[str]]] = {
    "code": _code,
    "manual": _manual_pages("manpages", "manpages-dev", "git-man"),
    "russian": _manual_pages("manpages-ru"),
    "german": _manual_pages("manpages-de"),
    "licence": _licences,
    "page": _pages,
    "table": _tables,
    "base64": _base64,
    "script": _scripts,
}
KINDS = (*_KINDS, "prose")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download the texts of the single-pass corpora.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to download to")
    parser.add_argument("--wiki", type=Path, help="a file of WikiText-2, for the kind prose")
    args = parser.parse_args(argv)
    try:
        fetch(args.output)
    except RuntimeError as error:
        print(f"texts: {error}", file=sys.stderr)
        return 2
    for kind in KINDS:
        texts = read(args.output, kind, wiki=args.wiki)
        print(json.dumps({"kind": kind, "documents": len(texts), "characters": sum(map(len, texts))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
