"""foundations/words.py."""

import pytest

from titan_attent.foundations.words import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 processes"), (1, "1 process"), (2, "2 processes"), (12_345, "12,345 processes")]
)
def test_a_number_has_the_form_of_its_noun(number: int, words: str) -> None:
    assert counted(number, "process", "processes") == words
    assert counted(number, "shard") == words.replace("processes", "shards").replace("process", "shard")
