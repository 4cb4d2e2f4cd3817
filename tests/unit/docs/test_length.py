"""The guide and the README stay short: details belong in docs/reference, measurements in docs/results."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
MAX_GUIDE_WORDS = 6_000
MAX_README_WORDS = 900


def num_words(*pages: Path) -> int:
    """As ``wc -w`` counts them."""
    return sum(len(page.read_text(encoding="utf-8").split()) for page in pages)


def test_the_guide_stays_short() -> None:
    pages = sorted((ROOT / "docs" / "guide").glob("*.md"))
    assert len(pages) >= 10
    assert num_words(*pages) < MAX_GUIDE_WORDS


def test_the_readme_stays_short() -> None:
    assert num_words(ROOT / "README.md") < MAX_README_WORDS


def test_the_glossary_is_alphabetical_with_one_line_per_word() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    words = [line.split(" | ")[0].strip("| `").lower().replace("-", " ") for line in lines if line.startswith("| ")][1:]
    assert len(words) >= 26
    assert words == sorted(set(words))
