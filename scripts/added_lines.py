"""Prints the lines of code that a commit added or changed, per module of the package; docstrings and comments apart.

python scripts/added_lines.py ':/Text: .csv and .tsv'   # any revision; this is the newest commit with such a message
"""

import difflib
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from test_packages import code_lines


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def _code(commit: str, path: str) -> list[str]:
    """The lines of code of a file in a commit; none if it is not there."""
    if not _git("ls-tree", commit, path):
        return []
    source = _git("show", f"{commit}:{path}")
    lines = source.splitlines()
    return [lines[number - 1] for number in sorted(code_lines(source))]


def added_lines(commit: str) -> dict[str, int]:
    """The number of added or changed lines of code per module of the package, without modules that have none."""
    commit = _git("rev-parse", commit).strip()
    counts = {}
    for path in _git("diff", "--name-only", f"{commit}~", commit, "--", "titan_attent/**.py").split():
        before, after = _code(f"{commit}~", path), _code(commit, path)
        changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        if number := sum(stop - start for tag, _, _, start, stop in changes if tag != "equal"):
            counts[path] = number
    return counts


if __name__ == "__main__":
    counts = added_lines(sys.argv[1])
    for path, number in counts.items():
        print(f"{number:5} {path}")
    print(f"{sum(counts.values()):5} lines in {len(counts)} files")
