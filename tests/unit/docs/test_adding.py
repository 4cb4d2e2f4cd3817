"""The table of what adding took, in docs/design/architecture.md, against the files that it names."""

import re
from pathlib import Path

from unit.test_packages import num_code_lines

ROOT = Path(__file__).parents[3]


def test_lines_of_the_examples() -> None:
    page = (
        (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8").partition("### What adding took")[2]
    )
    rows = re.findall(r"^\| a .*? \| (\d+) in 1 file \| `([\w/.]+)`", page, re.M)
    rows += re.findall(r"\| (\d+) in `([\w/.]+)`, ", page)
    assert len(rows) == 5
    for lines, path in rows:
        file = ROOT / path if path.startswith("tests/") else ROOT / "titan_attent" / path
        assert num_code_lines(file.read_text(encoding="utf-8")) == int(lines), path
