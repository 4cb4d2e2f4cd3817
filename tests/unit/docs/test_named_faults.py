"""docs/reference/distillation.md: every fault of another implementation that it lists has the test that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_fault_has_its_test() -> None:
    page = (ROOT / "docs" / "reference" / "distillation.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## Faults of other implementations\n(.*?)\n## ", page, flags=re.DOTALL)
    rows = [line for line in section.splitlines() if line.startswith("| ") and "test |" not in line]
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and tests.issuperset(named), row
